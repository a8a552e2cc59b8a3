"""Many media items and many prompts at once, with the results of one at a time."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from video_llama.model.generation import GenerationOptions, cut_at_stop
from video_llama.model.inference import EncodedMedia, Prompt, VideoLlama
from video_llama.processor.batching import pad_items
from video_llama.processor.media import AudioSegments, VideoFrames
from video_llama.utils.utils import to_device

__all__ = ["SharedPrefix", "complete_batch", "encode_batch", "most_frames"]

MAX_FRAMES = {"cuda": 256}
"""Frames, or segments of audio, that are put together for the encoders on a device; more need more memory and gain
nothing. 64 elsewhere."""

_MIN_PREFIX = 8  # a shorter common beginning is not worth a forward pass of its own


@torch.inference_mode()
def encode_batch(
    model: VideoLlama, media: Sequence[VideoFrames | AudioSegments | Tensor], max_frames: int | None = None
) -> list[EncodedMedia]:
    """Like `VideoLlama.encode` for each item, in the same order, but all frames and all segments together.

    Args:
        media: what `VideoLlama.encode` takes; unequal numbers of frames are padded and masked.
        max_frames: frames or segments that are encoded at once, by default what suits the device; an item with more
            goes alone.

    Raises:
        ValueError: a sound, and the model was built without its audio branch.
    """
    values = [model.prepare_values(item) for item in media]
    encoded: list[EncodedMedia | None] = [None] * len(media)
    for is_sound in (False, True):
        numbers = [number for number, tensor in enumerate(values) if (tensor.shape[-3] == 1) == is_sound]
        encode = model.model.get_audio_features if is_sound else model.model.get_video_features
        for group in _groups(numbers, [len(tensor) for tensor in values], max_frames or most_frames(model)):
            stacked, mask = pad_items([values[number] for number in group])
            features = encode(to_device(stacked, model.device), None if mask is None else to_device(mask, model.device))
            for number, tokens in zip(group, features, strict=True):
                encoded[number] = EncodedMedia("audio" if is_sound else "image", tokens)
    return [item for item in encoded if item is not None]


def most_frames(model: VideoLlama) -> int:
    """How many frames or segments to encode together where the model is."""
    return MAX_FRAMES.get(model.device.type, 64)


def _groups(numbers: Sequence[int], lengths: Sequence[int], largest: int) -> Iterator[list[int]]:
    """Runs of `numbers` with no more than `largest` frames together."""
    group: list[int] = []
    for number in numbers:
        if group and sum(lengths[member] for member in group) + lengths[number] > largest:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class SharedPrefix:
    """Keys and values of what all prompts of a run begin with: the system prompt, up to the first media."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self._states: Cache | None = None

    def take(self, model: VideoLlama, prompts: Sequence[Prompt]) -> tuple[int, Cache | None]:
        """How many positions the prompts have in common, and their states, once for each prompt.

        The states are computed when the prompts begin otherwise than those before; 0 and None if too little is
        in common.
        """
        length = _common_length([prompt.keys for prompt in prompts])
        if length < _MIN_PREFIX:
            return 0, None
        if self.keys[:length] != prompts[0].keys[:length]:
            self._states = DynamicCache()
            embeds = prompts[0].inputs_embeds[:, :length]
            model.model(inputs_embeds=embeds, past_key_values=self._states, use_cache=True, logits_to_keep=1)
            self.keys = prompts[0].keys[:length]
        states = copy.deepcopy(self._states)
        assert states is not None
        if surplus := len(self.keys) - length:
            states.crop(-surplus)
        if len(prompts) > 1:
            states.batch_repeat_interleave(len(prompts))
        return length, states


def _common_length(keys: Sequence[Sequence[Hashable]]) -> int:
    """Leading positions that are the same text everywhere; always short of the last position."""
    shortest = min(len(row) for row in keys) - 1
    for position in range(shortest):
        first = keys[0][position]
        if not isinstance(first, int) or any(row[position] != first for row in keys):
            return position
    return max(0, shortest)


@torch.inference_mode()
def complete_batch(
    model: VideoLlama, prompts: Sequence[Prompt], options: GenerationOptions, prefix: SharedPrefix | None = None
) -> list[str]:
    """Like `VideoLlama.complete` for each prompt, in the same order, but all together.

    Each row ends at its own stop string or end-of-sequence token.

    Args:
        prompts: from `VideoLlama.prepare`, with the same stop strings; they need not be equally long.
        options: how to draw the answers.
        prefix: keeps the states of the common beginning for the next batch; see `GenerationOptions.reuses_states`.
    """
    tokenizer, stop_strings = model.processor.tokenizer, prompts[0].stop_strings
    kwargs: dict[str, Any] = options.to_generate_kwargs()
    if stop_strings:
        kwargs |= {"stop_strings": stop_strings, "tokenizer": tokenizer}
    shared = 0
    if prefix is not None and options.reuses_states:
        shared, states = prefix.take(model, prompts)
        if states is not None:
            kwargs["past_key_values"] = states
    embeds, mask = _pad_left([prompt.inputs_embeds[0] for prompt in prompts], shared)
    output = model.model.generate(
        inputs_embeds=embeds, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **kwargs
    )
    texts = tokenizer.batch_decode([_up_to_end(ids, model) for ids in output.tolist()], skip_special_tokens=True)
    return [cut_at_stop(text, stop_strings) for text in texts]


def _pad_left(rows: Sequence[Tensor], shared: int) -> tuple[Tensor, Tensor]:
    """Embeddings (rows, longest, width) and mask (rows, longest), int64; padding follows the shared beginning."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    for number, row in enumerate(rows):
        own = longest - (len(row) - shared)  # where the row's own part begins
        embeds[number, :shared], embeds[number, own:] = row[:shared], row[shared:]
        mask[number, :shared], mask[number, own:] = 1, 1
    return embeds, mask


def _up_to_end(ids: list[int], model: VideoLlama) -> list[int]:
    """Without what fills a row after its end-of-sequence token."""
    ends = model.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position]
    return ids
