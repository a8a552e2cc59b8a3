"""The long form: `python -m tests.fuzz.run --minutes N --seed S` (scripts/fuzz.sh)."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fuzz.bases import make_bases
from tests.fuzz.campaign import run_cases
from tests.fuzz.cases import KINDS, Case, write_case

# Of the time, not of the cases: a checkpoint takes as long as many media files.
_SHARES = {"media": 0.6, "checkpoint": 0.2, "annotations": 0.1, "config": 0.1}


def cases_until(kind: str, seed: str, folder: Path, bases: Sequence[Path], until: float) -> Iterator[tuple[Path, Case]]:
    """Write one case after the other until the time is over."""
    number = 0
    while time.monotonic() < until:
        place = folder / f"{kind}-{seed}-{number}"
        yield place, write_case(kind, f"{seed}/{number}", place, bases)
        number += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz for some minutes, print the tables, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--keep", type=Path, default=Path("output/fuzz"), help="folder for what failed")
    options = parser.parse_args(arguments)
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="video-llama-fuzz-") as name:
        folder = Path(name)
        bases = make_bases(folder / "bases")
        for kind in KINDS:
            until = time.monotonic() + 60 * options.minutes * _SHARES[kind]
            table = run_cases(cases_until(kind, options.seed, folder, bases, until), options.keep)
            print(table.render(), table.render(by=2), sep="\n\n", end="\n\n", flush=True)
            for case, outcome, detail in table.failures:
                last = detail.strip().splitlines()[-1]
                print(f"{outcome}: {case.kind} {case.base} {case.damage}: {last[:300]} ({Path(case.path).parent.name})")
            failed += len(table.failures)
    seconds = time.monotonic() - started
    print(f"seed {options.seed}: {failed} failed, {seconds / 60:.1f} minutes", flush=True)
    if failed:
        print(f"what failed is in {options.keep}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
