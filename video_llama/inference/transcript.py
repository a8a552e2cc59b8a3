"""A conversation to look at: text in a script, HTML with the frames of its files in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from video_llama.inference.uploads import Turn

__all__ = ["Transcript"]


class Transcript:
    """What was asked and answered, with the files in their places.

    Args:
        turns: of the conversation.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = list(turns)

    def __repr__(self) -> str:
        lines = []
        for turn in self._turns:
            lines += [f"[{upload.source}: {upload.summary}]" for upload in turn.uploads]
            if turn.question is not None:
                lines += [f"> {turn.question}", turn.answer or "(no answer)"]
        return "\n".join(lines) or "(nothing was asked)"

    def _repr_html_(self) -> str:
        parts = []
        for turn in self._turns:
            parts += [upload._repr_html_() for upload in turn.uploads]
            if turn.question is not None:
                # What people typed and what a model wrote is text, whatever it looks like.
                parts.append(f"<p><b>{escape(turn.question)}</b><br>{escape(turn.answer or '(no answer)')}</p>")
        return "".join(parts) or "<p>(nothing was asked)</p>"
