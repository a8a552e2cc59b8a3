"""Shares of right answers, by modality and attribute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.tiny_world.evaluation.answers import parse_answer
from video_llama.constants import Modality
from video_llama.evaluation.asking import AnsweredQuestion

__all__ = ["accuracy_report", "format_table", "is_right"]

_NAMES: dict[Modality, str] = {"video": "clips", "image": "stills", "audio": "sounds"}
_AUDIO_ATTRIBUTES = ("sound", "pitch")


def is_right(answered: AnsweredQuestion) -> bool:
    """Whether the answer names the right value, and no other."""
    return parse_answer(answered.question.attribute, answered.answer) == answered.question.value


def accuracy_report(answered: Sequence[AnsweredQuestion]) -> dict[str, Any]:
    """Accuracies from 0 to 1 and the number of questions of each.

    Returns:
        "questions", "unparseable" (share) and "rows": for each row "name", "accuracy", "count" and, if seen and unseen
        combinations were asked about, "seen" and "unseen".
    """
    rows = []
    for modality, plural in _NAMES.items():
        first = [item for item in answered if item.file.modality == modality and item.question.turn == 1]
        for attribute in dict.fromkeys(item.question.attribute for item in first):
            chosen = [item for item in first if item.question.attribute == attribute]
            rows.append(_row(f"{plural}: {attribute}", chosen))
    later = [item for item in answered if item.question.turn > 1]
    summaries: dict[str, list[AnsweredQuestion]] = {
        "all first questions": [item for item in answered if item.question.turn == 1],
        "second turns": later,
        "second turns: sound": [item for item in later if item.question.attribute in _AUDIO_ATTRIBUTES],
        "unseen combinations": [
            item for item in answered if not item.file.is_seen and item.question.attribute not in _AUDIO_ATTRIBUTES
        ],
    }
    rows += [_row(name, chosen) for name, chosen in summaries.items() if chosen]
    unparseable = sum(parse_answer(item.question.attribute, item.answer) is None for item in answered)
    return {"questions": len(answered), "unparseable": round(unparseable / max(1, len(answered)), 4), "rows": rows}


def format_table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown."""
    lines = ["| questions about | right | seen | unseen | asked |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        cells = [_percent(row.get(key)) for key in ("accuracy", "seen", "unseen")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['count']} |")
    return "\n".join(lines)


def _row(name: str, chosen: Sequence[AnsweredQuestion]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "accuracy": _share(chosen), "count": len(chosen)}
    seen = [item for item in chosen if item.file.is_seen]
    unseen = [item for item in chosen if not item.file.is_seen]
    if seen and unseen:
        row |= {"seen": _share(seen), "unseen": _share(unseen)}
    return row


def _share(chosen: Sequence[AnsweredQuestion]) -> float:
    return round(sum(map(is_right, chosen)) / len(chosen), 4)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
