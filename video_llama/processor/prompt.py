"""From the pieces of a prompt to token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from video_llama.prompt_parts import Placeholder, PromptPart, Text

__all__ = ["EncodedPrompt", "encode_parts", "encode_prompt"]


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
        """Add ids at the end; without `is_answer` they are no answer."""
        self.input_ids += input_ids
        self.is_answer += is_answer or [False] * len(input_ids)


def encode_prompt(
    pieces: Sequence[PromptPart],
    tokenizer: PreTrainedTokenizerBase,
    placeholder_ids: Mapping[str, int],
    placeholder_lengths: Mapping[str, int],
    add_bos: bool = True,
) -> list[int]:
    """Token ids of a prompt; `encode_parts` says how."""
    return encode_parts(pieces, tokenizer, placeholder_ids, placeholder_lengths, add_bos).input_ids


def encode_parts(
    pieces: Sequence[PromptPart],
    tokenizer: PreTrainedTokenizerBase,
    placeholder_ids: Mapping[str, int],
    placeholder_lengths: Mapping[str, int],
    add_bos: bool = True,
) -> EncodedPrompt:
    """Tokenise a prompt; all text between two placeholders at once, as the original does.

    Special tokens are recognised within trusted text only. In typed text they stay plain characters, and what
    begins in one kind of text and ends in the other is no special token.

    Args:
        pieces: what `Conversation.get_parts` returns.
        tokenizer: a fast tokenizer.
        placeholder_ids: the id that marks media features, by kind.
        placeholder_lengths: how many ids one media item takes, by kind.
        add_bos: begin with BOS, if the tokenizer does so and the template has not done it.
    """
    prompt = EncodedPrompt()
    if add_bos:
        prompt.extend(_bos_ids(pieces, tokenizer))
    run: list[Text] = []
    for piece in pieces:
        if isinstance(piece, Placeholder):
            prompt.extend(*_encode_run(run, tokenizer))
            prompt.extend([placeholder_ids[piece.kind]] * placeholder_lengths[piece.kind])
            run = []
        else:
            run.append(piece)
    prompt.extend(*_encode_run(run, tokenizer))
    return prompt


def _bos_ids(pieces: Sequence[PromptPart], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS for tokenizers that put it in front of text, unless the template brings its own."""
    start = tokenizer("").input_ids[:1]
    if not start or start[0] != tokenizer.bos_token_id:
        return []
    first = pieces[0] if pieces else None
    in_template = isinstance(first, Text) and first.trusted and first.text.startswith(tokenizer.bos_token)
    return [] if in_template else start


def _encode_run(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Ids of the text between two placeholders, and which of them belong to an answer."""
    answer_chars = [text.answer for text in run for _ in text.text]
    ids: list[int] = []
    is_answer: list[bool] = []
    for offset, stretch in _split_special_tokens(run, tokenizer):
        if isinstance(stretch, int):
            ids.append(stretch)
            is_answer.append(answer_chars[offset])
            continue
        encoding = tokenizer(
            stretch,
            add_special_tokens=False,
            split_special_tokens=True,  # those of the template were taken out; what is left was typed
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += encoding.input_ids
        for start, end in encoding.offset_mapping:
            # Byte-level tokenizers may say that a space has no width and lies at its own end.
            first = max(0, min(start, end - 1))
            is_answer.append(any(answer_chars[offset + first : offset + max(end, first + 1)]))
    return ids, is_answer


def _split_special_tokens(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str | int]]:
    """(offset, plain text or id of a special token) of the stretches of a run, in order."""
    whole, plain_start = "".join(text.text for text in run), 0
    for start, end, token_id in _special_tokens(run, tokenizer):
        if start > plain_start:
            yield plain_start, whole[plain_start:start]
        yield start, token_id
        plain_start = end
    if plain_start < len(whole):
        yield plain_start, whole[plain_start:]


def _special_tokens(run: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int, int]]:
    """(start, end, id) of the special tokens that stand in trusted text."""
    specials = {t.content: (id_, t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    # Of several that match the longest is meant; some also take in the white space around them.
    patterns = [
        (r"\s*" if token.lstrip else "") + f"({re.escape(content)})" + (r"\s*" if token.rstrip else "")
        for content, (_, token) in sorted(specials.items(), key=lambda item: -len(item[0]))
    ]
    start = 0
    for trusted, group in groupby(run, key=lambda text: text.trusted):
        stretch = "".join(text.text for text in group)
        for match in re.finditer("|".join(patterns), stretch) if trusted and patterns else ():
            yield start + match.start(), start + match.end(), specials[match[match.lastindex or 0]][0]
        start += len(stretch)
