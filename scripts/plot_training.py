"""Draw the course of one or more training runs to a PNG: loss, validation, learning rate, gradient, speed.

python scripts/plot_training.py output/visionbranch_stage1_pretrain
python scripts/plot_training.py output/a/log.jsonl output/b/log.jsonl --output compared.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from video_llama.errors import VideoLlamaError
from video_llama.training.curves import RunLog, read_log
from video_llama.utils.extras import import_extra
from video_llama.utils.files import write_whole

PANELS = (
    ("loss", "training loss"),
    ("valid", "validation loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("samples_per_second", "samples per second"),
    ("token_accuracy", "validation token accuracy"),
)


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
