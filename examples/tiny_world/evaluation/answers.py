"""What a free-text answer says of an attribute. Strict: an answer that names no value, or two, says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from examples.tiny_world.world.vocabulary import ATTRIBUTES, NO_SOUND_TRACK, SHAPES, plural_of

__all__ = ["PITCHES", "parse_answer"]

PITCHES = ("rises", "falls", "stays the same")
"""All values of the attribute "pitch"."""

_NOTHING = "nothing"


def parse_answer(attribute: str, text: str) -> str | None:
    """The value that an answer names, as the ground truth writes it; None if it names none, or more than one.

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
    """Two colours, or two shapes, with "then" in front of the second; or "nothing" without any of them."""
    named = [value for name in ("colour", "shape") for value in _find(words, _names(name))]
    if not named:
        return _NOTHING if re.search(rf"\b{_NOTHING}\b", words) else None
    if re.search(rf"\b{_NOTHING}\b", words) or len(named) != 2:
        return None
    for kind in ("colour", "shape"):
        before, then, after = words.partition(" then ")
        first, second = _find(before, _names(kind)), _find(after, _names(kind))
        if then and len(first) == len(second) == 1 and first != second:
            return f"{first[0]}, then {second[0]}"
    return None


@cache
def _names(attribute: str) -> Mapping[str, str]:
    """Ways to write each value, to the value."""
    if attribute == "pitch":
        return {value: value for value in PITCHES}
    names = {value: value for value in ATTRIBUTES[attribute]}
    if attribute == "shape":
        names |= {plural_of(shape): shape for shape in SHAPES}
    if attribute == "sound":
        assert NO_SOUND_TRACK in names
    return names


def _find(words: str, names: Mapping[str, str]) -> list[str]:
    """Values in order of appearance; of names that overlap ("top left", "left") the longest counts."""
    pattern = "|".join(re.escape(name) for name in _longest_first(names))
    return [names[match] for match in re.findall(rf"\b(?:{pattern})\b", words)]


def _longest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=len, reverse=True)


def _plain(text: str) -> str:
    """Lower-case words with single spaces between them."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
