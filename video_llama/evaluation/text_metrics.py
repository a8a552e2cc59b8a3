"""Compare an answer with the expected one, by words."""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["exact_match", "rouge_l", "token_f1"]


def exact_match(answer: str, expected: str) -> bool:
    """Return whether two texts have the same words, without regard to case, punctuation and articles."""
    return _words(answer) == _words(expected)


def token_f1(answer: str, expected: str) -> float:
    """Return the F1 of the words that two texts share, from 0 to 1 (Rajpurkar et al. 2016); words as `exact_match`."""
    words, others = _words(answer), _words(expected)
    if not words or not others:
        return float(words == others)
    shared = (Counter(words) & Counter(others)).total()
    return 2 * shared / (len(words) + len(others))


def rouge_l(answer: str, expected: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, without regard to case."""
    words, others = answer.lower().split(), expected.lower().split()
    if not words or not others:
        return float(words == others)
    # The longest common subsequence of the words so far with each beginning of the others.
    lengths = [0] * (len(others) + 1)
    for word in words:
        before = list(lengths)
        for column, other in enumerate(others, start=1):
            lengths[column] = before[column - 1] + 1 if word == other else max(before[column], lengths[column - 1])
    return 2 * lengths[-1] / (len(words) + len(others))


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case, without articles; of writing without spaces, its characters."""
    words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())
    return [word for word in words if word not in ("a", "an", "the")]
