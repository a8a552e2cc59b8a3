#!/usr/bin/env python
"""Write docs/cli.md from the parsers of the commands, so that the page has the options that --help has.

python scripts/document_commands.py             # writes the page
python scripts/document_commands.py --check     # compares it; the exit status is 1 if it differs
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
# A script is run from its folder, and the package need not be installed.
sys.path.insert(0, str(ROOT))

from video_llama.cli import COMMANDS  # noqa: E402

INTRODUCTION = """\
# Commands

All commands with their options. `video-llama COMMAND --help` prints the same; `python -m video_llama` stands for
`video-llama` where the package is not installed. `scripts/document_commands.py` writes this page.

A mistake is one line on standard error, which begins with `error:`. The exit status is 0 for success, 1 for an error, 2
for wrong options, 130 after Ctrl-C and 141 if the reader of the output ended (`| head`). Answers, tables and figures go
to standard output; progress, warnings and the line about the model go to standard error.

| command | what it does |
|---|---|
"""


def draw() -> str:
    """Return the page."""
    rows = [f"| [`{name}`](#video-llama-{name}) | {summary} |\n" for name, (_, summary) in COMMANDS.items()]
    page = INTRODUCTION + "".join(rows) + "".join(map(_section, COMMANDS))
    return re.sub(r"\n{3,}", "\n\n", page)


def _section(name: str) -> str:
    parser = importlib.import_module(COMMANDS[name][0]).build_parser(f"video-llama {name}")
    lines = [f"\n## video-llama {name}\n", *_prose(parser.description), *_prose(parser.epilog)]
    # argparse has no public way to list what was added to a parser.
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            lines += ["", f"| {_title(group.title)} | |", "|---|---|", *map(_row, actions)]
    return "\n".join(lines) + "\n"


def _title(title: str | None) -> str:
    # argparse's own words for what is in no group, which differ between its versions.
    if title in ("positional arguments", "options", "optional arguments", None):
        return "arguments" if title == "positional arguments" else "options"
    return str(title)


def _row(action: argparse.Action) -> str:
    value = action.metavar or ""
    if action.choices is not None:
        value = value or "{" + ",".join(map(str, action.choices)) + "}"
    elif not value and action.nargs != 0 and action.option_strings:
        value = action.dest.upper()
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.nargs in ("+", "*"):
        value = f"{value} …"
    if isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    names = ", ".join(action.option_strings) or ("" if value else action.dest)
    shown = f"{names} {value}".strip().replace("|", "\\|")
    return f"| `{shown}` | {(action.help or '').replace('|', chr(92) + '|')} |"


def _prose(text: str | None) -> Iterator[str]:
    """Yield the lines of a description: what is indented is shown as it is, as a block."""
    block: list[str] = []
    for line in [*(text or "").strip().splitlines(), ""]:
        if line.startswith("  "):
            block.append(line)
            continue
        if block:
            width = min(len(row) - len(row.lstrip()) for row in block)
            yield from ["```text", *(row[width:] for row in block), "```"]
            block = []
        # This heading has its block right below it.
        yield from ["Examples:", ""] if line == "examples:" else [line]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page, and write nothing")
    drawn = draw()
    if not parser.parse_args(argv).check:
        PAGE.write_text(drawn, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != drawn:
        print(f"{PAGE}: differs from the commands; run scripts/document_commands.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
