"""Repair the YAML mistakes of the original's shipped configurations, which no parser reads as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

__all__ = ["count_values", "first_alternative", "repair_yaml"]

# `key: "a" or "b"`: text behind a quoted value is never valid YAML, so nothing else can be meant.
_ALTERNATIVES = re.compile(r"""(?P<first>\s*[\w.-]+:\s+("[^"]*"|'[^']*'))\s+or\s+\S.*""")
_VALUE = re.compile(r"(?P<indent>\s*)[\w.-]+:\s+[^\s#|>&].*")


def repair_yaml(text: str) -> tuple[str, list[str]]:
    """Return the text with three kinds of mistakes repaired, and a message for each repair.

    The kinds are alternatives (`key: "a" or "b"`, of which the first counts), keys indented below one that has a value
    already, and a key that is there twice with the same value. The number of lines stays.
    """
    lines = text.splitlines()
    messages = [*_take_first_alternatives(lines), *_align_keys(lines)]
    messages += _drop_repeated_keys(lines)
    return "\n".join(lines) + "\n", messages


def count_values(text: str) -> int:
    """Return how many values YAML holds once every reference (`*name`) is replaced by what it stands for.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    return _count(yaml.compose(text, Loader=yaml.SafeLoader), {})


def _count(node: yaml.Node | None, counted: dict[int, int]) -> int:
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        # A reference to what it is in counts as nothing.
        counted[id(node)] = 0
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count(part, counted) for part in inner)
    return counted[id(node)]


def first_alternative(value: object) -> str | None:
    """Return `a` of the text `a or b`; None of anything else."""
    if not isinstance(value, str) or " or " not in value:
        return None
    return value.partition(" or ")[0].strip()


def _take_first_alternatives(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if match := _ALTERNATIVES.fullmatch(line):
            lines[number] = match["first"]
            yield f"line {number + 1} offers several values; the first counts: {lines[number].strip()}"


def _align_keys(lines: list[str]) -> Iterator[str]:
    """Move the lines below `key: value` that are indented further to the column of that key."""
    number = 0
    while number < len(lines):
        match = _VALUE.fullmatch(lines[number])
        number += 1
        if match is None:
            continue
        column = len(match["indent"])
        below = _indented_below(lines, number, column)
        keys = [line for line in below if line.strip()]
        # Text that goes on in the next line is valid YAML. Only a key cannot stand there.
        if not keys or not re.match(r"\s*[\w.-]+:(\s|$)", keys[0]):
            continue
        excess = len(keys[0]) - len(keys[0].lstrip()) - column
        lines[number : number + len(below)] = [line[min(excess, _indent(line)) :] for line in below]
        yield f"line {number + 1} is indented below a key that has a value; it is read as a key beside it"


def _indented_below(lines: list[str], start: int, column: int) -> list[str]:
    """Return the lines from `start` on that are empty or indented further than `column`."""
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > column):
        end += 1
    return lines[start:end]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _drop_repeated_keys(lines: list[str]) -> Iterator[str]:
    """Empty the line of a key whose value is repeated further down in the same section."""
    try:
        root = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        # What is wrong besides is for the caller to report.
        return
    sections = [root]
    while sections:
        section = sections.pop()
        if not isinstance(section, yaml.MappingNode):
            continue
        earlier: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in section.value:
            sections.append(value)
            before = earlier.get(key.value)
            earlier[key.value] = (key, value)
            # Two different values contradict each other, which is an error and not for us to decide.
            if before is None or not isinstance(before[1], yaml.ScalarNode) or before[1].value != value.value:
                continue
            number = before[0].start_mark.line
            # Nothing else may be lost with the line: no other key, and no further line of the value.
            if not section.flow_style and before[1].end_mark.line == number:
                lines[number] = ""
                yield f"line {number + 1}: the key {key.value!r} is there twice, with the same value"
