"""Saved folders tell programs that do not import this package where its classes are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import video_llama
from tests.ecosystem.conftest import SMALL_MODEL
from video_llama import VideoLlamaConfig, VideoLlamaForConditionalGeneration, VideoLlamaProcessor

SHIM = "modeling_video_llama.py"
AUTO_CLASSES = {
    "AutoConfig": "VideoLlamaConfig",
    "AutoModel": "VideoLlamaModel",
    "AutoModelForImageTextToText": "VideoLlamaForConditionalGeneration",
    "AutoModelForMultimodalLM": "VideoLlamaForConditionalGeneration",
    "AutoProcessor": "VideoLlamaProcessor",
}
# Each in a process of its own, which has imported transformers only.
LOAD = "import sys, transformers; loaded = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2], {})"
TRUSTED = LOAD.format("trust_remote_code=True")
HIDDEN = """
class Hidden:
    def find_spec(self, name, *_):
        if name == "video_llama":
            raise ModuleNotFoundError("No module named 'video_llama'", name=name)
import sys; sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL).save_pretrained(folder)
    VideoLlamaProcessor.from_pretrained(SMALL_MODEL).save_pretrained(folder)
    return folder


def run(program: str, name: str, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    root = Path(video_llama.__file__).parents[1]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", program, name, str(folder)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_an_auto_class_loads_a_saved_folder_that_it_may_trust(name: str, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "again"
    program = f"{TRUSTED}; print(type(loaded)); loaded.save_pretrained({str(saved)!r})"
    done = run(program, name, folder, tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<class 'video_llama.")
    assert f".{AUTO_CLASSES[name]}'" in done.stdout
    # What was loaded so is saved as ever: no other file of Python comes along, and it can be loaded in its turn.
    assert [path.name for path in saved.glob("*.py")] == [SHIM]
    [config] = [path for path in saved.glob("*config.json") if "auto_map" in json.loads(path.read_text())]
    assert json.loads(config.read_text())["auto_map"].items() <= {
        key: f"modeling_video_llama.{value}" for key, value in AUTO_CLASSES.items()
    }.items()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (HIDDEN + TRUSTED, "ImportError: this model needs the package video_llama, which is not installed: run `pip"),
        (LOAD.format("trust_remote_code=False"), "pass the argument `trust_remote_code=True`"),
    ],
    ids=["not installed", "not trusted"],
)
def test_what_is_missing_is_said(program: str, expected: str, folder: Path, tmp_path: Path) -> None:
    done = run(program, "AutoModelForMultimodalLM", folder, tmp_path / "modules")
    assert done.returncode != 0
    assert expected in done.stderr.strip().splitlines()[-1]


def test_a_folder_cannot_name_other_code(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModel": "somebody/else--modeling.Other"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert VideoLlamaConfig.from_pretrained(tmp_path).auto_map["AutoModel"] == "modeling_video_llama.VideoLlamaModel"
