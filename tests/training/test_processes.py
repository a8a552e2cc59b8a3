"""What a launcher was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.conftest import MakeConfig
from video_llama.config import load_config
from video_llama.errors import ConfigError
from video_llama.training import processes
from video_llama.training.processes import build_accelerator, check_launcher, check_processes

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
        build_accelerator(make_config().run)
