"""What is installed, and what an error says of what is not: pyproject.toml, the pinned versions, the extras."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import video_llama
from examples.tiny_world.world.layouts import write_shard
from scripts import plot_training
from tests.conftest import MakeVideo
from video_llama.checkpoints.quantization import quantization_config
from video_llama.cli import caption, demo_video
from video_llama.data.shards import find_shards
from video_llama.errors import ConfigError
from video_llama.evaluation.captions import caption_metrics
from video_llama.media.decode import decode_video
from video_llama.utils.extras import EXTRAS, how_to_install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = Path(video_llama.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ONLY_WITH_AN_ENGINE = (
    "video_llama.integrations.lmms_eval",
    *(f"video_llama.integrations.vllm.{name}" for name in ("inputs", "model", "renderer", "settings")),
)
# Not in `all`: vLLM pins torch and transformers, Ray is for clusters.
OF_ENGINES = {"ray", "vllm"}
ONLY_WITH_GRADIO = {f"video_llama.demo.{name}" for name in ("endpoints", "events", "page", "server")}


def names_and_ranges(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def read_pins(name: str) -> dict[str, Requirement]:
    return names_and_ranges((ROOT / name).read_text(encoding="utf-8").splitlines())


BASE = names_and_ranges(PROJECT["dependencies"])
OF_EXTRAS = {name: names_and_ranges(lines) for name, lines in PROJECT["optional-dependencies"].items()}
DECLARED = {**{key: value for extra in OF_EXTRAS.values() for key, value in extra.items()}, **BASE}
DECLARED.pop("video-llama")  # extras that name each other


# What is declared


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges() -> None:
    lowest = read_pins("scripts/lowest.txt")
    others = {"all", "dev", "docs", *OF_ENGINES}
    used_by_the_package = set(BASE).union(*(names for extra, names in OF_EXTRAS.items() if extra not in others))
    assert used_by_the_package <= set(lowest)
    for name, pin in lowest.items():
        [specifier] = pin.specifier
        lower = {Version(other.version) for other in DECLARED[name].specifier if other.operator == ">="}
        assert (specifier.operator, lower) == ("==", {Version(specifier.version)}), name


def test_the_requirements_are_what_inference_training_and_the_page_need() -> None:
    requirements = read_pins("requirements.txt")
    assert set(requirements) == {*BASE, *OF_EXTRAS["demo"], *OF_EXTRAS["train"]}


def test_everything_that_is_required_is_imported() -> None:
    modules: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
    distributions = packages_distributions()
    imported = {canonicalize_name(name) for module in modules for name in distributions.get(module, [module])}
    assert set(BASE) - imported == {"protobuf"}, "transformers reads sentencepiece models through protobuf"


def test_each_extra_installs_the_package_it_is_named_for() -> None:
    for package, extra in EXTRAS.items():
        assert any(name.replace("-", "_").startswith(package) for name in OF_EXTRAS[extra]), package
    [everything] = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(OF_EXTRAS) - {"all", "dev", "docs"} - OF_ENGINES


# Without the extras


def test_the_engines_of_others_are_imported_by_nothing_else_in_the_package() -> None:
    folder = PACKAGE / "integrations"
    files = {path.relative_to(PACKAGE.parent).with_suffix("") for path in folder.rglob("[!_]*.py")}
    names = {".".join(file.parts) for file in files}
    assert set(ONLY_WITH_AN_ENGINE) <= names
    # The command line starts Ray's driver, vLLM's captioner and its server, which import their engines when they run.
    allowed = {f"video_llama.integrations.{name}" for name in ("ray.captioner", "ray.driver")}
    allowed |= {f"video_llama.integrations.vllm.{name}" for name in ("captioner", "options", "serve")}
    for path in set(PACKAGE.rglob("*.py")) - set(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & names, path
            elif isinstance(node, ast.ImportFrom):
                module = str(node.module)
                assert not module.startswith("video_llama.integrations") or module in allowed, path


@pytest.mark.slow
def test_everything_but_the_page_is_imported_without_the_packages_of_the_extras() -> None:
    code = (
        "import importlib, json, pkgutil, sys\n"
        "packages, left_out = json.loads(sys.argv[1])\n"
        "sys.modules.update(dict.fromkeys(packages))\n"
        "import video_llama\n"
        "for module in pkgutil.walk_packages(video_llama.__path__, 'video_llama.'):\n"
        "    if module.name not in left_out:\n"
        "        importlib.import_module(module.name)\n"
    )
    argument = json.dumps([list(EXTRAS), [*ONLY_WITH_GRADIO, *ONLY_WITH_AN_ENGINE]])
    ran = subprocess.run([sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("bitsandbytes", lambda folder: quantization_config(True, False, torch.device("cpu"))),
        ("decord", lambda folder: decode_video(folder / "clip.mp4", 1, 48, 64, reader="decord")),
        ("pycocoevalcap", lambda folder: caption_metrics([])),
        ("webdataset", lambda folder: find_shards(str(folder / "{0..1}.tar"))),
        ("webdataset", lambda folder: write_shard(folder / "0.tar", [])),
    ],
)
def test_what_needs_a_package_that_is_not_there_says_how_to_install_it(
    package: str, use: Callable[[Path], Any], make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        use(tmp_path)
    assert str(caught.value).endswith(f': {package} is not installed: pip install "video_llama[{EXTRAS[package]}]"')


@pytest.mark.parametrize(
    ("package", "main", "arguments"),
    [
        ("gradio", demo_video.main, ["--model", "absent"]),
        (
            "decord",
            demo_video.main,
            ["--model", "absent", "--video-reader", "decord", "--question", "b"],
        ),
        ("ray", caption.main, ["a", "--model", "absent", "--output", "b", "--launcher", "ray"]),
        ("decord", caption.main, ["a", "--model", "absent", "--output", "b", "--video-reader", "decord"]),
        ("matplotlib", plot_training.main, ["log.jsonl"]),
    ],
)
def test_commands_say_it_in_one_line(
    package: str,
    main: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").write_text('{"event": "train", "iteration": 5, "time": 1.0, "loss": 3.0, "lr": 0.001}\n')
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f": {package} is not installed: {how_to_install(package)}")
