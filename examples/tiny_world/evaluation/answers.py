"""The value that a free-text answer names. Strict: an answer that names no value, or two, counts as none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from examples.tiny_world.world.vocabulary import ATTRIBUTES, NO_SOUND_TRACK, SHAPES, plural_of

__all__ = ["PITCHES", "parse_answer"]

PITCHES = ("rises", "falls", "stays the same")
"""All values of the attribute "pitch"."""

_NOTHING = "nothing"


def parse_answer(attribute: str, text: str) -> str | None:
    """Return the value that an answer names, as the ground truth writes it; None if it names none, or several.

    Args:
        attribute: of `ATTRIBUTES`, "pitch" or "order".
        text: the answer.

    Raises:
        KeyError: no such attribute.
    """
    words = _plain(text)
    if attribute == "order":
        return _parse_order(words)
    named = set(_find(words, _names(attribute)))
    return named.pop() if len(named) == 1 else None


def _parse_order(words: str) -> str | None:
    """Read two colours, or two shapes, with "then" in front of the second; or "nothing" without any of them."""
    named = [value for name in ("colour", "shape") for value in _find(words, _names(name))]
    has_nothing = re.search(rf"\b{_NOTHING}\b", words) is not None
    if has_nothing and not named:
        return _NOTHING
    if has_nothing or len(named) != 2:
        return None
    for kind in ("colour", "shape"):
        before, then, after = words.partition(" then ")
        first, second = _find(before, _names(kind)), _find(after, _names(kind))
        if then and len(first) == len(second) == 1 and first != second:
            return f"{first[0]}, then {second[0]}"
    return None


@cache
def _names(attribute: str) -> Mapping[str, str]:
    """Return the value of each way to write it."""
    if attribute == "pitch":
        return {value: value for value in PITCHES}
    names = {value: value for value in ATTRIBUTES[attribute]}
    if attribute == "shape":
        names |= {plural_of(shape): shape for shape in SHAPES}
    if attribute == "sound":
        assert NO_SOUND_TRACK in names
    return names


def _find(words: str, names: Mapping[str, str]) -> list[str]:
    """Return values in order of appearance; of names that overlap ("top left", "left") the longest counts."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    return [names[match] for match in re.findall(rf"\b(?:{pattern})\b", words)]


def _plain(text: str) -> str:
    """Return lower-case words with single spaces between them."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
