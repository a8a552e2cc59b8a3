#!/usr/bin/env python
"""Measure the published size on one GPU, beside what a user would otherwise take, on the same card in the same run.

python benchmarks/gpu.py --output output/gpu                              # everything, at most eight minutes
python benchmarks/gpu.py --output output/gpu --sections encoders,decode=90     # with 90 s for the second
python benchmarks/gpu.py --output output/rehearsal --rehearse             # on a CPU, at tiny size

Weights are random, ViT-g with both branches and a LLaMA of 7 billion parameters in bfloat16, made on the device.
Each section appends one line to OUTPUT/gpu.jsonl when it ends, whether it succeeded, failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

BUDGETS = {
    "card": 20.0,
    "model": 40.0,
    "encoders": 40.0,
    "decode": 110.0,
    "captions": 100.0,
    "files": 50.0,
    "kv": 20.0,
    "memory": 10.0,
    "training": 90.0,
}
"""Seconds of each section, in the order in which they run unless `--sections` says otherwise."""
GRACE_SECONDS = 60.0
MODULES = {
    **dict.fromkeys(("card", "model", "encoders"), "benchmarks.encoding"),
    **dict.fromkeys(("decode", "captions", "files", "kv", "memory"), "benchmarks.answering"),
    "training": "benchmarks.learning",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="every section on the CPU at tiny size")
    parser.add_argument(
        "--sections",
        default=",".join(BUDGETS),
        metavar="NAME[=SECONDS],…",
        help=f"which, in which order, for how long at most; known: {', '.join(BUDGETS)} (all)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), metavar="DIR", help="(output/gpu)")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for all together (480)")
    arguments = parser.parse_args(argv)
    budgets = dict(_parse(part, parser) for part in arguments.sections.split(","))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from benchmarks.harness import FULL, REHEARSAL, Bench

    if not arguments.rehearse and not torch.cuda.is_available():
        print("error: there is no GPU that torch can use; --rehearse runs on the CPU", file=sys.stderr)
        return 1
    start = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    sizes = REHEARSAL if arguments.rehearse else FULL
    bench = Bench(device, sizes, arguments.output, arguments.rehearse)
    if "model" not in budgets and budgets.keys() - {"card"}:
        budgets = {"model": BUDGETS["model"], **budgets}
    for module in set(MODULES.values()):  # takes seconds, which belong to no section
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    if not arguments.rehearse:  # should all else hang
        faulthandler.dump_traceback_later(arguments.budget + GRACE_SECONDS, exit=True, file=sys.stderr)
    try:
        for name, seconds in budgets.items():
            left = arguments.budget - (time.perf_counter() - start)
            if left < 1:
                print(f"{name}: no time left", flush=True)
                continue
            bench.run(name, _section(name), min(seconds, left))
    finally:
        if not arguments.rehearse:
            faulthandler.cancel_dump_traceback_later()
    print_table(bench.lines)
    return 0 if all(line["status"] == "ok" for line in bench.lines) else 1


def _parse(part: str, parser: argparse.ArgumentParser) -> tuple[str, float]:
    name, _, seconds = part.strip().partition("=")
    if name not in BUDGETS:
        parser.error(f"no section {name!r}; known: {', '.join(BUDGETS)}")
    try:
        return name, float(seconds or BUDGETS[name])
    except ValueError:
        parser.error(f"--sections: {part!r} should be NAME=SECONDS")


def _section(name: str) -> Callable[..., None]:
    """A section by its name. What cannot be imported fails within its own sections alone."""
    return lambda bench, figures: getattr(importlib.import_module(MODULES[name]), name)(bench, figures)


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """The figures in short, for the end of the output."""
    from benchmarks.tables import KERNELS, show

    for line in lines:
        print(f"\n{line['section']} ({line['seconds']} s, {line['status']})")
        for row, values in line["figures"].items():
            if row.endswith(KERNELS):
                continue
            if isinstance(values, dict):
                values = ", ".join(f"{name} {show(value)}" for name, value in values.items())
            print(f"  {row}: {show(values)}")


if __name__ == "__main__":
    sys.exit(main())
