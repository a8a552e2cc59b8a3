"""One run of a comparison: trained, measured and asked; and the table and the plot of all of them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.cli.evaluate import evaluate
from video_llama.config import Config
from video_llama.errors import ConfigError
from video_llama.utils.extras import import_extra
from video_llama.utils.jsonl import read_jsonl

__all__ = ["ComparedRun", "draw_plot", "format_results", "measure_run", "peak_memory"]

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class ComparedRun:
    """One training of a comparison.

    Args:
        name: of its configuration.
        config: as it is trained, with the seed and the folders of this run.
        asked: options of `video-llama evaluate`, without the model.
    """

    name: str
    config: Config
    asked: argparse.Namespace

    @property
    def identity(self) -> dict[str, Any]:
        """Return what tells this run from others, with a fingerprint of all its settings."""
        settings = [dataclasses.asdict(self.config), {**vars(self.asked), "model": None}]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        return {"name": self.name, "seed": self.config.run.seed, "settings": digest[:16]}


def measure_run(run: ComparedRun) -> dict[str, Any]:
    """Train, or go on with a training, and ask the held-out questions; for a process of its own, whose peak counts.

    Returns:
        values of JSON: the identity of the run, sizes, times, and the figures of `evaluate` by name.
    """
    import torch

    from video_llama.training.trainer import Trainer

    threading.Thread(target=_end_with_parent, daemon=True).start()
    trainer = Trainer(run.config)
    is_cached = run.config.features.dir is not None
    if is_cached:
        # All at once, so that the times below are those of what trains.
        trainer.cache_features()
    begun, cpu_begun = trainer.state.iteration, time.process_time()
    iterations = trainer.train().iteration
    # The machine may have had other work: the time of the processor does not count that.
    cpu_seconds = (time.process_time() - cpu_begun) / max(iterations - begun, 1)
    lines = read_jsonl(trainer.folder / "log.jsonl", ConfigError)
    seconds = sum(line["seconds"] for line in lines if line["event"] == "train")
    parameters = dict(trainer.model.named_parameters())
    measured = {
        "steps": iterations,
        "seconds_per_step": round(seconds / iterations, 4),
        "cpu_seconds_per_step": round(cpu_seconds, 4),
        "parameters": sum(weight.numel() for weight in parameters.values()),
        "trained_parameters": sum(weight.numel() for weight in parameters.values() if weight.requires_grad),
        "memory_bytes": peak_memory(trainer.accelerator.device),
        "cache_bytes": None,
        "device": str(trainer.accelerator.device),
        "torch": torch.__version__,
    }
    if is_cached:
        assert run.config.features.dir is not None
        measured["cache_bytes"] = _size_of(Path(run.config.features.dir))
    # The weights are read again from the folder of the run, as its user would.
    report = evaluate(argparse.Namespace(**{**vars(run.asked), "model": str(trainer.folder)}))
    return {**run.identity, **measured, "questions": len(report["answers"]), "figures": _figures(report)}


def _end_with_parent() -> None:
    """End this process when the one that waits for its result is gone: a new one could not go on with the training."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def peak_memory(device: Any) -> int | None:
    """Return the most bytes in use so far: of a GPU, or of this process; None where the system does not say."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts into `ru_maxrss` what the process had that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows has none.
        return None
    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a report of `evaluate` by name."""
    if "metrics" in report:
        return dict(report["metrics"])
    return {row["name"]: row["accuracy"] for row in report["rows"]}


def format_results(results: Sequence[Mapping[str, Any]], figure: str) -> str:
    """Return a table in Markdown: a row for each configuration, means over its seeds.

    Args:
        results: what `measure_run` returned, in any order.
        figure: which of the figures is shown, its mean and that of each seed.
    """
    head = f"| configuration | {figure} | of each seed | trained parameters | s/step | CPU s/step | memory | cache |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name, runs in _by_name(results).items():
        shares = [run["figures"][figure] for run in runs]
        cells = [
            name,
            f"{statistics.mean(shares):.1%}",
            ", ".join(f"{share:.1%}" for share in shares),
            f"{runs[0]['trained_parameters']:,}",
            *(
                f"{statistics.mean(run[key] for run in runs):.3f}"
                for key in ("seconds_per_step", "cpu_seconds_per_step")
            ),
            _in_unit([run["memory_bytes"] for run in runs], GIB, "GiB"),
            _in_unit([run["cache_bytes"] for run in runs], MIB, "MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_plot(results: Sequence[Mapping[str, Any]], figure: str, path: Path) -> None:
    """Draw the figure of each run over the time of its steps, one colour for each configuration.

    Raises:
        ConfigError: matplotlib, the extra `plots`, is not installed.
    """
    image = import_extra("matplotlib.figure", "--plot").Figure(figsize=(7, 4), layout="constrained")
    axes = image.subplots()
    for name, runs in _by_name(results).items():
        seconds = [run["cpu_seconds_per_step"] for run in runs]
        axes.scatter(seconds, [run["figures"][figure] for run in runs], label=name)
    axes.set(xlabel="CPU seconds per step", ylabel=figure)
    axes.legend()
    image.savefig(path)


def _by_name(results: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of each configuration, in order of their seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(results, key=lambda run: run["seed"]):
        found.setdefault(run["name"], []).append(run)
    return dict(sorted(found.items()))


def _in_unit(sizes: Sequence[int | None], unit: int, name: str) -> str:
    known = [size for size in sizes if size is not None]
    return f"{max(known) / unit:.2f} {name}" if known else ""
