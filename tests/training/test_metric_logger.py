"""Logs whose end a full disk cut off."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from scripts import plot_training
from tests.training.conftest import MakeConfig
from tests.training.test_trainer import read_log
from video_llama.data.batches import BadSample
from video_llama.errors import ConfigError
from video_llama.training.metric_logger import MetricLogger
from video_llama.training.trainer import Trainer

WHOLE = '{"event": "train", "iteration": 2, "loss": 1.5}\n'


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("torn", ['{"event": "tra', "{", '{"event": "train", "name": "é'.encode()[:-1], b"\x00\x00"])
def test_a_line_that_was_cut_off_is_removed_before_the_next_is_appended(
    torn: str | bytes, accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE.encode() + (torn.encode() if isinstance(torn, str) else torn))
    MetricLogger(accelerator, tmp_path).log("train", 4, loss=1.0)
    assert f"{path}: the last line is cut off and is removed" in caplog.text
    assert [line["iteration"] for line in read_log(tmp_path)] == [2, 4]
    assert plot_training.read_log(tmp_path).train["loss"].values == [1.5, 1.0]


def test_a_whole_line_that_only_lacks_its_end_is_kept(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(WHOLE.strip())
    MetricLogger(accelerator, tmp_path).log("train", 4, loss=1.0)
    assert [line["iteration"] for line in read_log(tmp_path)] == [2, 4]


def test_whole_files_are_left_as_they_are(accelerator: Accelerator, tmp_path: Path) -> None:
    for name in ("log.jsonl", "quarantine.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text(WHOLE)
    MetricLogger(accelerator, tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {WHOLE}


class Trackers:
    """Stands for accelerate, and keeps what its trackers are started with."""

    is_main_process = True

    def __init__(self, *names: str) -> None:
        self.log_with, self.trackers = list(names), list[str]()
        self.started: list[tuple[str, str, Any]] = []

    def init_trackers(self, project: str, config: Any, init_kwargs: Any = None) -> None:
        for name in self.log_with:
            self.started.append((name, project, (init_kwargs or {}).get(name)))
            self.trackers.append(name)


def test_trackers_get_the_names_of_the_project_and_of_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    # W&B has a name for the run; the folder of TensorBoard is made of both.
    named = ["run.trackers=[wandb,tensorboard]", "run.project=clips"]
    for options, expected in (
        (named, [("wandb", "clips", None), ("tensorboard", "clips", None)]),
        ([*named, "run.run_name=a"], [("wandb", "clips", {"name": "a"}), ("tensorboard", "clips/a", None)]),
    ):
        trackers = Trackers("wandb", "tensorboard")
        MetricLogger(trackers, tmp_path).open(make_config(*options))  # type: ignore[arg-type]
        assert trackers.started == expected
        assert trackers.trackers == ["wandb", "tensorboard"]


def test_bad_samples_noted_before_and_after_a_cut_are_listed(accelerator: Accelerator, tmp_path: Path) -> None:
    MetricLogger(accelerator, tmp_path).log_bad_samples([BadSample("a", "no such file")], 1)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"id": "b", "rea')
    metrics = MetricLogger(accelerator, tmp_path)
    metrics.log_bad_samples([BadSample("c", "truncated")], 2)
    assert metrics.bad_samples() == ["a: no such file", "c: truncated"]


def test_a_line_within_the_list_of_bad_samples_that_cannot_be_read_is_named(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = json.dumps({"id": "a", "reason": "no such file"})
    path = tmp_path / "quarantine.jsonl"
    path.write_text(f'{entry}\n{{"id": "b", "rea{entry}\n{entry}\n')
    assert MetricLogger(accelerator, tmp_path).bad_samples() == ["a: no such file"]
    assert f"{path}, line 2: not a JSON object" in caplog.text


def test_a_run_goes_on_over_a_log_that_was_cut_off(make_config: MakeConfig) -> None:
    first = Trainer(make_config("run.max_epoch=1"))
    first.train()
    with (first.folder / "log.jsonl").open("a") as file:
        file.write('{"event": "trai')
    Trainer(make_config("run.resume_ckpt_path=auto")).train()
    assert [line["iteration"] for line in read_log(first.folder) if line["event"] == "train"] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("later", "datasets"),
    [
        ([], {"clips"}),
        ([("train", 6), ("valid", 8)], {"clips"}),  # it went on, and was killed before the next checkpoint
        ([("train", 6), ("resume", 4), ("train", 6)], {"clips"}),
        ([("resume", 2)], set()),  # it went back: iteration 4 is another one now
        ([("resume", 2), ("save", 4)], set()),
    ],
)
def test_a_validation_counts_until_the_run_goes_back_before_it(
    later: list[tuple[str, int]], datasets: set[str], accelerator: Accelerator, tmp_path: Path
) -> None:
    metrics = MetricLogger(accelerator, tmp_path)
    for event, iteration in [("start", 0), ("train", 2), ("save", 4), ("valid", 4), *later]:
        metrics.log(event, iteration, **({"dataset": "clips", "num_tokens": 3} if event == "valid" else {}))
    assert metrics.validations(4).keys() == datasets


def test_a_folder_that_another_run_writes_to_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from video_llama.utils.locks import OutputLock;"
        "lock = OutputLock(Path(sys.argv[1], '.lock'), Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} on .*writes to it"):
            MetricLogger(accelerator, tmp_path, exclusive=True)
        # What does not go on with the run may use its folder.
        MetricLogger(accelerator, tmp_path).log("valid", 4, loss=1.0)
        other.kill()
    MetricLogger(accelerator, tmp_path, exclusive=True)


def test_a_folder_that_vanishes_ends_the_run(accelerator: Accelerator, tmp_path: Path) -> None:
    metrics = MetricLogger(accelerator, tmp_path / "run", exclusive=True)
    metrics.log("train", 4, loss=1.0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="removed or moved"):
        metrics.log("train", 5, loss=1.0)
