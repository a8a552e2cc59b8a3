"""What a launcher was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from video_llama.config import load_config
from video_llama.errors import ConfigError
from video_llama.training import processes
from video_llama.training.processes import (
    build_accelerator,
    check_launcher,
    check_processes,
    mixed_precision,
    training_device,
)
from video_llama.training.settings import check_settings

ONE = SimpleNamespace(num_processes=1)
LAUNCH = ["python", "/bin/accelerate", "launch"]

Check = Callable[..., None]


@pytest.fixture
def check(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Check one process that a process with that command line started."""
    asked = tmp_path / "asked.yaml"
    asked.write_text("distributed_type: 'NO'\nnum_processes: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "default_config_file", str(tmp_path / "default.yaml"))

    def run(*words: str) -> None:
        parent = SimpleNamespace(cmdline=lambda: list(words))
        monkeypatch.setattr(processes.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
        check_processes(ONE, load_config(config_file).run)

    return run


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([*LAUNCH, "--num_processes", "2", "train.py"], 2),
        ([*LAUNCH, "--num-processes=2", "train.py"], 2),
        (["python", "-m", "accelerate.commands.launch", "--num_processes=2", "train.py"], 2),
        ([*LAUNCH, "--config_file", "asked.yaml", "train.py"], 3),
        ([*LAUNCH, "--config_file=asked.yaml", "--num_processes", "2", "train.py"], 2),
    ],
)
def test_one_process_where_the_launcher_was_asked_for_more_is_an_error(
    words: list[str], count: int, check: Check
) -> None:
    with pytest.raises(ConfigError, match=f"{count} processes were asked for, but this run has 1"):
        check(*words)


def test_the_configuration_that_accelerate_takes_by_itself_counts_too(check: Check, tmp_path: Path) -> None:
    check(*LAUNCH, "train.py")
    (tmp_path / "asked.yaml").rename(tmp_path / "default.yaml")
    with pytest.raises(ConfigError, match="3 processes were asked for"):
        check(*LAUNCH, "train.py")


@pytest.mark.parametrize(
    "words", [["bash"], ["make", "--num_processes", "2"], [*LAUNCH, "--num_processes", "1", "x"], []]
)
def test_one_process_is_right_where_nothing_else_was_asked_for(words: list[str], check: Check) -> None:
    check(*words)


SLURM_STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Look at an environment in which nothing but these variables speaks of a launcher."""

    def run(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "PMI_", "OMPI_", "MV2_", "MPI_")) or name in ("WORLD_SIZE", "MASTER_ADDR"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        check_launcher()

    return run


@pytest.mark.parametrize("left_out", ["", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_NTASKS"])
def test_several_tasks_of_srun_without_a_launcher_are_refused(left_out: str, launched: Any) -> None:
    with pytest.raises(ConfigError, match=r"srun started 4 tasks.*--ntasks-per-node=1 torchrun"):
        launched({name: value for name, value in SLURM_STEP.items() if name != left_out})


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},  # a batch script
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 within a larger allocation
        {**SLURM_STEP, "WORLD_SIZE": "8"},  # torchrun within srun
        {"PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},  # accelerate makes one run of these
        {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "first"},
    ],
)
def test_what_can_be_one_run_is_not_refused(variables: dict[str, str], launched: Any) -> None:
    launched(variables)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_that_do_not_know_each_other_are_refused(variable: str, launched: Any) -> None:
    with pytest.raises(ConfigError, match=r"MPI started 2 processes.*start it with torchrun"):
        launched({variable: "2"})


def test_processes_of_mpi_that_accelerate_makes_nothing_of_are_found_out(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were asked for, but this run has 1"):
        check("mpirun", "-n", "2", "python", "train.py")


def test_tasks_of_srun_are_refused_before_accelerate_sets_anything_up(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "Accelerator", pytest.fail)
    with pytest.raises(ConfigError, match="srun started 4 tasks"):
        build_accelerator(make_config().run, "auto")


HALF = {"bf16": (True, True), "fp16": (True, False), "cpu": (False, False)}  # a GPU there? does it compute in bfloat16?


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let torch see a GPU of one kind or another, or none."""

    def see(kind: str) -> None:
        has_gpu, computes_bfloat16 = HALF[kind]
        monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
        monkeypatch.setattr("torch.cuda.device_count", lambda: int(has_gpu))
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: computes_bfloat16)
        monkeypatch.setattr("video_llama.utils.devices._cpu_computes_bfloat16", lambda: False)

    return see


