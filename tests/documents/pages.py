"""The Markdown of the repository: its pages, their blocks of code, their links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/*/README.md"), *ROOT.glob("*/*/README.md")]
)

_BLOCK = re.compile(
    r"^(?:<!-- not run here: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` says why the tests do not run it; `shown` is the output that is printed below it."""

    page: str
    number: int
    language: str
    code: str
    reason: str | None
    shown: str | None


def read_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order. What stands below "You should see:" is the output of the block before."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    blocks = []
    for number, block in enumerate(found):
        shown = None
        if number + 1 < len(found):
            between = text[block.end() : found[number + 1].start()].strip()
            if between in ("You should see:", "Şunu görmelisiniz:"):
                shown = found[number + 1]["code"]
        blocks.append(Block(page, number, block["language"], block["code"], block["reason"], shown))
    return blocks


def read_links(page: Path) -> Iterator[str]:
    """Targets of a page's links, those within code left out."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for inline, reference in _LINK.findall(text):
        yield inline or reference


def read_anchors(page: Path) -> set[str]:
    """The names by which the headings of a page can be linked, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
