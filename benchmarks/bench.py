#!/usr/bin/env python
"""Measure what the project promises to be fast or small, each against what a user would otherwise take.

    python benchmarks/bench.py all                       # published widths; leave the machine alone meanwhile
    python benchmarks/bench.py decode vision --repeats 7 --json bench.json
    python benchmarks/bench.py all --size tiny --repeats 1 --clips 4    # only whether it works

What is compared runs in turns in one process, so that a busy machine slows all alike; figures are medians, and
results are checked to agree. A ratio above 1 means that ours needs less. The exit status is 1 if results disagree;
with --strict also if a ratio falls short of what was promised for the size `full`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))


def _decode(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.decode import run

    return run(arguments.size, arguments.repeats, arguments.work)


def _vision(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.encoders import run_vision

    return run_vision(arguments.size, arguments.repeats, arguments.work)


def _audio(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.encoders import run_audio

    return run_audio(arguments.size, arguments.repeats, arguments.work)


def _second_turn(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.language import run_second_turn

    return run_second_turn(arguments.size, arguments.repeats, arguments.work)


def _captioning(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.language import run_captioning

    sizes = (arguments.clips, arguments.workers, arguments.batch_size)
    return run_captioning(arguments.size, arguments.repeats, arguments.work, *sizes)


def _loading(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.loading import run_loading

    return run_loading(arguments.size, arguments.repeats, arguments.work)


def _tokens(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.loading import run_tokens

    return run_tokens(arguments.size, arguments.repeats, arguments.work)


def _growth(arguments: argparse.Namespace) -> Iterable[Any]:
    from benchmarks.benches.growth import run

    return run(arguments.size, arguments.repeats, arguments.work, arguments.threads, arguments.of)


def _real_size(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.benches.real_size import run

    return run(arguments.size, arguments.work, arguments.threads, arguments.checkpoint)


BENCHES: dict[str, Callable[[argparse.Namespace], Iterable[Any]]] = {
    "decode": _decode,
    "vision": _vision,
    "audio": _audio,
    "second-turn": _second_turn,
    "captioning": _captioning,
    "loading": _loading,
    "tokens": _tokens,
    "growth": _growth,
    "real-size": _real_size,
}

BY_NAME_ONLY = {"real-size"}  # writes 16 GB and needs as much memory
COSTS = ("frames", "clips", "turns", "context", "file", "windows")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="+", choices=[*BENCHES, "all"], metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="published widths, or a trial (full)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds that are counted (5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch (2)")
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="clips to caption (64)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode for captioning (2)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips captioned together (8)")
    parser.add_argument("--of", nargs="+", choices=COSTS, metavar="COST", help="growth of: " + ", ".join(COSTS))
    parser.add_argument(
        "--work", type=Path, default=Path("output/bench"), help="clips and random weights are kept here"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="for real-size: one that is there, instead of random weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--strict", action="store_true", help="fail if a promised ratio is not reached")
    return parser


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    import torch

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    names = (
        [name for name in BENCHES if name not in BY_NAME_ONLY]
        if "all" in arguments.benches
        else list(dict.fromkeys(arguments.benches))
    )
    rows: list[Any] = []
    for name in names:
        for row in BENCHES[name](arguments):
            rows.append(row if arguments.size == "full" else dataclasses.replace(row, target=None))
            print("\n".join(rows[-1].lines()), flush=True)
    if arguments.json:
        content = {"machine": machine, "size": arguments.size, "rows": [row.as_dict() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    failed = [row for row in rows if row.agrees is False or (arguments.strict and not row.holds)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
