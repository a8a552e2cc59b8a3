"""A run that is killed again and again, and a disk that is full."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import MakeConfig
from tests.training.test_trainer import assert_same, read_log, trained
from video_llama.config import save_config
from video_llama.errors import CheckpointError
from video_llama.model.weight_names import to_saved_name
from video_llama.training import checkpoints
from video_llama.training import trainer as trainer_module
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.processes import build_accelerator
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_twenty_kills_at_random_moments_leave_no_trace_in_the_result(make_config: MakeConfig, tmp_path: Path) -> None:
    options = ["run.save_freq=1", "run.iters_per_epoch=40", "run.max_epoch=3", "run.num_workers=1"]
    unbroken = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    config = make_config(*options, f"run.output_dir={tmp_path / 'killed'}")
    save_config(config, tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path / "killed.yaml"), "20", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kills 20" in done.stdout
    assert_same(trained(unbroken.folder), trained(tmp_path / "killed"))


def test_kills_leave_no_trace_in_the_best_weights_and_the_validations_of_passes_over_the_data(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    split = corpus / "validation" / "webvid"
    options = [
        f"datasets.webvid.valid_build_info.anno_dir={split / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'videos'}",
        "datasets.webvid.sample_ratio=1",
        "run.iters_per_epoch=null",
        "run.max_epoch=4",
        "run.batch_size_train=1",
        "run.accum_grad_iters=2",
        "run.valid_freq=3",
        "run.save_freq=2",
        "run.max_valid_batches=2",
        "run.early_stopping_patience=99",
        "run.init_lr=1e-2",
    ]
    unbroken = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    folder = tmp_path / "killed"
    save_config(make_config(*options, f"run.output_dir={folder}"), tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path / "killed.yaml"), "8", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(trained(unbroken.folder), trained(folder))
    assert (folder / "checkpoints.json").read_bytes() == (unbroken.folder / "checkpoints.json").read_bytes()
    best = [torch.load(path / "checkpoint_best.pth", weights_only=True)["model"] for path in (unbroken.folder, folder)]
    assert_same(*best)
    figures = []
    for path in (unbroken.folder, folder):
        lines = (line for line in read_log(path) if line["event"] == "validation")
        figures.append({line["iteration"]: {**line, "time": 0} for line in lines})
    assert figures[0] == figures[1]
    # Every three iterations, after the step of two that passes them, and at the ends of epochs.
    per_epoch = unbroken.length.iters_per_epoch
    assert {per_epoch, 2 * per_epoch, 3 * per_epoch, 4 * per_epoch} <= figures[0].keys()
    assert len(figures[0]) > per_epoch
    assert len({line["is_best"] for line in figures[0].values()}) == 2


def test_a_line_of_the_log_has_the_same_means_after_a_kill(make_config: MakeConfig, tmp_path: Path) -> None:
    options = ["run.log_freq=4", "run.save_freq=3", "run.iters_per_epoch=8", "run.max_epoch=1"]
    unbroken = Trainer(make_config(*options))
    unbroken.train()
    # As a kill after the first checkpoint leaves it.
    killed = make_config(*options, f"run.output_dir={tmp_path / 'killed'}", "run.keep_checkpoints=9")
    Trainer(killed).train()
    for later in list_checkpoints(tmp_path / "killed" / "checkpoints")[1:]:
        shutil.rmtree(later)
    (tmp_path / "killed" / "checkpoint_0.pth").unlink()
    (tmp_path / "killed" / "log.jsonl").unlink()
    killed.run.resume_ckpt_path = "auto"
    resumed = Trainer(killed)
    assert resumed.state.iteration == 3
    resumed.train()
    means = []
    for folder in (unbroken.folder, resumed.folder):
        lines = [line for line in read_log(folder) if line["event"] == "train"]
        means.append([(line["iteration"], line["loss"], line["loss_by_dataset"], line["grad_norm"]) for line in lines])
    assert means[0] == means[1]
    assert [line[0] for line in means[0]] == [4, 8]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_of_the_audio_branch_with_cached_features_goes_on_from_within_an_epoch(
    accumulated: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    options = [
        "model.equip_audio_branch=True",
        "model.frozen_audio_Qformer=False",
        "model.frozen_llama_proj=True",
        "model.frozen_video_Qformer=True",
        f"features.dir={tmp_path / 'cache'}",
        f"run.accum_grad_iters={accumulated}",
        "run.max_epoch=1",
        "run.save_freq=2",
    ]
    trainer = Trainer(make_config(*options))
    trainer.train()
    unbroken = trained(trainer.folder)
    assert unbroken.keys() == {to_saved_name(n) for n, value in trainer.model.named_parameters() if value.requires_grad}
    shutil.rmtree(list_checkpoints(trainer.folder / "checkpoints")[-1])
    resumed = Trainer(make_config(*options, "run.resume_ckpt_path=auto"))
    assert resumed.state.iteration == 2
    resumed.train()
    assert_same(trained(resumed.folder), unbroken)


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(make_config: MakeConfig, monkeypatch: Any) -> None:
    trainer = Trainer(make_config("run.save_freq=2"))
    save = torch.save

    def fail_the_second_time(content: Any, path: Path) -> None:
        if path.name == "optimizer.pt" and list_checkpoints(path.parents[1]):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(checkpoints.torch, "save", fail_the_second_time)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left.*resume_ckpt_path=auto"):
        trainer.train()
    monkeypatch.undo()
    left = sorted(path.name for path in (trainer.folder / "checkpoints").iterdir())
    assert left == ["step_00000002"]
    assert list_checkpoints(trainer.folder / "checkpoints")[-1].name == "step_00000002"
    assert Trainer(make_config("run.resume_ckpt_path=auto")).train().iteration == 8


def test_a_damaged_checkpoint_is_named(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.keep_checkpoints=1"))
    trainer.train()
    newest = list_checkpoints(trainer.folder / "checkpoints")[-1]
    content = (newest / "optimizer.pt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no pickle", bytes(range(256))):
        (newest / "optimizer.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"step_00000008: damaged"):
            Trainer(make_config("run.resume_ckpt_path=auto"))


def test_a_checkpoint_of_other_trainable_parts_is_refused(make_config: MakeConfig) -> None:
    Trainer(make_config()).train()
    with pytest.raises(CheckpointError, match=r"trained other parameters.*video_branch\.projection"):
        Trainer(make_config("run.resume_ckpt_path=auto", "model.frozen_llama_proj=True"))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_over_a_quantised_language_model_saves_and_goes_on(bits: int, make_config: MakeConfig) -> None:
    pytest.importorskip("bitsandbytes")
    options = [f"model.load_in_{bits}bit=True", "run.max_epoch=1"]
    first = Trainer(make_config(*options))
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in {type(module).__name__ for module in first.model.modules()}
    first.train()
    saved = trained(first.folder)
    assert saved.keys() == {to_saved_name(n) for n, value in first.model.named_parameters() if value.requires_grad}
    resumed = Trainer(make_config(*options, "run.max_epoch=2", "run.resume_ckpt_path=auto"))
    assert all(torch.equal(resumed.model.get_parameter(name), value) for name, value in saved.items())
    assert resumed.train().iteration == 8


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_a_quantised_language_model_also_after_a_validation(bits: int, make_config: MakeConfig) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Trainer(make_config(f"model.load_in_{bits}bit=True")).model
    layer: Any = model.language_model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer(torch.ones(1, layer.in_features))
    values = torch.randn(2, 3, layer.in_features, requires_grad=True)
    layer(values).sum().backward()
    if bits == 8:
        held = layer.weight if layer.state.CB is None else layer.state  # from its first use on, the latter
        weights = held.CB * held.SCB[:, None] / 127
    else:
        weights = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = weights.float().sum(0).expand_as(values)
    torch.testing.assert_close(values.grad, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside_and_goes_on_from_there(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["run.save_freq=1", "run.keep_checkpoints=3"]
    first = Trainer(make_config(*options))
    first.train()
    checkpoints, abandoned_export = first.folder / "checkpoints", (first.folder / "checkpoint_1.pth").read_bytes()
    assert names(checkpoints) == ["step_00000006", "step_00000007", "step_00000008"]
    earlier = f"run.resume_ckpt_path={checkpoints / 'step_00000006'}"
    back = Trainer(make_config(*options, earlier, "run.init_lr=1e-4"))
    assert names(checkpoints) == ["step_00000006", "step_00000007", "step_00000008"]  # nothing moves before it trains
    back.train()
    assert names(checkpoints) == ["step_00000006", "step_00000007", "step_00000008"]
    (aside,) = first.folder.glob("abandoned-00000006-*")
    assert names(aside) == ["checkpoint_1.pth", "step_00000007", "step_00000008"]
    assert (aside / "checkpoint_1.pth").read_bytes() == abandoned_export
    assert (first.folder / "checkpoint_0.pth").exists()
    assert f"after iteration 6 is in {aside}" in caplog.text
    new, old = (load_file(path / "step_00000008" / "trainable.safetensors") for path in (checkpoints, aside))
    assert any(not torch.equal(new[name], old[name]) for name in new)
    assert_same(new, trained(first.folder))


def test_a_run_that_went_back_and_was_stopped_goes_on_with_its_new_course(make_config: MakeConfig) -> None:
    options = ["run.save_freq=1", "run.keep_checkpoints=4"]
    first = Trainer(make_config(*options))
    first.train()
    path = first.folder / "checkpoints" / "step_00000005"
    back = Trainer(make_config(*options, f"run.resume_ckpt_path={path}", "run.keep_checkpoints=1"))
    back._stop_signal = 15
    assert back.train().iteration == 6
    assert names(first.folder / "checkpoints") == ["step_00000006"]
    assert Trainer(make_config(*options, "run.resume_ckpt_path=auto")).state.iteration == 6


def test_a_checkpoint_of_another_folder_writes_over_nothing_either(make_config: MakeConfig, tmp_path: Path) -> None:
    other = Trainer(make_config("run.max_epoch=1", f"run.output_dir={tmp_path / 'other'}"))
    other.train()
    first = Trainer(make_config("run.save_freq=2"))
    first.train()
    source = other.folder / "checkpoints" / "step_00000004"
    Trainer(make_config(f"run.resume_ckpt_path={source}")).train()
    (aside,) = first.folder.glob("abandoned-00000004-*")
    assert names(aside) == ["checkpoint_1.pth", "step_00000004", "step_00000006", "step_00000008"]
    assert names(other.folder / "checkpoints") == ["step_00000004"]


def test_the_scale_of_the_loss_goes_on_where_it_was(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_with_scaler(*arguments: Any) -> Any:
        accelerator = build_accelerator(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return accelerator

    monkeypatch.setattr(trainer_module, "build_accelerator", build_with_scaler)
    unbroken = Trainer(make_config(f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    folder = tmp_path / "broken"
    first = Trainer(make_config(f"run.output_dir={folder}"))
    for number in range(4):
        first.step([first.batches()[number]])
    first.save()
    state = json.loads((folder / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (16.0, 1)
    resumed = Trainer(make_config(f"run.output_dir={folder}", "run.resume_ckpt_path=auto"))
    assert resumed.accelerator.scaler.state_dict() == state["scaler"]
    resumed.train()
    assert resumed.accelerator.scaler.state_dict() == unbroken.accelerator.scaler.state_dict()
    assert unbroken.accelerator.scaler.get_scale() == 32.0
    assert_same(trained(resumed.folder), trained(unbroken.folder))


def test_a_checkpoint_from_before_the_scale_was_kept_is_gone_on_from(make_config: MakeConfig) -> None:
    Trainer(make_config("run.max_epoch=1")).train()
    file = list_checkpoints(Path(make_config().run.output_dir) / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("scaler") is None
    file.write_text(json.dumps(state))
    assert Trainer(make_config("run.resume_ckpt_path=auto")).state.iteration == 4
