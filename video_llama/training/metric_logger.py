"""Write the files of a run that people read, and send its numbers to accelerate's trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from video_llama.checkpoints.trained_run import CONFIG_FILE
from video_llama.config import Config, RunConfig, save_config
from video_llama.data.batches import BadFile, BadSample
from video_llama.training.processes import from_main_process
from video_llama.utils.files import make_folder
from video_llama.utils.jsonl import append_jsonl, drop_cut_line, read_jsonl
from video_llama.utils.locks import OutputLock

__all__ = ["MetricLogger"]

logger = logging.getLogger(__name__)

_LOG, _QUARANTINE, _ANSWERS = "log.jsonl", "quarantine.jsonl", "answers.jsonl"


class MetricLogger:
    """Write `log.jsonl`, `quarantine.jsonl`, `answers.jsonl` and `config.yaml` of one run.

    Only the main process writes, except for bad samples, of which each process notes its own. A last line that a kill
    or a full disk cut off is removed here, before the next one is appended.

    Args:
        accelerator: of the run; its trackers get the numbers, too.
        folder: where the files go.
        exclusive: no other run may write to the folder meanwhile.

    Raises:
        ConfigError: there cannot be such a folder, or another run writes to it.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, exclusive: bool = False) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._writes = accelerator.is_main_process
        self._lock: OutputLock | None = None
        self._bad_files: set[tuple[str, str]] = set()
        make_folder(folder, "run.output_dir")
        if exclusive:
            from_main_process(self._hold)
        for name in (_LOG, _QUARANTINE, _ANSWERS):
            if self._writes and (folder / name).exists():
                drop_cut_line(folder / name)

    def open(self, config: Config) -> None:
        """Write the resolved configuration and start the trackers."""
        if self._writes:
            save_config(config, self._folder / CONFIG_FILE)
        if config.run.trackers:
            options = dict(vars(config.run))
            # Trackers take numbers, truth values and text only.
            for name, value in options.items():
                if not isinstance(value, (int, float, str)):
                    options[name] = str(value)
            self._start_trackers(config.run, options)

    def _start_trackers(self, run: RunConfig, options: Mapping[str, Any]) -> None:
        """Start every tracker with the names of the project and of the run; TensorBoard has a folder for each."""
        if run.run_name is None:
            self._accelerator.init_trackers(run.project, config=options)
            return
        started = []
        # accelerate gives one name to all of them, so they start one by one. W&B alone has a name for the run.
        for tracker in list(self._accelerator.log_with):
            self._accelerator.log_with, self._accelerator.trackers = [tracker], []
            name, names = f"{run.project}/{run.run_name}", {}
            if str(tracker) == "wandb":
                name, names = run.project, {"wandb": {"name": run.run_name}}
            self._accelerator.init_trackers(name, config=dict(options), init_kwargs=names)
            started += self._accelerator.trackers
        self._accelerator.trackers = started

    def close(self) -> None:
        """Let the trackers finish."""
        self._accelerator.end_training()

    def log(self, event: str, iteration: int, **values: Any) -> None:
        """Append one line to the log, and send its numbers to the trackers.

        Args:
            event: "train", "valid", "validation", "start", "resume", "abandon", "save", "skip" or "stop".
            iteration: where the run stands.

        Raises:
            ConfigError: the folder was removed or moved.
        """
        if not self._writes:
            return
        # Files that are appended to would come back without a word, but without what was in them.
        if self._lock is not None:
            self._lock.check()
        line = {"event": event, "iteration": iteration, "time": round(time.time(), 3), **values}
        append_jsonl(self._folder / _LOG, line)
        numbers = _tracked(event, values)
        if numbers and self._accelerator.trackers:
            self._accelerator.log(numbers, step=iteration)

    def log_answers(self, iteration: int, answers: Sequence[dict[str, str]]) -> None:
        """Append generated answers beside the expected ones."""
        if self._writes:
            for answer in answers:
                append_jsonl(self._folder / _ANSWERS, {"iteration": iteration, **answer})

    def log_bad_samples(self, failures: Sequence[BadSample], iteration: int, split: str = "train") -> None:
        """Append this process's samples of a split that cannot be used, with the reason; a remote file once."""
        for failure in failures:
            if isinstance(failure, BadFile):
                if (split, failure.id) in self._bad_files:
                    continue
                self._bad_files.add((split, failure.id))
            logger.warning("sample %s (%s) cannot be used: %s", failure.id, split, failure.reason)
            line = {"id": failure.id, "reason": failure.reason, "iteration": iteration, "split": split}
            append_jsonl(self._folder / _QUARANTINE, line)

    def bad_samples(self) -> list[str]:
        """Return the bad samples of the training split so far as `id: reason`, each once."""
        lines = self._read(_QUARANTINE)
        bad = (f"{line.get('id')}: {line.get('reason')}" for line in lines if line.get("split", "train") == "train")
        return list(dict.fromkeys(bad))

    def validations(self, iteration: int) -> dict[str, dict[str, Any]]:
        """Return the figures of the datasets on which the run has already validated at an iteration, by their names.

        Those of all datasets together have the name "".
        """
        found: dict[str, dict[str, Any]] = {}
        for line in reversed(list(self._read(_LOG))):
            # From here back the run had not come to this iteration yet, or left it again for an earlier checkpoint.
            if line.get("iteration", 0) < iteration:
                break
            # Lines of older versions do not say how many tokens there were: such a dataset is done again.
            if line.get("event") == "valid" and line["iteration"] == iteration and "num_tokens" in line:
                found.setdefault(str(line.get("dataset")), line)
            elif line.get("event") == "validation" and line["iteration"] == iteration:
                found.setdefault("", line)
        return found

    def _hold(self) -> None:
        self._lock = OutputLock(self._folder / ".lock", self._folder)

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of a file; one that cannot be read is reported and left out."""
        path = self._folder / name
        if path.exists():
            yield from read_jsonl(path, None)


def _tracked(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the log by the names that trackers know them by.

    `train/loss` and `valid/loss` are over all datasets, `train/NAME/loss` and `valid/NAME/loss` those of one.
    """
    # All sets together are logged as "validation".
    prefix = "valid" if event == "validation" else event
    if "dataset" in values:
        prefix = f"{prefix}/{values['dataset']}"
    numbers = {f"{prefix}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
    for name, loss in values.get("loss_by_dataset", {}).items():
        numbers[f"{prefix}/{name}/loss"] = loss
    return numbers
