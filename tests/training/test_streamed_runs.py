"""Training on a streamed Hugging Face dataset: killed and resumed, and in two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import MakeConfig
from tests.training.test_distributed import launch, succeeded
from tests.training.test_resume import ROOT
from tests.training.test_trainer import assert_same, trained
from video_llama.config import save_config
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.trainer import Trainer

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> list[str]:
    """Keys that stream captions of images from five files, beside the clips of the corpus."""
    folder = corpus / "train" / "cc_sbu_align"
    captions = json.loads((folder / "filter_cap.json").read_text())["annotations"]
    rows = [{"image": f"{line['image_id']}.jpg", "caption": line["caption"]} for line in captions]
    (tmp_path / "rows").mkdir()
    for file in range(5):
        lines = map(json.dumps, rows[file::5])
        (tmp_path / f"rows/train-{file}.jsonl").write_text("\n".join(lines))
    keys = {
        "build_info.storage": tmp_path / "rows",
        "build_info.videos_dir": folder / "image",
        "build_info.streaming": True,
        "build_info.shuffle_buffer": 3,
        "data_type": "images",
        "sample_ratio": 4,
    }
    run = ["run.save_freq=1", "run.num_workers=2"]
    return [f"datasets.hf.{key}={value}" for key, value in keys.items()] + run


def test_kills_leave_no_trace_in_the_result(make_config: MakeConfig, options: list[str], tmp_path: Path) -> None:
    options = [*options, "run.iters_per_epoch=15"]
    unbroken = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    save_config(make_config(*options, f"run.output_dir={tmp_path / 'killed'}"), tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path / "killed.yaml"), "5", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(trained(unbroken.folder), trained(tmp_path / "killed"))


def test_a_checkpoint_holds_where_the_stream_stands(make_config: MakeConfig, options: list[str]) -> None:
    trainer = Trainer(make_config(*options, "run.keep_checkpoints=9"))
    trainer.train()
    unbroken = trained(trainer.folder)
    saved = list_checkpoints(trainer.folder / "checkpoints")
    places = [json.loads((folder / "state.json").read_text())["streams"] for folder in saved]
    # Of one process, and in another place after each batch of the stream.
    assert all(len(of_all) == 1 for of_all in places)
    assert len({json.dumps(of_all) for of_all in places}) > 4
    for folder in saved[3:]:
        shutil.rmtree(folder)
    resumed = Trainer(make_config(*options, "run.resume_ckpt_path=auto"))
    assert resumed.state.streams == places[2]
    resumed.train()
    assert_same(trained(resumed.folder), unbroken)


def test_two_processes_share_a_stream_and_go_on(config_file: Path, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeeded(launch(2, config_file, *options, "run.keep_checkpoints=9"))
    unbroken = trained(folder)
    saved = list_checkpoints(folder / "checkpoints")
    of_all = json.loads((saved[3] / "state.json").read_text())["streams"]
    assert len(of_all) == 2
    assert of_all[0] != of_all[1]
    for newer in saved[4:]:
        shutil.rmtree(newer)
    succeeded(launch(2, config_file, *options, "run.resume_ckpt_path=auto"))
    # Sums over two processes may be rounded otherwise.
    for name, tensor in trained(folder).items():
        torch.testing.assert_close(tensor, unbroken[name], rtol=1e-5, atol=1e-6)
    # With another number of processes the shares are others, and the run goes on with what is left of its own.
    for newer in list_checkpoints(folder / "checkpoints")[4:]:
        shutil.rmtree(newer)
    done = launch(1, config_file, *options, "run.resume_ckpt_path=auto")
    succeeded(done)
    assert "processes is 2 before and 1 now" in done.stderr
