"""What a run leaves to read: a JSONL log, the bad samples, generated answers, and accelerate's trackers."""

from __future__ import annotations

import dataclasses
import json
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

__all__ = ["Logbook", "Window"]

logger = logging.getLogger(__name__)

_LOG, _QUARANTINE, _ANSWERS = "log.jsonl", "quarantine.jsonl", "answers.jsonl"


class Logbook:
    """Files of one run; only the main process writes those that all share.

    Args:
        accelerator: of the run; its trackers get the numbers, too.
        folder: where the files go: `log.jsonl`, `quarantine.jsonl`, `answers.jsonl`, `config.yaml`.

    A full disk may have cut off the last line of a file; it is removed before the next one is appended.

    Raises:
        ConfigError: there cannot be such a folder.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._writes = accelerator.is_main_process
        make_folder(folder, "run.output_dir")
        if self._writes:
            for name in (_LOG, _QUARANTINE, _ANSWERS):
                _mend(folder / name)

    def open(self, config: Config) -> None:
        """Write the resolved configuration and start the trackers."""
        if self._writes:
            save_config(config, self._folder / CONFIG_FILE)
        if config.run.trackers:
            settings = {name: _plain(value) for name, value in vars(config.run).items()}
            self._accelerator.init_trackers("video_llama", config=settings)

    def close(self) -> None:
        """Let the trackers finish."""
        self._accelerator.end_training()

    def write(self, event: str, iteration: int, **values: Any) -> None:
        """One line of the log.

        Args:
            event: "train", "valid", "start", "resume", "abandon", "save", "skip", "stop".
            iteration: where the run stands.
        """
        if not self._writes:
            return
        line = {"event": event, "iteration": iteration, "time": round(time.time(), 3), **values}
        self._append(_LOG, line)
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if numbers and self._accelerator.trackers:
            self._accelerator.log(numbers, step=iteration)

    def quarantine(self, failures: Sequence[BadSample], iteration: int, split: str = "train") -> None:
        """Note samples of a split that could not be used, with the reason; every process notes its own."""
        for failure in failures:
            logger.warning("sample %s (%s) cannot be used: %s", failure.id, split, failure.reason)
            noted = {"id": failure.id, "reason": failure.reason, "iteration": iteration, "split": split}
            self._append(_QUARANTINE, noted)

    def quarantined(self) -> list[str]:
        """The bad samples of the training split so far, as lines for people, each once."""
        bad = (entry for entry in _entries(self._folder / _QUARANTINE) if entry.get("split", "train") == "train")
        return list(dict.fromkeys(f"{entry.get('id')}: {entry.get('reason')}" for entry in bad))

    def validated_at(self, iteration: int) -> set[str]:
        """The datasets on which the run has already validated where it stands.

        Lines from before the run last came to this iteration are of another course, which it left.
        """
        datasets = set()
        for line in reversed(list(_entries(self._folder / _LOG))):
            if line.get("iteration", 0) < iteration:
                break
            if line.get("event") == "valid" and line["iteration"] == iteration:
                datasets.add(str(line.get("dataset")))
        return datasets

    def answers(self, iteration: int, lines: Sequence[dict[str, str]]) -> None:
        """Generated answers beside the expected ones."""
        if self._writes:
            for line in lines:
                self._append(_ANSWERS, {"iteration": iteration, **line})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _mend(path: Path) -> None:
    """End the last line of a JSONL file, or remove it if it is cut off."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        if _read_entry(content[start:]) is not None:
            file.write(b"\n")
            return
        logger.warning("%s: the last line is cut off and is removed (%d bytes)", path, len(content) - start)
        file.truncate(start)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; one that cannot be read is told with its number, and left out."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        entry = _read_entry(line)
        if entry is None:
            logger.warning("%s, line %d: cannot be read and is left out", path, number)
        else:
            yield entry


def _read_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # half of a character included
        return None
    return entry if isinstance(entry, dict) else None


def _plain(value: Any) -> Any:
    """As trackers take it: numbers, truth values and text."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)


@dataclasses.dataclass
class Window:
    """What happened since the last line of the log.

    Args:
        losses, norms: of every step.
        lr: of the last step.
        tokens, samples, iterations: sums; tokens are those of answers.
        text_tokens, positions: of all sequences, media included: without and with padding; sums.
        flops: operations of this process, as `batch_flops` counts them.
        data_seconds: time spent waiting for data.
        started: by `time.perf_counter`.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    lr: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    iterations: int = 0
    text_tokens: float = 0.0
    positions: float = 0.0
    flops: float = 0.0
    data_seconds: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def samples_per_second(self) -> float:
        """Of all processes."""
        return self.samples / max(time.perf_counter() - self.started, 1e-9)

    def summary(
        self, iterations_left: int, *, peak_flops: float | None = None, memory: int | None = None
    ) -> dict[str, float | None]:
        """Means over the window (None if every step was skipped), speeds, and the time that is left.

        Args:
            iterations_left: of the run.
            peak_flops: what the device can do in a second, if that is known; `mfu` is the share of it that was used.
            memory: bytes of the device that were in use at most, if it is one that says so.
        """
        seconds = time.perf_counter() - self.started
        summary = {
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "grad_norm": sum(self.norms) / len(self.norms) if self.norms else None,
            "lr": self.lr,
            "samples_per_second": round(self.samples / seconds, 3),
            "tokens_per_second": round(self.text_tokens / seconds, 1),
            "answer_tokens_per_second": round(self.tokens / seconds, 1),
            "padding_share": round(1 - self.text_tokens / self.positions, 4) if self.positions else 0.0,
            "data_seconds": round(self.data_seconds, 3),
            "data_share": round(self.data_seconds / seconds, 4),
            "seconds": round(seconds, 3),
            "eta_seconds": round(iterations_left * seconds / self.iterations),
        }
        if memory is not None:
            summary["memory_gib"] = round(memory / 2**30, 3)
        if peak_flops is not None:
            summary["mfu"] = round(self.flops / seconds / peak_flops, 4)
        return summary
