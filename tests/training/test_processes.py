"""What a launcher was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from video_llama.config import load_config
from video_llama.errors import ConfigError
from video_llama.training import processes
from video_llama.training.processes import check_processes

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
