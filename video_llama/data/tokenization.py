"""Turn captions and instruction dialogues into token ids with labels.

Stage 1 learns captions, stage 2 dialogues (Zhang, Li and Bing 2023, section 2.3). Labels are on answers and on what
ends them only. The original's mask drifts over the turns of a Vicuna dialogue, and finds no answer where a LLaMA-2
dialogue quotes its own template; here each token carries whether it belongs to an answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from video_llama.checkpoints.language_model import named_template
from video_llama.constants import IGNORE_INDEX
from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.prompt import EncodedPrompt, encode_parts
from video_llama.prompt_parts import (
    Content,
    Placeholder,
    PromptPart,
    Text,
    audio_prefix,
    parse_placeholders,
    video_prefix,
)

__all__ = [
    "NoRoomError",
    "Turn",
    "answer_spans",
    "build_caption_sample",
    "build_conversation_sample",
    "build_dialogue_sample",
    "collate_text",
    "dialogue_template",
    "llava_instruct_turns",
    "question_text",
    "video_instruct_turns",
]

Turn = tuple[Content, str]
"""A question, which may hold the position of media, and its answer."""

_KINDS = ("image", "audio")
_LLAVA_MARK = "<image>"


def answer_spans(labels: Sequence[int]) -> list[range]:
    """Return the positions of each answer of a sample, with what ends it."""
    spans = []
    # Labels come in runs: of answers, and of what stands between them.
    start = 0
    for is_ignored, run in itertools.groupby(labels, key=lambda label: label == IGNORE_INDEX):
        end = start + len(list(run))
        if not is_ignored:
            spans.append(range(start, end))
        start = end
    return spans


class NoRoomError(DatasetError):
    """What comes before the first answer takes all tokens of `max_txt_len`."""


def build_caption_sample(
    caption: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    placeholder: tuple[int, int],
    prompt: str | None = None,
    end_sym: str,
    max_txt_len: int,
) -> dict[str, list[int]]:
    """Return a caption of stage 1: BOS, the prompt around the media, the caption, `end_sym`.

    Args:
        caption: the answer; special tokens in it are plain text.
        tokenizer: of the language model.
        placeholder: id of media features, and how many of them.
        prompt: text around one media position, e.g. `###Human: <Image><ImageHere></Image> … ###Assistant: `;
            None puts the media alone in front.
        end_sym: ends the caption, e.g. "###", "</s>" or a line break.
        max_txt_len: most tokens of caption and `end_sym` together; a longer text is cut off.

    Returns:
        input_ids and labels of equal length; labels are IGNORE_INDEX except on caption and `end_sym`.

    Raises:
        ConfigError: the prompt does not hold exactly one media position.
        DatasetError: the caption is empty.
    """
    if not caption.strip():
        raise DatasetError(f"the caption {caption!r} is empty: there is no training target")
    wrapping = [Placeholder("image")] if prompt is None else parse_placeholders(prompt)
    if sum(isinstance(part, Placeholder) for part in wrapping) != 1:
        raise ConfigError(f"the prompt {prompt!r} must hold one media position, e.g. <ImageHere>")
    sample = _encode(wrapping, tokenizer, placeholder)
    # The original tokenises the caption apart from the prompt: its first token carries a space of its own.
    answer = [Text(caption, answer=True), Text(end_sym, trusted=True, answer=True)]
    encoded = _encode(answer, tokenizer, placeholder, add_bos=False)
    # The limit applies to the answer only, so the prompt and its media are never cut.
    sample.extend(encoded.input_ids[:max_txt_len], encoded.is_answer[:max_txt_len])
    return _with_labels(sample)


def build_dialogue_sample(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Conversation,
    placeholder: tuple[int, int],
    max_txt_len: int,
) -> dict[str, list[int]]:
    """Return turns as a dialogue of stage 2; as `build_conversation_sample`.

    Args:
        turns: from `video_instruct_turns` or `llava_instruct_turns`.
        tokenizer, max_txt_len: as there.
        template: see `dialogue_template`; messages in it are left out.
        placeholder: id of media features, and how many of them.
    """
    conversation = template.copy()
    conversation.messages = []
    for question, answer in turns:
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
    token_id, length = placeholder
    return build_conversation_sample(
        conversation,
        tokenizer,
        placeholder_ids=dict.fromkeys(_KINDS, token_id),
        placeholder_lengths=dict.fromkeys(_KINDS, length),
        max_txt_len=max_txt_len,
    )


def build_conversation_sample(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    placeholder_ids: Mapping[str, int],
    placeholder_lengths: Mapping[str, int],
    max_txt_len: int,
    unlearnt: Collection[int] = (),
) -> dict[str, list[int]]:
    """Return a complete conversation, with media of any kind, as a sample of stage 2.

    Args:
        conversation: its answers are learnt.
        tokenizer: of the language model.
        placeholder_ids, placeholder_lengths: the id of media features, and how many, by kind.
        max_txt_len: most tokens of text, BOS and media not counted; a longer text is cut off.
        unlearnt: numbers of answers, from 0, that are read but not learnt.

    Returns:
        input_ids and labels of equal length; labels are IGNORE_INDEX except on answers and what ends them.

    Raises:
        DatasetError: there is no training target.
        NoRoomError: the cut removes all answers, or a media position.
    """
    # Only text counts towards the limit: BOS and media features come on top.
    sample = encode_parts(conversation.get_parts(tokenizer), tokenizer, placeholder_ids, placeholder_lengths)
    has_bos = sample.input_ids[:1] == [tokenizer.bos_token_id]
    media_ids = set(placeholder_ids.values())
    num_media_ids = sum(token_id in media_ids for token_id in sample.input_ids)
    length = max_txt_len + num_media_ids + int(has_bos)
    is_learnt = _without_answers(sample.is_answer, unlearnt)
    cut = EncodedPrompt(sample.input_ids[:length], is_learnt[:length])
    if sum(token_id in media_ids for token_id in cut.input_ids) < num_media_ids:
        raise NoRoomError(f"a media position is beyond the first {max_txt_len} text tokens (max_txt_len)")
    if any(is_learnt) and not any(cut.is_answer):
        num_before = is_learnt.index(True) - num_media_ids - int(has_bos)
        raise NoRoomError(
            f"no token of an answer is left: the questions fill max_txt_len, with {num_before} text tokens before the "
            f"first answer, where {max_txt_len} are allowed"
        )
    return _with_labels(cut)


def dialogue_template(model_type: str) -> Conversation:
    """Return the template for instruction tuning of a family of language models.

    Args:
        model_type: "vicuna", "llama_v2" or the name of a conversation template ("tokenizer" for the language
            model's own chat template).

    Raises:
        ConfigError: there is no such name.
    """
    name = named_template(model_type, learnt=True)
    if name is None:
        known = ", ".join(sorted({"llama_v2", "vicuna", *conv_templates}))
        raise ConfigError(f"unknown model_type {model_type!r} of an instruction dataset. Known: {known}")
    return conv_templates[name]


def video_instruct_turns(qa: Sequence[Mapping[str, str]], message: str, is_audio: bool = False) -> list[Turn]:
    """Return the turns of a `{"QA": [{"q": …, "a": …}, …]}` annotation; the media precede the first question.

    Args:
        qa: questions and answers; an instruction `i`, as VideoChat2's files have it, precedes its question.
        message: the sentence on the sampled frames, `VideoFrames.message`.
        is_audio: introduce an audio file, in the words that `Chat` uses, instead of a video.

    Raises:
        DatasetError: no questions, or one that is not a pair of texts.
    """
    if not qa:
        raise DatasetError("the annotation holds no questions")
    turns: list[Turn] = []
    for number, pair in enumerate(qa):
        if not isinstance(pair, Mapping) or not isinstance(pair.get("q"), str) or not isinstance(pair.get("a"), str):
            raise DatasetError(f"question {number} must be a text 'q' and a text 'a', but is {pair}")
        if not isinstance(pair.get("i") or "", str):
            raise DatasetError(f"question {number}: the instruction 'i' is not text: {pair['i']!r}")
        turns.append((question_text(pair), pair["a"]))
    media = [*audio_prefix(), " "] if is_audio else video_prefix(message)
    first, answer = turns[0]
    return [([*media, str(first)], answer), *turns[1:]]


def question_text(pair: Mapping[str, str]) -> str:
    """Return the question of a `{"q", "a"}` pair, with the instruction `i` of VideoChat2 in front."""
    # VideoChat2's captions are asked for by the instruction alone: their questions are empty.
    parts = [(pair.get("i") or "").strip(), pair["q"]]
    return " ".join(part for part in parts if part)


def llava_instruct_turns(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Return the turns of LLaVA's `[{"from": "human", "value": …}, {"from": "gpt", …}, …]`.

    The first `<image>` of a human text is the media position; any later one, and those in answers, are text. An
    answer before the first question is left out.

    Raises:
        DatasetError: the speakers do not alternate, or no human text holds `<image>`.
    """
    if not all(isinstance(entry, Mapping) for entry in conversations):
        raise DatasetError("each entry of a conversation must be an object with 'from' and 'value'")
    entries = [(entry.get("from"), entry.get("value")) for entry in conversations]
    if entries and entries[0][0] != "human":
        entries = entries[1:]
    speakers = [speaker for speaker, _ in entries]
    # With an odd number of entries the lists differ in length, so an unanswered last question fails here, too.
    if speakers != ["human", "gpt"] * (len(entries) // 2):
        raise DatasetError(f"speakers must be human and gpt in turn, but are {speakers}")
    turns: list[Turn] = []
    is_placed = False
    for (_, question), (_, answer) in zip(entries[::2], entries[1::2], strict=True):
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DatasetError(f"a value is not text: {question!r}, {answer!r}")
        content: Content = question
        if not is_placed and _LLAVA_MARK in question:
            before, _, after = question.partition(_LLAVA_MARK)
            content = [f"{before}<Image>", Placeholder("image"), f"</Image>{after}"]
            is_placed = True
        turns.append((content, answer))
    if not is_placed:
        raise DatasetError(f"no human text holds {_LLAVA_MARK}, the position of the image")
    return turns


def collate_text(samples: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Return samples of unequal length as one batch, padded on the right.

    Args:
        samples: mappings with input_ids and labels.
        pad_id: fills input_ids.

    Returns:
        input_ids, attention_mask and labels, each (batch, length), int64.
    """
    # The mask is of lengths. The original masks by `pad_id`, and with it real `<unk>` tokens.
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    length = int(lengths.max())
    shape = (len(samples), length)
    batch = {"input_ids": torch.full(shape, pad_id), "labels": torch.full(shape, IGNORE_INDEX)}
    for row, sample in enumerate(samples):
        for name, tensor in batch.items():
            tensor[row, : len(sample[name])] = torch.tensor(sample[name])
    # Compare each position with the length of its row: 1 for tokens, 0 for padding.
    return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def _encode(
    parts: Sequence[PromptPart],
    tokenizer: PreTrainedTokenizerBase,
    placeholder: tuple[int, int],
    add_bos: bool = True,
) -> EncodedPrompt:
    # Frames and audio alike take the one placeholder whose branch is being trained.
    token_id, length = placeholder
    ids, lengths = dict.fromkeys(_KINDS, token_id), dict.fromkeys(_KINDS, length)
    return encode_parts(parts, tokenizer, ids, lengths, add_bos)


def _without_answers(is_answer: Sequence[bool], unlearnt: Collection[int]) -> list[bool]:
    """Return the marks of answer tokens without those of some answers."""
    # Between two answers there is always text of the template, so each run of marks is one answer.
    kept: list[bool] = []
    number = 0
    for mark, run in itertools.groupby(is_answer):
        kept += [mark and number not in unlearnt for _ in run]
        number += mark
    return kept


def _with_labels(sample: EncodedPrompt) -> dict[str, list[int]]:
    if not any(sample.is_answer):
        raise DatasetError(
            f"none of the {len(sample.input_ids)} tokens of the sample is of an answer: there is nothing to learn"
        )
    marked = zip(sample.input_ids, sample.is_answer, strict=True)
    labels = [token_id if is_answer else IGNORE_INDEX for token_id, is_answer in marked]
    return {"input_ids": sample.input_ids, "labels": labels}
