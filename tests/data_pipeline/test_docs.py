"""What docs/data.md and docs/own_data.md say is run as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from video_llama.config import load_config
from video_llama.data.build import build_datasets
from video_llama.data.datasets import build_examples
from video_llama.inference.load import build_model_processor
from video_llama.registry import DATASETS

ROOT = Path(__file__).parents[2]
DATA, OWN_DATA = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "own_data.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(command: str, folder: Path) -> str:
    """Run one line of a shell block; what it prints."""
    program, *arguments = shlex.split(command, comments=True)
    program = sys.executable if program == "python" else program
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def commands(text: str) -> list[str]:
    """The lines of all shell blocks, continued ones joined."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like this repository, with the corpus and the ten samples of the walk-through."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("scripts", "video_llama", "examples", "configs", "prompts", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    for command in commands(OWN_DATA)[:3]:
        run(command, folder)
    (folder / "data/mine/train.jsonl").write_text(blocks(OWN_DATA, "jsonl")[0], encoding="utf-8")
    (folder / "data/mine/captions.csv").write_text(blocks(OWN_DATA, "csv")[0], encoding="utf-8")
    (folder / "data/mine/train.yaml").write_text(blocks(OWN_DATA, "yaml")[0], encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_walk_through_has_ten_samples_that_are_all_good(place: Path) -> None:
    check, train, evaluate = commands(OWN_DATA)[3:]
    assert check.startswith("python scripts/check_dataset.py")
    printed = run(check, place)
    [shown] = blocks(OWN_DATA, "text")

    def without_times(text: str) -> str:
        return re.sub(r"\d+\.\d(, \d+\.\d)* seconds", "T seconds", text).strip()

    assert without_times(printed) == without_times(shown)
    run(train, place)
    assert (place / "output/mine/log.jsonl").exists()
    assert "10 dialogues; 0 could not be asked" in run(evaluate, place)


@pytest.mark.slow
def test_the_other_sections_of_the_walk_through_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    first, *sections = blocks(OWN_DATA, "yaml")
    assert len(sections) == 3
    for number, section in enumerate(sections):
        model = first.partition("datasets:")[0]
        path = place / f"{number}.yaml"
        path.write_text(model + section, encoding="utf-8")
        config = load_config(path)
        built = build_datasets(config, build_model_processor(config.model), training=True)
        assert [dataset.name for dataset in built] == list(config.datasets)
        for dataset in built:
            assert dataset.encoder(dataset.examples[0]).media


@pytest.mark.slow
def test_the_shards_that_are_packed_are_those_that_the_section_names(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for command in commands(DATA):
        run(command, place)
    path = place / "shards.yaml"
    (section,) = (block for block in blocks(DATA, "yaml") if "shards:webvid" in block)
    path.write_text(section, encoding="utf-8")
    sections = load_config(path).datasets
    sizes = {name: len(build_examples(name, section)) for name, section in sections.items()}
    assert sizes == {"shards:webvid": 16, "shards:messages": 40, "shards:aligned": 16}


def test_every_dataset_has_its_row_and_its_layout() -> None:
    rows = "\n".join(line for line in DATA.splitlines() if line.startswith("| `"))
    headings = "\n".join(line for line in DATA.splitlines() if line.startswith("### "))
    for name in DATASETS.names():
        assert f"`{name}`" in rows
        assert re.search(rf"\b{name}\b", headings)
