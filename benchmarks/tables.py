#!/usr/bin/env python
"""Draw the tables of docs/performance.md that stand between two marks from the figures of benchmarks/results/*.jsonl.

python benchmarks/tables.py             # rewrites the document
python benchmarks/tables.py --check     # says whether it is as it would be drawn
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/tables.py: begin -->", "<!-- benchmarks/tables.py: end -->"
KERNELS = "kernels"
"""How the names of figures end that explain others and are not shown."""
TITLES = {
    "card": "The card",
    "model": "The model",
    "encoders": "Encoders",
    "decode": "Tokens",
    "captions": "Captions of clips in memory",
    "files": "Captions of files",
    "kv": "Visitors at the same time",
    "memory": "Memory of an answer",
    "training": "Training steps",
    "compiled": "Encoders with torch.compile, which has left since",
}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each run, by the name of its file: the newest run first, sections in their order, no rehearsals."""
    order = list(TITLES)
    runs = {}
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        real = [line for line in lines if not line["rehearsal"]]
        runs[path.stem] = sorted(real, key=lambda line: order.index(line["section"]))
    return {name: lines for name, lines in runs.items() if lines}


def draw(runs: dict[str, list[dict[str, Any]]]) -> str:
    """All tables as Markdown."""
    drawn: list[str] = []
    for name, lines in runs.items():
        versions = ", ".join(f"{package} {version}" for package, version in lines[0]["versions"].items())
        drawn.append(f"### {lines[0]['card']}, run {name}\n\n{versions}.")
        for line in lines:
            drawn.append(f"#### {TITLES[line['section']]}")
            if line["status"] != "ok":
                drawn.append(f"Not whole: {line['status']}.")
            drawn += [part for part in (_words(line["figures"]), _table(line["figures"])) if part]
    return "\n\n".join(drawn)


def _words(figures: dict[str, Any]) -> str:
    """What is no row of a table."""
    return "; ".join(
        f"{name.replace('_', ' ')}: {show(value)}" for name, value in figures.items() if not _is_row(value)
    )


def _table(figures: dict[str, Any]) -> str:
    rows = {name: value for name, value in figures.items() if _is_row(value) and not name.endswith(KERNELS)}
    rows = {name: value for name, value in rows.items() if name != "profile" and value}
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "profile"))
    head = ["", *(column.replace("_", " ") for column in columns)]
    body = [[name, *(show(row[column]) if column in row else "" for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def show(value: Any) -> str:
    """A figure to three digits; words as they are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def insert(document: str, tables: str) -> str:
    """The document with the tables between its marks.

    Raises:
        ValueError: it has not exactly one pair of marks.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document needs one line {BEGIN} and one line {END}")
    before, _, rest = document.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}" if tables else f"{before}{BEGIN}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the document differs")
    arguments = parser.parse_args(argv)
    old = DOCUMENT.read_text(encoding="utf-8")
    new = insert(old, draw(read(RESULTS)))
    if arguments.check:
        if old != new:
            print(f"{DOCUMENT}: the tables are not those of {RESULTS}; run benchmarks/tables.py", file=sys.stderr)
        return int(old != new)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
