"""Batches without media for what trains, in one process and in several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.conftest import MakeConfig
from tests.training.test_distributed import launch, succeeded
from tests.training.test_trainer import read_log
from video_llama.config import Config
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow

TALK = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two of them."}]}


def mostly_talk(make_config: MakeConfig, tmp_path: Path, *options: str) -> Config:
    """A configuration whose samples hardly ever have media."""
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(TALK) + "\n" for _ in range(4)))
    return make_config(
        "datasets.messages.sample_ratio=1000000",
        f"datasets.messages.build_info.anno_dir={file}",
        "datasets.webvid.sample_ratio=1",
        "datasets.cc_sbu_align.sample_ratio=0",
        *options,
    )


def test_talk_without_media_teaches_the_branches_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(mostly_talk(make_config, tmp_path, "run.weight_decay=0.5"))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    state = trainer.train()
    assert state.iteration == 8
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert [line["grad_norm"] for line in read_log(trainer.folder) if line["event"] == "train"] == [0.0] * 4


def test_both_branches_train_together_on_batches_of_either(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    folder = corpus / "train" / "audio_caption"
    video = next((corpus / "train" / "webvid" / "videos").rglob("*.mp4"))
    ask = [{"type": "video", "path": str(video)}, {"type": "text", "text": "What?"}]
    seen = {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "A shape."}]}
    file = tmp_path / "seen.jsonl"
    file.write_text(json.dumps(seen) + "\n")
    trainer = Trainer(
        make_config(
            "model.equip_audio_branch=True",
            "model.frozen_audio_Qformer=False",
            "model.max_txt_len=300",
            "datasets.webvid.sample_ratio=0",
            "datasets.cc_sbu_align.sample_ratio=0",
            "datasets.messages.sample_ratio=1",
            f"datasets.messages.build_info.anno_dir={file}",
            "datasets.audio_caption.data_type=audio",
            f"datasets.audio_caption.build_info.anno_dir={folder / 'captions.csv'}",
            f"datasets.audio_caption.build_info.videos_dir={folder / 'audio'}",
            "datasets.audio_caption.sample_ratio=1",
        )
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert trainer.train().iteration == 8
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_processes_with_and_without_media_train_together(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    video = next((corpus / "train" / "webvid" / "videos").rglob("*.mp4"))
    ask = [{"type": "video", "path": str(video)}, {"type": "text", "text": "What?"}]
    seen = {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "A shape."}]}
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in (TALK, seen) * 2))
    options = [
        "datasets.messages.sample_ratio=1",
        f"datasets.messages.build_info.anno_dir={file}",
        "datasets.webvid.sample_ratio=0",
        "datasets.cc_sbu_align.sample_ratio=0",
        "run.batch_size_train=1",
        "model.max_txt_len=300",
    ]
    succeeded(launch(2, config_file, *options))
    assert read_log(tmp_path / "run")[-1]["iteration"] == 8
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    sharded = launch(2, config_file, *options, f"run.output_dir={tmp_path / 'sharded'}", **fsdp)
    assert sharded.returncode != 0
    assert (
        "keep conversations with images or videos, with audio and without media in datasets of their own"
        in sharded.stderr
    )


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}])
def test_a_process_without_a_share_of_the_validation_split_waits_for_nobody(
    environment: dict[str, str], config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    split = corpus / "validation" / "webvid"
    options = [
        f"datasets.webvid.valid_build_info.anno_dir={split / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'videos'}",
        "run.batch_size_eval=64",
        "run.max_epoch=1",
    ]
    succeeded(launch(2, config_file, *options, **environment))
    valid = [line for line in read_log(tmp_path / "run") if line["event"] == "valid"]
    assert len(valid) == 1
    assert valid[0]["num_samples"] == sum(
        len(path.read_text().splitlines()) - 1 for path in (split / "annotations").iterdir()
    )
