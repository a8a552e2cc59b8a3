"""What stands beside the package: the workflow, the hooks, how to contribute, how to cite, the changelog."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import video_llama

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> set[str]:
    """Lines of shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return {line.split(" #")[0].strip() for block in blocks for line in block.splitlines()}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    [job] = workflow["jobs"].values()
    return job


def test_the_workflow_runs_the_commands_of_the_readme(job: dict[str, Any]) -> None:
    run = {step["run"].strip() for step in job["steps"] if "scripts/" in step.get("run", "")}
    assert run == {"bash scripts/demo.sh", "bash scripts/test.sh"}
    assert run <= commands(read("README.md"))
    assert read(".ci/run").endswith("\nbash scripts/test.sh\nbash scripts/test_engines.sh ray\n")


def test_the_workflow_covers_the_pythons_and_the_ends_of_the_ranges_that_are_declared(job: dict[str, Any]) -> None:
    matrix = job["strategy"]["matrix"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert matrix["python"] == named
    assert matrix["requirements"] == ["requirements.txt"]
    assert matrix["include"] == [{"python": "3.11", "requirements": "scripts/lowest.txt"}]
    assert job["env"]["VIDEO_LLAMA_REQUIREMENTS"] == "${{ matrix.requirements }}"
    assert "VIDEO_LLAMA_REQUIREMENTS" in read("scripts/setup_env.sh")


def test_the_hooks_run_what_the_test_script_runs_in_the_same_environment() -> None:
    [repository] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    assert programs == ["ruff check", "ruff format", "mypy"]
    assert [program for program in programs if f"\n{program}" not in read("scripts/test.sh")] == []
    assert {program.split()[0] for program in programs} <= {
        Requirement(line).name for line in PROJECT["optional-dependencies"]["dev"]
    }


def test_the_citation_names_the_software_of_this_version_and_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "type"} <= citation.keys()
    assert citation["title"] == PROJECT["name"]
    assert str(citation["version"]) == video_llama.__version__
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    names = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert names == "Hang Zhang, Xin Li, Lidong Bing"
    assert paper["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2306.02858"
    readme = read("README.md")
    assert f"title     = {{{paper['title']}}}" in readme
    assert "author    = {Zhang, Hang and Li, Xin and Bing, Lidong}" in readme


def test_the_changelog_has_this_version_below_what_is_unreleased() -> None:
    versions = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(video_llama.__version__)} - \d{{4}}-\d\d-\d\d", versions[1])
    kinds = re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_how_to_contribute_is_short_and_names_only_what_exists() -> None:
    text = read("CONTRIBUTING.md")
    assert len(text.splitlines()) <= 80
    links = re.findall(r"\]\(([^)#\s]+)", text)
    files = re.findall(r"(?<![\w/.])[\w./]+(?:\.(?:py|md|sh|txt|toml|yaml)|/)(?![\w.])", text)
    assert len(links) >= 1
    assert len(files) > 30
    assert [name for name in (*links, *files) if not (ROOT / name).exists()] == []
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "video_llama").rglob("*.py"))
    sources += read("tests/data_pipeline/test_datasets.py")
    names = set(re.findall(r"`@?([A-Za-z_]+)(?:\.\w+\([^`]*\))?`", text))
    assert {"DATASETS", "LAYOUTS", "SeparatorStyle", "guess_conv_template"} <= names
    assert [name for name in names if not re.search(rf"\b{name}\b", sources)] == []


def test_the_layers_in_how_to_contribute_are_those_that_are_checked() -> None:
    from tests.test_architecture import LAYERS

    text = read("CONTRIBUTING.md")
    section = text[text.index("## The layers") : text.index("## Add a dataset")]
    listed = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    assert [set(re.findall(r"`video_llama/(\w+)", layer)) for layer in listed] == LAYERS
