"""How time and memory grow with frames, clips, turns, tokens and the length of a file.

Each size is measured in a process of its own (`growth_tasks.py`), so that no size inherits the memory of another.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.benches.timing import ROOT

NOISE_MIB = 16.0  # memory that allocators keep or give back as they like
CHUNK = {"frames": 32, "clips": 32, "windows": 960}  # beyond so many, memory must not grow
SIZES: dict[str, dict[str, list[int]]] = {
    "full": {
        "frames": [8, 16, 32, 64, 128, 256],
        "clips": [1, 8, 32, 64, 128, 256],
        "turns": [16],
        "context": [128, 256, 512, 1024, 2048, 4096],
        "file": [10, 60, 600, 3600],
        "windows": [600, 1200, 2400, 4800],
    },
    "tiny": {
        "frames": [2, 64],
        "clips": [1, 4],
        "turns": [4],
        "context": [64, 128],
        "file": [4, 20],
        "windows": [4, 8],
    },
}
UNITS = {
    "frames": "frames of one video, encoded",
    "clips": "clips, captioned",
    "turns": "th turn of a conversation",
    "context": "tokens of a prompt, read by the language model",
    "file": "s of a video with sound, of which 8 frames and 8 segments are read",
    "windows": "s of a video with sound, read in windows of 60 s",
}


@dataclass(frozen=True)
class Bounds:
    """The largest exponents that were promised; None where nothing was."""

    time: float | None = None
    memory: float | None = None


# "At most linear" and "flat", with room for what a noisy machine adds.
BOUNDS = {
    "frames": Bounds(1.05, 0.2),
    "clips": Bounds(1.05, 0.2),
    "turns": Bounds(0.2, None),
    "context": Bounds(),
    "file": Bounds(0.2, 0.2),
    "windows": Bounds(1.05, 0.2),
}


@dataclass(frozen=True)
class Growth:
    """One cost against one size.

    Args:
        bench: "growth".
        what: what grows.
        sizes: of each measurement.
        seconds: median time at each size.
        mebibytes: peak memory at each size beyond what was there before, the loaded model for example.
        time_exponent, memory_exponent: of size, fitted; memory beyond the chunk only. None for a single size.
        target: what was promised.
        agrees: whether the results were right.
        note: what else is worth knowing.
    """

    bench: str
    what: str
    sizes: list[int]
    seconds: list[float]
    mebibytes: list[float]
    time_exponent: float | None
    memory_exponent: float | None
    target: Bounds | None
    agrees: bool | None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether results are right and no exponent exceeds what was promised."""
        limits = self.target or Bounds()
        pairs = ((self.time_exponent, limits.time), (self.memory_exponent, limits.memory))
        exceeds = any(found is not None and limit is not None and found > limit for found, limit in pairs)
        return self.agrees is not False and not exceeds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "holds": self.holds}

    def lines(self) -> list[str]:
        """For people."""
        limits = self.target or Bounds()
        columns = [f"{size:>9}" for size in self.sizes]
        rows = [
            f"{self.bench:12} {self.what}: time ~ size^{_shown(self.time_exponent, limits.time)}, "
            f"memory ~ size^{_shown(self.memory_exponent, limits.memory)}"
            f"{'' if self.agrees is None else ' agrees' if self.agrees else ' DISAGREES'}",
            f"{'':12} {'size':8}" + "".join(columns),
            f"{'':12} {'seconds':8}" + "".join(f"{value:9.3g}" for value in self.seconds),
            f"{'':12} {'MiB':8}" + "".join(f"{value:9.0f}" for value in self.mebibytes),
        ]
        return [*rows, f"{'':12} {self.note}"] if self.note else rows


def _shown(exponent: float | None, limit: float | None) -> str:
    promised = "" if limit is None else f" (promised {limit:g} at most)"
    return f"{'?' if exponent is None else f'{exponent:.2f}'}{promised}"


def fit_exponent(sizes: Sequence[float], costs: Sequence[float], floor: float = 1e-9) -> float | None:
    """The slope of log cost over log size by least squares; None for fewer than two sizes.

    Args:
        floor: costs below it count as much.
    """
    points = [(math.log(size), math.log(max(cost, floor))) for size, cost in zip(sizes, costs, strict=True)]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope


def measure(task: str, size: int, model_size: str, repeats: int, folder: Path, threads: int) -> dict[str, Any]:
    """What `growth_tasks.py` prints in a process of its own: seconds, mebibytes, agrees."""
    command = [sys.executable, "-m", "benchmarks.benches.growth_tasks", task, str(size), model_size]
    command += [str(repeats), str(folder.resolve()), str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} at size {size}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run(size: str, repeats: int, folder: Path, threads: int, costs: Sequence[str] | None = None) -> Iterator[Growth]:
    """Measure the costs, or all of them, at every size."""
    for cost in costs or UNITS:
        yield _grow(cost, size, repeats, folder, threads)


def _grow(task: str, model_size: str, repeats: int, folder: Path, threads: int) -> Growth:
    measured = [measure(task, size, model_size, repeats, folder, threads) for size in SIZES[model_size][task]]
    if task == "turns":  # one process goes through all turns
        only = measured[0]
        sizes, seconds, mebibytes = list(range(1, len(only["seconds"]) + 1)), only["seconds"], only["mebibytes"]
        first = 1  # the first turn reads the media, too
    else:
        sizes = [int(result.get("size", size)) for result, size in zip(measured, SIZES[model_size][task], strict=True)]
        seconds, mebibytes = ([result[key] for result in measured] for key in ("seconds", "mebibytes"))
        first = 0
    beyond = [number for number, size in enumerate(sizes) if size >= CHUNK.get(task, 0) and number >= first]
    verdicts = [result["agrees"] for result in measured if result["agrees"] is not None]
    return Growth(
        "growth",
        f"{sizes[0]} to {sizes[-1]} {UNITS[task]}",
        sizes,
        seconds,
        mebibytes,
        fit_exponent(sizes[first:], seconds[first:]),
        fit_exponent([sizes[number] for number in beyond], [mebibytes[number] for number in beyond], NOISE_MIB),
        BOUNDS[task],
        all(verdicts) if verdicts else None,
        next((result["note"] for result in measured if result.get("note")), ""),
    )
