"""Batches without media for what trains, in one process and in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from tests.training.distributed_run import drop_nothing
from tests.training.test_distributed import launch, succeeded
from tests.training.test_trainer import assert_same, read_log, trained
from video_llama.config import Config, load_config
from video_llama.data.build import build_batch_reader
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


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture
def mixed(config_file: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """Options of a run of both branches whose samples have media of different kinds, or none."""
    files = {
        "video": next((corpus / "train" / "webvid" / "videos").rglob("*.mp4")),
        "image": next((corpus / "train" / "cc_sbu_align" / "image").iterdir()),
        "audio": next((corpus / "train" / "audio_caption" / "audio").iterdir()),
    }
    lines = [json.dumps(TALK)] * 2
    for kinds in (["video"], ["image"], ["audio"], ["video", "audio"], ["image", "video"]):
        media = [{"type": kind, "path": str(files[kind])} for kind in kinds]
        ask = [*media, {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": "A shape with " + " and ".join(kinds)}
        lines.append(json.dumps({"messages": [{"role": "user", "content": ask}, answer]}))
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines) + "\n")
    sections = ("messages.build_info", "messages.valid_build_info")
    return [
        *(f"datasets.{section}.anno_dir={file}" for section in sections),
        "datasets.messages.sample_ratio=1",
        "datasets.messages.vis_processor.train.n_frms=2",
        "datasets.webvid.sample_ratio=0",
        "datasets.cc_sbu_align.sample_ratio=0",
        "model.equip_audio_branch=True",
        "model.frozen_audio_Qformer=False",
        "model.max_txt_len=300",
        # The same rate at each step, so that runs of other lengths compare.
        *("run.warmup_steps=0", "run.init_lr=1e-3", "run.min_lr=1e-3", "run.max_epoch=1", "run.log_freq=1"),
        *("run.batch_size_train=1", "run.batch_size_eval=1"),
    ]


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in read_log(folder) if line["event"] == event]


def kinds_by_process(config: Config, num_batches: int) -> set[frozenset[frozenset[str]]]:
    """Return what two processes have in their batches at the same time: names of media inputs."""
    trainer = Trainer(config)
    readers = [
        build_batch_reader(config, trainer.datasets, trainer.processor, rank=rank, world_size=2) for rank in range(2)
    ]
    return {
        frozenset(frozenset(item.name for item in reader[number].media) for reader in readers)
        for number in range(num_batches)
    }


def test_two_processes_with_media_of_different_kinds_train_what_one_does(
    mixed: list[str], config_file: Path, tmp_path: Path
) -> None:
    """Video, image, audio, several of them or none: whatever each process has in a step, bits are the same."""
    folders = {name: tmp_path / name for name in ("one", "ddp", "fsdp")}
    twenty = "run.iters_per_epoch=20"
    succeeded(launch(2, config_file, *mixed, twenty, f"run.output_dir={folders['ddp']}"))
    succeeded(launch(2, config_file, *mixed, twenty, f"run.output_dir={folders['fsdp']}", **FSDP))
    # One process that sums up the gradients of the same two batches: the same additions, so the same bits.
    summing = ["run.iters_per_epoch=40", "run.accum_grad_iters=2", f"run.output_dir={folders['one']}"]
    succeeded(launch(1, config_file, *mixed, *summing))

    config = load_config(config_file, [*mixed, twenty, f"run.output_dir={tmp_path / 'again'}"])
    none, frames, audio = frozenset[str](), frozenset({"pixel_values"}), frozenset({"audio_values"})
    pairs = ({none}, {none, frames}, {none, audio}, {frames, frames | audio})
    assert {frozenset(pair) for pair in pairs} <= kinds_by_process(config, 20)

    assert "FSDP" in read_log(folders["fsdp"])[0]["processes"]
    losses = {name: [line["loss"] for line in logged(folder, "train")] for name, folder in folders.items()}
    assert len(losses["one"]) == 20
    assert losses["ddp"] == losses["one"]
    assert losses["fsdp"] == losses["one"]
    for name in ("ddp", "fsdp"):
        assert_same(trained(folders["one"]), trained(folders[name]))
        ours, theirs = (logged(folders[run], "valid")[0] for run in (name, "one"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["num_samples"] == theirs["num_samples"] == 7

    # Both samples in one batch: other sums, and so other rounding.
    together = Trainer(load_config(config_file, [*mixed, twenty, "run.batch_size_train=2"]))
    drop_nothing(together.model)
    together.train()
    losses["together"] = [line["loss"] for line in logged(together.folder, "train")]
    assert losses["together"] == pytest.approx(losses["one"], rel=1e-6)
    for name, weight in trained(folders["one"]).items():
        torch.testing.assert_close(trained(together.folder)[name], weight, rtol=0, atol=1e-5)


def test_gradients_that_are_summed_first_are_the_same_with_sharded_weights(
    mixed: list[str], config_file: Path, tmp_path: Path
) -> None:
    """A branch may have gradients of an earlier batch of the step, and no media in the one that exchanges them."""
    options = [*mixed, "run.iters_per_epoch=16", "run.accum_grad_iters=4"]
    succeeded(launch(2, config_file, *options, f"run.output_dir={tmp_path / 'ddp'}"))
    succeeded(launch(2, config_file, *options, f"run.output_dir={tmp_path / 'fsdp'}", **FSDP))
    assert_same(trained(tmp_path / "ddp"), trained(tmp_path / "fsdp"))


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
