"""What may be passed to the processor as a prompt, and which media its positions want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from video_llama.prompt_parts import Placeholder, PromptPart, Text, parse_placeholders, render_parts

__all__ = ["Prompt", "RenderedPrompt", "as_prompts", "check_positions", "find_visual_kinds"]

Prompt = str | Sequence[PromptPart]


class RenderedPrompt(str):
    """A prompt string that remembers its pieces, so that what was typed stays text when it is tokenised.

    Args:
        pieces: what the string is made of.
    """

    pieces: list[PromptPart]

    def __new__(cls, pieces: Sequence[PromptPart]) -> RenderedPrompt:
        prompt = super().__new__(cls, render_parts(pieces))
        prompt.pieces = list(pieces)
        return prompt

    def __getnewargs__(self) -> tuple[Any]:
        return (self.pieces,)  # so that copies and pickles are made from the pieces, not from the string


def as_prompts(text: Prompt | Sequence[Prompt]) -> list[list[PromptPart]]:
    """A prompt or a list of prompts as a list of lists of pieces; plain strings are trusted."""
    is_single = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], (Text, Placeholder)))
    prompts: Any = [text] if is_single else text
    return [_as_pieces(prompt) for prompt in prompts]


def _as_pieces(prompt: Prompt) -> list[PromptPart]:
    if isinstance(prompt, RenderedPrompt):
        return prompt.pieces
    return parse_placeholders(prompt) if isinstance(prompt, str) else list(prompt)


def find_visual_kinds(prompts: Sequence[Sequence[PromptPart]]) -> list[Literal["image", "video"]]:
    """For each position of frames what belongs there, as the tag before it says.

    Raises:
        ValueError: a position without a tag.
    """
    kinds: list[Literal["image", "video"]] = []
    for prompt in prompts:
        for before, piece in zip([Text(""), *prompt], prompt, strict=False):
            if piece != Placeholder("image"):
                continue
            words = render_parts([before])
            if not words.endswith(("<Image>", "<Video>")):
                raise ValueError(
                    "where both videos and images are given, <Image> or <Video> must stand before every "
                    f"<ImageHere>; one stands after {words[-20:]!r}"
                )
            kinds.append("image" if words.endswith("<Image>") else "video")
    return kinds


def check_positions(
    prompts: Sequence[Sequence[PromptPart]], kind: Literal["image", "audio"], num_given: int, what: str
) -> None:
    """Raise `ValueError` unless the prompts have as many positions of a kind as there are media."""
    position = Placeholder(kind)
    num_wanted = sum(piece == position for prompt in prompts for piece in prompt)
    if num_wanted != num_given:
        raise ValueError(
            f"the text has {num_wanted} position(s) {position.token} for {what}, but {num_given} were given; "
            "each item needs one position, in order of appearance"
        )
