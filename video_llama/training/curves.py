"""Read the log of a run for drawing it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_llama.errors import DatasetError

__all__ = ["Curve", "RunLog", "read_log"]


@dataclass
class Curve:
    """One figure over the course of a run.

    Args:
        iterations, values: of equal length, ascending.
    """

    iterations: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class RunLog:
    """What a log says.

    Args:
        train: by figure: loss, lr, grad_norm, samples_per_second.
        valid: by dataset and figure.
        resumed: where the run was continued.
    """

    train: dict[str, Curve]
    valid: dict[str, dict[str, Curve]]
    resumed: list[int]


def read_log(path: Path) -> RunLog:
    """The curves of a run.

    A run that was killed, or that went back to an earlier checkpoint, has logged iterations that it then did again:
    what it logged past the point where it was continued does not count.

    Args:
        path: `log.jsonl`, or the folder it is in.

    Raises:
        DatasetError: no log there, a line that is none, or nothing to draw.
    """
    file = path / "log.jsonl" if path.is_dir() else path
    lines = list(_lines(file))
    train: dict[int, dict[str, Any]] = {}
    valid: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["event"] == "resume":
            for entries in (train, *valid.values()):
                for iteration in [number for number in entries if number > line["iteration"]]:
                    del entries[iteration]
        elif line["event"] == "train":
            train[line["iteration"]] = line
        elif line["event"] == "valid":
            valid.setdefault(line["dataset"], {})[line["iteration"]] = line
    valid = {name: entries for name, entries in valid.items() if entries}
    if not train and not valid:
        raise DatasetError(f"{file}: no iteration is logged yet")
    resumed = [line["iteration"] for line in lines if line["event"] == "resume"]
    return RunLog(_curves(train.values()), {name: _curves(entry.values()) for name, entry in valid.items()}, resumed)


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error})") from error
    entries = text.splitlines()
    for number, entry in enumerate(entries, start=1):
        try:
            line = json.loads(entry)
            yield {"event": line["event"], "iteration": int(line["iteration"]), **line}
        except (ValueError, KeyError, TypeError) as error:
            if number < len(entries):  # the last one may be cut off by a kill
                raise DatasetError(f"{file}, line {number}: not a line of a training log") from error


def _curves(lines: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in sorted(lines, key=lambda line: line["iteration"]):
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name not in ("iteration", "time"):
                curve = curves.setdefault(name, Curve())
                curve.iterations.append(line["iteration"])
                curve.values.append(float(value))
    return curves
