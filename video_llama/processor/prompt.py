"""From prompts to token ids: what may be passed as a prompt, where its media go, how its text is tokenised.

Typed text can become neither a placeholder nor a special token: only trusted text is searched for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from video_llama.conversation import Conversation
from video_llama.prompt_parts import Placeholder, PromptPart, Text, parse_placeholders, render_parts

__all__ = [
    "EncodedPrompt",
    "Prompt",
    "RenderedPrompt",
    "check_positions",
    "encode_parts",
    "end_token_ids",
    "find_visual_kinds",
    "parse_prompts",
]

Prompt = str | Sequence[PromptPart]


class RenderedPrompt(str):
    """A prompt string that keeps its parts, so that typed text stays text when it is tokenised.

    Args:
        parts: what the string is made of.
    """

    parts: list[PromptPart]

    def __new__(cls, parts: Sequence[PromptPart]) -> RenderedPrompt:
        prompt = super().__new__(cls, render_parts(parts))
        prompt.parts = list(parts)
        return prompt

    def __getnewargs__(self) -> tuple[Any]:
        # Copies and pickles are made from the parts, not from the string.
        return (self.parts,)


def parse_prompts(text: Prompt | Sequence[Prompt]) -> list[list[PromptPart]]:
    """Return a prompt or a list of prompts as lists of parts; plain strings are trusted."""
    # A list of parts is one prompt; a list of strings or of lists is several.
    is_single = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], (Text, Placeholder)))
    prompts: Any = [text] if is_single else text
    return [_parse(prompt) for prompt in prompts]


def _parse(prompt: Prompt) -> list[PromptPart]:
    if isinstance(prompt, RenderedPrompt):
        return prompt.parts
    if isinstance(prompt, str):
        return parse_placeholders(prompt)
    return list(prompt)


def find_visual_kinds(prompts: Sequence[Sequence[PromptPart]]) -> list[Literal["image", "video"]]:
    """Return for each position of frames whether it is for an image or a video, by the tag before it.

    Raises:
        ValueError: a position without a tag.
    """
    kinds: list[Literal["image", "video"]] = []
    for prompt in prompts:
        # Pair each part with the one before it; an empty text stands before the first.
        for before, part in zip([Text(""), *prompt], prompt, strict=False):
            if part != Placeholder("image"):
                continue
            text = render_parts([before])
            if text.endswith("<Image>"):
                kinds.append("image")
            elif text.endswith("<Video>"):
                kinds.append("video")
            else:
                raise ValueError(
                    "where both videos and images are given, <Image> or <Video> must stand before every "
                    f"<ImageHere>; one stands after {text[-20:]!r}"
                )
    return kinds


def check_positions(
    prompts: Sequence[Sequence[PromptPart]], kind: Literal["image", "audio"], num_given: int, what: str
) -> None:
    """Check that the prompts have as many positions of a kind as there are media.

    Raises:
        ValueError: they have not.
    """
    position = Placeholder(kind)
    num_positions = sum(part == position for prompt in prompts for part in prompt)
    if num_positions != num_given:
        raise ValueError(
            f"the text has {num_positions} position(s) {position.token} for {what}, but {num_given} were given; "
            "each item needs one position, in order of appearance"
        )


@dataclass
class EncodedPrompt:
    """Token ids of a prompt, and which of them training takes its loss on.

    Args:
        input_ids: BOS, text ids and runs of placeholder ids.
        is_answer: one per id: whether the token holds characters of an answer or of what ends it.
    """

    input_ids: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)

    def extend(self, input_ids: Sequence[int], is_answer: Sequence[bool] | None = None) -> None:
        """Add ids at the end; without `is_answer` they belong to no answer."""
        self.input_ids += input_ids
        self.is_answer += is_answer or [False] * len(input_ids)


def encode_parts(
    parts: Sequence[PromptPart],
    tokenizer: PreTrainedTokenizerBase,
    placeholder_ids: Mapping[str, int],
    placeholder_lengths: Mapping[str, int],
    add_bos: bool = True,
) -> EncodedPrompt:
    """Tokenise a prompt; all text between two placeholders at once, as the original does.

    Special tokens are recognised within trusted text only. In typed text they stay plain characters, and what
    begins in one kind of text and ends in the other is no special token.

    Args:
        parts: what `Conversation.get_parts` returns.
        tokenizer: a fast tokenizer.
        placeholder_ids: the id that marks media features, by kind.
        placeholder_lengths: how many ids one media item takes, by kind.
        add_bos: begin with BOS, if the tokenizer does so and the template has not done it.
    """
    prompt = EncodedPrompt()
    if add_bos:
        prompt.extend(_bos_ids(parts, tokenizer))
    run: list[Text] = []
    # Collect text until a placeholder comes, tokenise it in one piece, then add the ids of the placeholder.
    for part in parts:
        if isinstance(part, Text):
            run.append(part)
            continue
        prompt.extend(*_encode_run(run, tokenizer))
        prompt.extend([placeholder_ids[part.kind]] * placeholder_lengths[part.kind])
        run = []
    prompt.extend(*_encode_run(run, tokenizer))
    return prompt


def end_token_ids(template: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that end an answer in a template, in order; none if plain text ends it.

    Raises:
        ConfigError: the template cannot be written with this tokenizer.
    """
    conversation = template.copy()
    conversation.messages = [[template.roles[0], "?"], [template.roles[1], "!"]]
    sample = encode_parts(conversation.get_parts(tokenizer), tokenizer, {}, {})
    learnt = [token for token, is_answer in zip(sample.input_ids, sample.is_answer, strict=True) if is_answer]
    specials = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in learnt if token in specials]


