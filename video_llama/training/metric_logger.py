"""Write the files of a run that people read, and send its numbers to accelerate's trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from video_llama.checkpoints.trained_run import CONFIG_FILE
from video_llama.config import Config, save_config
from video_llama.data.batches import BadSample
from video_llama.utils.files import make_folder
from video_llama.utils.jsonl import append_jsonl, drop_cut_line, read_jsonl

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

    Raises:
        ConfigError: there cannot be such a folder.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._writes = accelerator.is_main_process
        make_folder(folder, "run.output_dir")
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
            self._accelerator.init_trackers("video_llama", config=options)

    def close(self) -> None:
        """Let the trackers finish."""
        self._accelerator.end_training()

    def log(self, event: str, iteration: int, **values: Any) -> None:
        """Append one line to the log, and send its numbers to the trackers.

        Args:
            event: "train", "valid", "start", "resume", "abandon", "save", "skip" or "stop".
            iteration: where the run stands.
        """
        if not self._writes:
            return
        line = {"event": event, "iteration": iteration, "time": round(time.time(), 3), **values}
        append_jsonl(self._folder / _LOG, line)
        # Trackers know numbers by event and name, such as train/loss.
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if numbers and self._accelerator.trackers:
            self._accelerator.log(numbers, step=iteration)

    def log_answers(self, iteration: int, answers: Sequence[dict[str, str]]) -> None:
        """Append generated answers beside the expected ones."""
        if self._writes:
            for answer in answers:
                append_jsonl(self._folder / _ANSWERS, {"iteration": iteration, **answer})

    def log_bad_samples(self, failures: Sequence[BadSample], iteration: int, split: str = "train") -> None:
        """Append this process's samples of a split that cannot be used, with the reason."""
        for failure in failures:
            logger.warning("sample %s (%s) cannot be used: %s", failure.id, split, failure.reason)
            line = {"id": failure.id, "reason": failure.reason, "iteration": iteration, "split": split}
            append_jsonl(self._folder / _QUARANTINE, line)

    def bad_samples(self) -> list[str]:
        """Return the bad samples of the training split so far as `id: reason`, each once."""
        lines = self._read(_QUARANTINE)
        bad = (f"{line.get('id')}: {line.get('reason')}" for line in lines if line.get("split", "train") == "train")
        return list(dict.fromkeys(bad))

    def validated_datasets(self, iteration: int) -> set[str]:
        """Return the datasets on which the run has already validated at an iteration."""
        datasets = set()
        for line in reversed(list(self._read(_LOG))):
            # From here back the run had not come to this iteration yet, or left it again for an earlier checkpoint.
            if line.get("iteration", 0) < iteration:
                break
            if line.get("event") == "valid" and line["iteration"] == iteration:
                datasets.add(str(line.get("dataset")))
        return datasets

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of a file; one that cannot be read is reported and left out."""
        path = self._folder / name
        if path.exists():
            yield from read_jsonl(path, None)
