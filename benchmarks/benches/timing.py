"""Time things in turns, so that a busy machine slows all alike, and say what came of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        bench: which sub-bench.
        what: is compared.
        ours, peer: medians, in `unit`.
        unit: seconds, or mebibytes.
        peer_name: what `peer` is.
        target: the ratio peer / ours that must be reached; None where nothing was promised.
        agrees: whether both gave the same result; None where there is nothing to compare.
        note: what else is worth knowing.
    """

    bench: str
    what: str
    ours: float
    peer: float
    unit: str
    peer_name: str
    target: float | None = None
    agrees: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times less ours needs."""
        return self.peer / max(self.ours, 1e-9)

    @property
    def holds(self) -> bool:
        """Whether results agree and the target is reached."""
        return self.agrees is not False and (self.target is None or self.ratio >= self.target)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio, "holds": self.holds}

    def lines(self) -> list[str]:
        """For people."""
        promised = "" if self.target is None else f" (promised {self.target:.2g})"
        agreement = {True: "agrees", False: "DISAGREES", None: ""}[self.agrees]
        figures = f"{self.ours:10.4g} {self.unit} against {self.peer:.4g} {self.unit} of {self.peer_name}"
        rows = [
            f"{self.bench:12} {self.what}",
            f"{'':12} {figures}: {self.ratio:.2f}x{promised} {agreement}",
        ]
        return [*rows, f"{'':12} {self.note}"] if self.note else rows


class Medians(dict[str, float]):
    """Median seconds on the clock of each task.

    Args:
        clock: by task.
        processor: median seconds of all processors of this process, by task. On a busy machine they say what the
            clock cannot, if no task leaves work to other processes or waits for them.
    """

    def __init__(self, clock: Mapping[str, float], processor: Mapping[str, float]) -> None:
        super().__init__(clock)
        self.processor = dict(processor)

    def processor_ratio(self, ours: str, peer: str) -> str:
        """For a note."""
        return f"{self.processor[peer] / max(self.processor[ours], 1e-9):.2f}x by processor seconds"


def alternate(tasks: Mapping[str, Callable[[], Any]], repeats: int) -> Medians:
    """Median seconds of each task; every round runs all of them, after one that is not counted."""
    for task in tasks.values():
        task()
    clock: dict[str, list[float]] = {name: [] for name in tasks}
    processor: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(repeats):
        names = list(tasks) if number % 2 == 0 else list(reversed(tasks))
        for name in names:
            start, worked = time.perf_counter(), time.process_time()
            tasks[name]()
            clock[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - worked)
    medians = [
        {name: statistics.median(values) for name, values in measured.items()} for measured in (clock, processor)
    ]
    return Medians(*medians)


def gemm_task(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A matrix product of this size, to be timed beside what is bound by such products, and its operations."""
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return lambda: torch.nn.functional.linear(left, right), 2.0 * rows * inner * columns


# Linux counts into a process's ru_maxrss what its parent had; VmHWM is its own.
_REPORT = """
import pathlib, resource, psutil
status = pathlib.Path("/proc/self/status")
lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
kib = lines["VmHWM"].split()[0] if "VmHWM" in lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(psutil.Process().memory_info().rss / 2**20, int(kib) / 2**10)
"""


def memory_of(code: str, *arguments: object) -> tuple[float, float]:
    """(resident, peak) mebibytes of a fresh interpreter that runs `code`; its arguments are in `sys.argv`."""
    return output_of(code, *arguments)[1:]


def output_of(code: str, *arguments: object) -> tuple[str, float, float]:
    """The last line that `code` prints in a fresh interpreter, and the interpreter's (resident, peak) mebibytes."""
    command = [sys.executable, "-c", code + _REPORT, *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    *printed, memory = done.stdout.strip().splitlines()
    resident, peak = memory.split()
    return printed[-1] if printed else "", float(resident), float(peak)


def relative_difference(ours: torch.Tensor, peer: torch.Tensor) -> float:
    """Norm of the difference over the norm of the peer's."""
    return float((ours.float() - peer.float()).norm() / peer.float().norm())
