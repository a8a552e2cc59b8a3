"""A trained model is shared: what its card says, and the way to the hub and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import video_llama
from tests.helpers.checkpoints import load_checkpoint
from tests.helpers.fake_hub import fake_hub
from tests.training.conftest import MakeConfig
from video_llama import VideoLlamaForConditionalGeneration
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.training.trainer import Trainer

SETTINGS = ("run.num_generations=0", "run.max_valid_batches=1", "run.max_epoch=1")


@pytest.fixture
def train(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train one epoch of four iterations, validated on clips; the folder of the run."""
    split = corpus / "validation/webvid"
    valid = {"anno_dir": split / "annotations", "videos_dir": split / "videos"}
    places = [f"datasets.webvid.valid_build_info.{key}={path}" for key, path in valid.items()]

    def train(name: str, *options: str) -> Path:
        Trainer(make_config(*places, *SETTINGS, f"run.output_dir={tmp_path / name}", *options)).train()
        return tmp_path / name

    return train


def row_of(text: str, *beginning: str) -> list[str]:
    """The one row of a card's tables that begins with these cells."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    [row] = [row for row in cells if row[: len(beginning)] == list(beginning)]
    return row[len(beginning) :]


def logged(run: Path, event: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event][-1]


def test_the_card_of_a_run_says_its_stages_data_figures_and_licences(
    train: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    (base / "language_model/README.md").write_text("---\nlicense: llama2\n---\n# Words\n")
    first = train("first")
    second = train("second", f"model.ckpt={first}", "run.init_lr=5e-4", "run.batch_size_train=3")
    load_checkpoint(second).save_pretrained(tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared/README.md")
    assert card.data.pipeline_tag == "video-text-to-text"
    assert card.data.license == "other"
    assert 'load_pretrained_model("shared")' in card.text
    parts = "video Q-Former, video projection"
    assert row_of(card.text, "first", parts) == ["4", "2", "0.001"]
    assert row_of(card.text, "second", parts) == ["4", "3", "0.0005"]
    assert row_of(card.text, "second", "`webvid`") == ["video", "2.0"]
    assert row_of(card.text, "first", "`cc_sbu_align`") == ["images", "1.0"]
    training, validation = logged(second, "train"), logged(second, "validation")
    assert row_of(card.text, "training, mean since the line before")[:2] == ["4", f"{training['loss']:.4g}"]
    figures = [f"{validation['loss']:.4g}", f"{validation['token_accuracy']:.4g}"]
    assert row_of(card.text, "validation: `webvid`") == row_of(card.text, "validation: all") == ["4", *figures]
    assert row_of(card.text, "language model", "`language_model`") == ["llama2"]
    assert row_of(card.text, "frame encoder", "`eva_vit_g.pth`") == ["MIT (EVA)"]
    assert "audio encoder" not in card.text
    # Paths are of this machine.
    assert str(tmp_path) not in card.content
    assert str(base) not in card.content


def test_the_card_of_an_earlier_checkpoint_has_the_figures_of_its_iteration(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    run = train("run", "run.max_epoch=2")
    record = json.loads((run / "checkpoints.json").read_text())
    record["best"] = {"file": "checkpoint_0.pth", "epoch": 0, "iteration": 4}
    (run / "checkpoints.json").write_text(json.dumps(record))
    load_checkpoint(run / "checkpoint_0.pth").save_pretrained(tmp_path / "early")
    assert row_of((tmp_path / "early/README.md").read_text(), "validation: all")[0] == "4"
    load_checkpoint(run).save_pretrained(tmp_path / "late")
    assert row_of((tmp_path / "late/README.md").read_text(), "validation: all")[0] == "8"


def test_the_card_of_a_folder_comes_along_and_others_say_what_is_known(tiny_checkpoint: Path, tmp_path: Path) -> None:
    load_checkpoint("video-llama-tiny").save_pretrained(tmp_path / "again")
    card = (PACKAGED_MODELS / "video-llama-tiny/README.md").read_text()
    assert (tmp_path / "again/README.md").read_text() == card
    load_checkpoint(tiny_checkpoint).save_pretrained(tmp_path / "other", name="me/other")
    text = (tmp_path / "other/README.md").read_text()
    assert "# other\n" in text
    assert 'load_pretrained_model("me/other")' in text
    assert "licences of their own" in text


PROGRAM = """
import sys, torch
from video_llama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor, load_pretrained_model
source, target = sys.argv[1:]
print(load_pretrained_model(source, device="cpu", half=False).push_to_hub("me/my-model", private=True))
loaded = load_pretrained_model("me/my-model", device="cpu", half=False)
same = VideoLlamaForConditionalGeneration.from_pretrained("me/my-model", dtype=torch.float32)
assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in same.state_dict().items())
assert VideoLlamaProcessor.from_pretrained("me/my-model").conv_template == loaded.processor.conv_template
same.save_pretrained(target)
"""


def run_with_hub(address: str, program: str, arguments: list[str], folder: Path, token: str) -> Any:
    # The address of the hub is read once, when huggingface_hub is imported.
    hub = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "0"}
    root = {"PYTHONPATH": str(Path(video_llama.__file__).parents[1])}
    environment = {**os.environ, **hub, **switches, **root}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_was_pushed_to_the_hub_is_loaded_from_there(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train("run")
    with fake_hub() as (address, repositories):
        done = run_with_hub(address, PROGRAM, [str(run), str(tmp_path / "back")], tmp_path, "hf_writer")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{address}/me/my-model/commit/")
        assert {"README.md", "config.json", "model.safetensors", "modeling_video_llama.py"} <= set(
            repositories["me/my-model"]
        )
        text = repositories["me/my-model"]["README.md"].decode()
        assert row_of(text, "validation: all")[1] == f"{logged(run, 'validation')['loss']:.4g}"
        refused = run_with_hub(address, PROGRAM, [str(run), ""], tmp_path, "hf_reader")
    expected = load_checkpoint(run).model.state_dict()
    back = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.items())
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("video_llama.errors.CheckpointError: me/my-model: cannot be written at the hub")
    assert "hf auth login" in last
