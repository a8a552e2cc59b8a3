"""Let a worker read broken inputs: a crash, a hang, too much memory and an error of another library are failures."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.cases import Case

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""For all readings of one input. They take milliseconds; on a busy machine some seconds."""

MEMORY_BYTES = 1536 * 2**20
"""What one input may add to the worker's memory."""

_START_SECONDS = 300.0
_FAILED = ("crash", "hang", "memory", "foreign")


@dataclass
class Table:
    """Counts of outcomes by kind, base and damage; and what failed.

    Args:
        counts: of readings, by (kind, base, damage, outcome).
        failures: (case, outcome, detail).
    """

    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    failures: list[tuple[Case, str, str]] = field(default_factory=list)

    def add(self, case: Case, outcome: str, detail: str) -> None:
        """Count one reading."""
        self.counts[case.kind, case.base, case.damage, outcome] += 1
        if outcome in _FAILED:
            self.failures.append((case, outcome, detail))

    def render(self, by: int = 1) -> str:
        """Return the table as Markdown; a row for each base (`by` = 1) or damage (2) of each kind."""
        rows: dict[tuple[str, str], Counter[str]] = {}
        for key, count in self.counts.items():
            rows.setdefault((key[0], key[by]), Counter())[key[3]] += count
        columns = ("answer", "refusal", *_FAILED)
        lines = [f"| kind | {('', 'base', 'damage')[by]} | tried | {' | '.join(columns)} |", "|---" * 9 + "|"]
        for (kind, name), counted in sorted(rows.items()):
            cells = " | ".join(str(counted[column]) for column in columns)
            lines.append(f"| {kind} | {name} | {sum(counted.values())} | {cells} |")
        return "\n".join(lines)


class Worker:
    """A process that reads broken inputs, started again after each crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._base_peak = 0

    def read(self, case: Case) -> Iterator[tuple[str, str]]:
        """Yield (outcome, detail) of each way of reading a case."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(case)) + "\n")
            process.stdin.flush()
            line = self._line(SECONDS)
        except BrokenPipeError:
            line = ""
        if line is None:
            self.close()
            yield "hang", f"no answer within {SECONDS:g} seconds"
            return
        if not line:
            status = process.wait(30)
            self._process = None
            yield "crash", f"exit status {status}"
            return
        answer = json.loads(line)
        for result in answer["results"]:
            yield result["outcome"], f"{result['way']}: {result['detail']}"
        grown = answer["peak"] - self._base_peak
        if grown > MEMORY_BYTES:
            # The peak of a process never goes down again.
            self.close()
            yield "memory", f"{grown / 2**20:.0f} MiB more than before"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-m", "tests.fuzz.worker"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
        ready = self._line(_START_SECONDS)
        assert ready, "the worker does not start"
        self._base_peak = json.loads(ready)["peak"]
        return self._process

    def _line(self, seconds: float) -> str | None:
        """Return the next line; "" at the end of the process, None if there is none in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        return self._process.stdout.readline()


def run_cases(cases: Iterable[tuple[Path, Case]], keep: Path | None = None) -> Table:
    """Let a worker read cases and return what came of them.

    Args:
        cases: with the folder of each, which is removed.
        keep: where the folders of those that failed go, each with a note of what was wrong.
    """
    table, worker = Table(), Worker()
    try:
        for folder, case in cases:
            failed = []
            for outcome, detail in worker.read(case):
                table.add(case, outcome, detail)
                if outcome in _FAILED:
                    failed.append(f"{outcome}: {detail}\n")
            if failed and keep is not None:
                (folder / "failure.txt").write_text(f"{case}\n{''.join(failed)}", encoding="utf-8", errors="replace")
                shutil.copytree(folder, keep / folder.name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder)
    finally:
        worker.close()
    return table
