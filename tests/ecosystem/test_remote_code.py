"""Saved folders tell programs that do not import this package where its classes are."""

from __future__ import annotations

import json
import os
import re
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
    "AutoModelForCausalLM": "VideoLlamaForConditionalGeneration",
    "AutoModelForImageTextToText": "VideoLlamaForConditionalGeneration",
    "AutoModelForMultimodalLM": "VideoLlamaForConditionalGeneration",
    "AutoProcessor": "VideoLlamaProcessor",
    "AutoImageProcessor": "VideoLlamaImageProcessor",
    "AutoVideoProcessor": "VideoLlamaVideoProcessor",
    "AutoFeatureExtractor": "VideoLlamaFeatureExtractor",
}
PARTS = ("AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor")
# Run in a process that has imported transformers only.
LOAD = """
import sys, transformers
folder, target, *names = sys.argv[1:]
for name in names:
    loaded = getattr(transformers, name).from_pretrained(folder, trust_remote_code=%s)
    loaded.save_pretrained(f"{target}/{name}")
    print(type(loaded))
"""
TRUSTED = LOAD % True
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


def run(program: str, folder: Path, target: Path, *names: str) -> subprocess.CompletedProcess[str]:
    root = {"PYTHONPATH": str(Path(video_llama.__file__).parents[1]), "HF_MODULES_CACHE": str(target / "modules")}
    arguments = [sys.executable, "-c", program, str(folder), str(target), *names]
    environment = {**os.environ, **root, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("AutoProcessor", "AutoModel", "AutoModelForImageTextToText"),
        ("AutoModelForMultimodalLM", "AutoConfig", "AutoModelForCausalLM"),
        PARTS,
    ],
    ids=["processor first", "model first", "parts of the processor"],
)
def test_auto_classes_load_a_saved_folder_that_they_may_trust(
    names: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    done = run(TRUSTED, folder, tmp_path, *names)
    assert done.returncode == 0, done.stderr
    assert [re.findall(r"video_llama\.\S*\b(\w+)'", line)[0] for line in done.stdout.splitlines()] == [
        AUTO_CLASSES[name] for name in names
    ]
    # What was loaded so is saved as ever: no other file of Python comes along, and it can be loaded in its turn.
    expected = {key: f"modeling_video_llama.{value}" for key, value in AUTO_CLASSES.items()}
    for name in names:
        assert [path.name for path in (tmp_path / name).glob("*.py")] == [SHIM]
        configs = [json.loads(path.read_text()) for path in (tmp_path / name).glob("*config.json")]
        [auto_map] = [config["auto_map"] for config in configs if "auto_map" in config]
        assert auto_map.items() <= expected.items()
        assert name in auto_map


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (HIDDEN + TRUSTED, "ImportError: this model needs the package video_llama, which is not installed: run `pip"),
        (LOAD % False, "pass the argument `trust_remote_code=True`"),
    ],
    ids=["not installed", "not trusted"],
)
def test_what_is_missing_is_said(program: str, expected: str, folder: Path, tmp_path: Path) -> None:
    done = run(program, folder, tmp_path, "AutoModelForMultimodalLM")
    assert done.returncode != 0
    assert expected in done.stderr.strip().splitlines()[-1]


def test_a_folder_cannot_name_other_code(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModel": "somebody/else--modeling.Other"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert VideoLlamaConfig.from_pretrained(tmp_path).auto_map["AutoModel"] == "modeling_video_llama.VideoLlamaModel"
