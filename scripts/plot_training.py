"""Draw the course of one or more training runs to a PNG: loss, validation, learning rate, gradient, speed.

python scripts/plot_training.py output/visionbranch_stage1_pretrain
python scripts/plot_training.py output/a/log.jsonl output/b/log.jsonl --output compared.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_llama.errors import DatasetError, VideoLlamaError
from video_llama.utils.extras import import_extra
from video_llama.utils.files import write_whole
from video_llama.utils.jsonl import read_jsonl

PANELS = (
    ("loss", "training loss"),
    ("valid", "validation loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("samples_per_second", "samples per second"),
    ("token_accuracy", "validation token accuracy"),
)


@dataclass
class Curve:
    """One figure over the course of a run; both lists have equal length, and iterations ascend."""

    iterations: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class RunLog:
    """The curves of a log.

    Args:
        train: by figure: loss, lr, grad_norm, samples_per_second and others.
        valid: by dataset and figure.
        resumed: iterations at which the run was continued.
    """

    train: dict[str, Curve]
    valid: dict[str, dict[str, Curve]]
    resumed: list[int]


def read_log(path: Path) -> RunLog:
    """Read the curves of a run.

    A run that was killed, or that went back to an earlier checkpoint, has logged iterations that it then did again.
    Of these the last ones count: each "resume" drops what was logged after the iteration it names.

    Args:
        path: `log.jsonl`, or the folder it is in.

    Raises:
        DatasetError: there is no log, a line is not of a log, or nothing is logged yet.
    """
    if path.is_dir():
        path = path / "log.jsonl"
    train: dict[int, dict[str, Any]] = {}
    valid: dict[str, dict[int, dict[str, Any]]] = {}
    resumed = []
    for line in _read_log_lines(path):
        event, iteration = line["event"], line["iteration"]
        if event == "train":
            train[iteration] = line
        elif event == "valid":
            valid.setdefault(line["dataset"], {})[iteration] = line
        elif event == "resume":
            resumed.append(iteration)
            for entries in (train, *valid.values()):
                for later in [number for number in entries if number > iteration]:
                    del entries[later]
    valid_curves = {name: _curves(entries) for name, entries in valid.items() if entries}
    if not train and not valid_curves:
        raise DatasetError(f"{path}: no iteration is logged yet")
    return RunLog(_curves(train), valid_curves, resumed)


def _read_log_lines(path: Path) -> Iterator[dict[str, Any]]:
    what = "line of a training log"
    try:
        for number, line in enumerate(read_jsonl(path, DatasetError, what), start=1):
            if "event" not in line or not isinstance(line.get("iteration"), int):
                raise DatasetError(f"{path}, line {number}: not a {what}")
            yield line
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


def _curves(lines: dict[int, dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for iteration, line in sorted(lines.items()):
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name not in ("iteration", "time"):
                curve = curves.setdefault(name, Curve())
                curve.iterations.append(iteration)
                curve.values.append(float(value))
    return curves


def draw(logs: dict[str, RunLog], output: Path) -> None:
    """Draw the runs, each in a colour of its own, one panel for each figure."""
    import_extra("matplotlib", "drawing").use("Agg")
    pyplot = import_extra("matplotlib.pyplot", "drawing")

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    colours = [f"C{number}" for number in range(10)]
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        for number, (label, log) in enumerate(logs.items()):
            draw_panel(axis, name, log, label, colours[number % len(colours)])
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="grey")
    write_whole(output, lambda partial: figure.savefig(partial, dpi=120, format="png"), durable=False)
    pyplot.close(figure)


def draw_panel(axis: Any, name: str, log: RunLog, label: str, colour: str) -> None:
    """One figure of one run; dotted lines are where it was resumed."""
    if name in ("valid", "token_accuracy"):
        key = "loss" if name == "valid" else name
        for dataset, curves in log.valid.items():
            if key in curves:
                curve = curves[key]
                axis.plot(curve.iterations, curve.values, marker="o", ms=3, label=f"{label}: {dataset}")
        return
    if name in log.train:
        curve = log.train[name]
        marker = "o" if len(curve.values) < 30 else None
        axis.plot(curve.iterations, curve.values, color=colour, marker=marker, ms=3, lw=1.2, label=label)
        for iteration in log.resumed:
            axis.axvline(iteration, color=colour, ls=":", lw=0.8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl, or the output_dir of a run")
    parser.add_argument("--output", type=Path, metavar="PNG", help="where to (training.png beside the first log)")
    arguments = parser.parse_args(argv)
    try:
        labels = {str(path.parent.name if path.suffix else path.name): path for path in arguments.logs}
        if len(labels) < len(arguments.logs):
            labels = {str(path): path for path in arguments.logs}
        first = arguments.logs[0]
        output = arguments.output or (first if first.is_dir() else first.parent) / "training.png"
        draw({label: read_log(path) for label, path in labels.items()}, output)
    except (VideoLlamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