def _bos_ids(parts: Sequence[PromptPart], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return BOS for tokenizers that put it in front of text, unless the template brings its own."""
    # The ids of an empty text show whether the tokenizer puts BOS in front.
    start: list[int] = tokenizer("").input_ids[:1]
    if not start or start[0] != tokenizer.bos_token_id:
        return []
    first = parts[0] if parts else None
    if isinstance(first, Text) and first.trusted and first.text.startswith(tokenizer.bos_token):
        return []
    return start


def _encode_run(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the ids of the text between two placeholders, and which of them belong to an answer."""
    # One flag for each character: a token may begin in one part and end in the next.
    answer_chars = [text.answer for text in run for _ in text.text]
    ids: list[int] = []
    is_answer: list[bool] = []
    for offset, stretch in _split_special_tokens(run, tokenizer):
        if isinstance(stretch, int):
            ids.append(stretch)
            is_answer.append(answer_chars[offset])
            continue
        # The special tokens of the template are taken out already; what is left of them was typed.
        encoding = tokenizer(
            stretch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += encoding.input_ids
        for start, end in encoding.offset_mapping:
            # Byte-level tokenizers may say that a space has no width and lies at its own end.
            first = max(0, min(start, end - 1))
            # A token belongs to an answer if at least one of its characters does.
            is_answer.append(any(answer_chars[offset + first : offset + max(end, first + 1)]))
    return ids, is_answer


def _split_special_tokens(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str | int]]:
    """Yield (offset, plain text or id of a special token) for each stretch of a run, in order."""
    whole = "".join(text.text for text in run)
    plain_start = 0
    for start, end, token_id in _special_tokens(run, tokenizer):
        if start > plain_start:
            yield plain_start, whole[plain_start:start]
        yield start, token_id
        plain_start = end
    if plain_start < len(whole):
        yield plain_start, whole[plain_start:]


def _special_tokens(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, id) of the special tokens in trusted text."""
    specials = {t.content: (id_, t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    # The longest of several matches wins, so it comes first; some tokens also take in the white space around them.
    patterns = [
        (r"\s*" if token.lstrip else "") + f"({re.escape(content)})" + (r"\s*" if token.rstrip else "")
        for content, (_, token) in sorted(specials.items(), key=lambda item: -len(item[0]))
    ]
    start = 0
    # Neighbouring parts of one kind count as one text: a token may be put together from them.
    for trusted, group in groupby(run, key=lambda text: text.trusted):
        stretch = "".join(text.text for text in group)
        if trusted and patterns:
            for match in re.finditer("|".join(patterns), stretch):
                token_id, _ = specials[match[match.lastindex or 0]]
                yield start + match.start(), start + match.end(), token_id
        start += len(stretch)