@pytest.mark.parametrize(
    ("kind", "dtype", "amp", "expected"),
    [
        ("bf16", "auto", True, "bf16"),
        ("bf16", "bfloat16", True, "bf16"),
        ("bf16", "float16", True, "fp16"),
        ("bf16", "float32", True, "no"),
        ("bf16", "auto", False, "no"),
        ("bf16", torch.bfloat16, True, "bf16"),
        ("fp16", "auto", True, "fp16"),
        ("fp16", "float32", True, "no"),
        ("cpu", "auto", True, "no"),
        ("cpu", "bfloat16", True, "bf16"),
        ("cpu", "bfloat16", False, "no"),
    ],
)
def test_autocast_has_the_precision_of_the_frozen_weights(
    kind: str, dtype: Any, amp: bool, expected: str, on_device: Any, make_config: MakeConfig
) -> None:
    on_device(kind)
    assert mixed_precision(make_config("run.device=null", f"run.amp={amp}").run, dtype) == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "amp", "message"),
    [
        ("bf16", "float16", False, "float16 trains on a GPU with run.amp: True only"),
        ("fp16", "auto", False, "float16 trains on a GPU with run.amp: True only"),
        ("cpu", "float16", True, "float16 trains on a GPU with run.amp: True only"),
        ("fp16", "bfloat16", True, "this GPU does not compute in bfloat16"),
    ],
)
def test_a_precision_that_cannot_train_is_refused(
    kind: str, dtype: str, amp: bool, message: str, on_device: Any, make_config: MakeConfig
) -> None:
    on_device(kind)
    config = make_config("run.device=null", f"run.amp={amp}", f"model.dtype={dtype}")
    with pytest.raises(ConfigError, match=message):
        check_settings(config)


def test_float32_weights_are_not_cast_and_the_run_says_so(
    on_device: Any, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_device("bf16")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(processes, "Accelerator", lambda **options: asked.update(options) or ONE)
    build_accelerator(make_config("run.device=null", "run.amp=True").run, "float32")
    assert asked["mixed_precision"] == "no"
    assert not asked["cpu"]
    assert caplog.text.count("run.amp has no effect") == 1
    build_accelerator(make_config("run.device=null", "run.amp=False").run, "float32")
    assert caplog.text.count("run.amp has no effect") == 1


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_that_training_does_not_run_on_are_refused(
    device: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.xpu.is_available", lambda: True)
    with pytest.raises(ConfigError, match=f"run.device: .*{device}"):
        check_settings(make_config(f"run.device={device}"))


def test_a_mac_trains_on_its_cpu_unless_told_otherwise(
    on_device: Any, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device("cpu")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert training_device(make_config("run.device=null").run) == torch.device("cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"FSDP 1, accelerate's default.*--use_fsdp --fsdp_version 2"),
        ({"FSDP_VERSION": "1"}, "FSDP 1, accelerate's default"),
        (
            {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "cpu_ram_efficient_loading is not supported.*--fsdp_cpu_ram_efficient_loading false",
        ),
    ],
)
def test_ways_of_fsdp_that_do_not_work_are_refused_with_the_command_that_does(
    variables: dict[str, str], message: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in ("FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "Accelerator", pytest.fail)
    with pytest.raises(ConfigError, match=message):
        build_accelerator(make_config().run, "auto")
