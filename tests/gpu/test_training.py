"""Training on a GPU: the same bits after a stop, data read by other processes, and the launchers of several GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.gpu.test_answers import relative
from tests.training.conftest import MakeConfig
from tests.training.distributed_run import drop_nothing
from tests.training.test_distributed import ROOT, RUN, succeeded
from tests.training.test_trainer import assert_same, events, read_log, trained
from video_llama.config import RunConfig
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.learner import Learner
from video_llama.training.trainer import Trainer

SIX_OF_TWELVE = ["run.max_epoch=3", "run.save_freq=6"]


def on(device: torch.device, *options: str) -> list[str]:
    return [f"run.device={device.type}", *options]


def train_again_from(folder: Path, iteration: int, make_config: MakeConfig, options: list[str]) -> Trainer:
    """Forget what came after an iteration, and go on from there."""
    for path in list_checkpoints(folder / "checkpoints"):
        if path.name > f"step_{iteration:08d}":
            shutil.rmtree(path)
    resumed = Trainer(make_config(*options, "run.resume_ckpt_path=auto"))
    assert resumed.state.iteration == iteration
    resumed.train()
    return resumed


@pytest.mark.usefixtures("deterministic")
def test_a_run_that_goes_on_in_bfloat16_ends_with_the_same_bits(make_config: MakeConfig, device: torch.device) -> None:
    options = on(device, "run.amp=True", "model.dtype=bfloat16", *SIX_OF_TWELVE)
    if hasattr(RunConfig, "deterministic"):
        options.append("run.deterministic=True")
    trainer = Trainer(make_config(*options))
    trainer.train()
    unbroken = trained(trainer.folder)
    assert_same(trained(train_again_from(trainer.folder, 6, make_config, options).folder), unbroken)


def test_without_deterministic_algorithms_a_run_that_goes_on_ends_nearby(
    make_config: MakeConfig, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    options = on(device, "run.amp=True", "model.dtype=bfloat16", *SIX_OF_TWELVE)
    trainer = Trainer(make_config(*options))
    trainer.train()
    unbroken = trained(trainer.folder)
    resumed = trained(train_again_from(trainer.folder, 6, make_config, options).folder)
    differ = sum(not torch.equal(resumed[name], value) for name, value in unbroken.items())
    record_property("differing", f"{differ} of {len(unbroken)}")
    print(f"parameters that differ: {differ} of {len(unbroken)}")
    assert relative(*(torch.cat([value.flatten() for value in run.values()]) for run in (resumed, unbroken))) < 5e-2


def test_a_run_in_float16_goes_on_with_the_scale_that_it_had(make_config: MakeConfig, cuda: torch.device) -> None:
    options = on(cuda, "run.amp=True", "model.dtype=float16", *SIX_OF_TWELVE)
    trainer = Trainer(make_config(*options))
    scaler: Any = trainer.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0})
    assert trainer.train().iteration == 12
    scale = scaler.get_scale()
    assert scale <= 512.0
    for path in list_checkpoints(trainer.folder / "checkpoints"):
        if path.name > "step_00000006":
            shutil.rmtree(path)
    resumed = Trainer(make_config(*options, "run.resume_ckpt_path=auto"))
    assert resumed.accelerator.scaler.get_scale() <= 512.0
    resumed.train()
    assert resumed.accelerator.scaler.get_scale() == scale
    assert all(bool(value.isfinite().all()) for value in trained(resumed.folder).values())


@pytest.mark.parametrize("options", [[], ["model.use_grad_checkpoint=True"]])
def test_a_compiled_run_learns_what_an_eager_one_does(
    options: list[str], make_config: MakeConfig, device: torch.device, tmp_path: Path
) -> None:
    losses = []
    for compiled in (False, True):
        folder = tmp_path / f"compiled_{compiled}"
        settings = [*options, "run.max_epoch=1", f"run.compile={compiled}", f"run.output_dir={folder}"]
        trainer = Trainer(make_config(*on(device, "run.amp=True", "model.dtype=bfloat16", *settings)))
        drop_nothing(trainer.model)
        trainer.train()
        losses.append([line["loss"] for line in read_log(folder) if line["event"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_worker_processes_read_data_although_the_gpu_is_in_use(make_config: MakeConfig, device: torch.device) -> None:
    torch.ones(8, device=device).sum().item()
    trainer = Trainer(make_config(*on(device, "run.num_workers=2")))
    inputs = trainer.batches()[0].model_inputs(trainer.accelerator.device)
    assert {name: tensor.device.type for name, tensor in inputs.items()} == dict.fromkeys(inputs, device.type)
    assert trainer.train().iteration == 8
    assert events(trainer.folder)[-1] == "save"


def test_a_sigterm_while_worker_processes_read_leaves_a_checkpoint(
    make_config: MakeConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def stop_in_the_second(self: Learner, group: Any, iteration: int, *rest: Any) -> Any:
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, group, iteration, *rest)

    monkeypatch.setattr(Learner, "step", stop_in_the_second)
    trainer = Trainer(make_config(*on(device, "run.num_workers=2")))
    iteration = trainer.train().iteration
    assert 1 < iteration < 8
    assert events(trainer.folder)[-2:] == ["save", "stop"]
    assert list_checkpoints(trainer.folder / "checkpoints")[-1].name == f"step_{iteration:08d}"


def test_a_feature_cache_filled_on_the_gpu_holds_what_the_cpu_gives(
    make_config: MakeConfig, device: torch.device, tmp_path: Path
) -> None:
    stores = {}
    for kind in (device.type, "again"):
        place = device.type if kind == device.type else "cpu"
        options = [
            f"run.device={place}",
            f"features.dir={tmp_path / kind}",
            f"run.output_dir={tmp_path / 'run'}_{kind}",
        ]
        trainer = Trainer(make_config(*options), for_features=True)
        encoded, bad = trainer.cache_features()
        assert (encoded > 0, bad) == (True, 0)
        stores[kind] = trainer._filler.store  # type: ignore[union-attr]
        AcceleratorState._reset_state(reset_partial_state=True)
    ours, reference = stores.values()
    keys = [path.name for path in (ours.folder / "features").rglob("*") if path.is_file()]
    assert keys
    for key in keys:
        values, wanted = ours.load(key), reference.load(key)
        assert values is not None
        assert wanted is not None
        assert float((values.values - wanted.values).norm() / wanted.values.norm()) < 1e-2


def torchrun(config_file: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run in one process that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone", "-m", RUN]
    return subprocess.run(
        [*command, str(config_file), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=180,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "environment"),
    [("MULTI_GPU", {}), ("FSDP", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})],
    ids=["DDP", "FSDP2"],
)
def test_one_process_of_torchrun_trains_over_nccl_saves_and_goes_on(
    kind: str, environment: dict[str, str], config_file: Path, cuda: torch.device, tmp_path: Path
) -> None:
    options = ["run.device=cuda", "run.amp=True", "run.iters_per_epoch=3", f"run.output_dir={tmp_path / 'run'}"]
    succeeded(torchrun(config_file, *options, "run.max_epoch=1", **environment))
    assert f"1 process(es), {kind}, nccl" in read_log(tmp_path / "run")[0]["processes"]
    first = trained(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000003"
    more = ["run.max_epoch=2", "run.resume_ckpt_path=auto"]
    succeeded(torchrun(config_file, *options, *more, **environment))
    second = trained(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000006"
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], value) for name, value in second.items())
