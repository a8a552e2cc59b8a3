"""Many media items and many prompts at once, with the results of one at a time up to rounding (docs/performance.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions, cut_at_stop, stop_arguments, stop_test
from video_llama.inference.shared_prefix import SharedPrefix
from video_llama.inference.static_decoder import Request
from video_llama.processor.collate import pad_items
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.utils.devices import computing_on, to_device

__all__ = ["complete_batch", "complete_stream", "encode_batch", "most_frames"]

MAX_FRAMES = {"cuda": 256}
"""Frames, or segments of audio, that are put together for the encoders on a device; more need more memory and gain
nothing. 64 elsewhere."""


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
        OutOfMemoryError: the device has no room for a group.
    """
    values = [model.prepare_values(item) for item in media]
    encoded: list[EncodedMedia | None] = [None] * len(media)
    kinds = [(tensor.shape[-3] == 1, tensor.dtype) for tensor in values]
    for is_sound, dtype in dict.fromkeys(kinds):
        numbers = [number for number, kind in enumerate(kinds) if kind == (is_sound, dtype)]
        encode = model.model.get_audio_features if is_sound else model.model.get_video_features
        for group in _groups(numbers, [len(tensor) for tensor in values], max_frames or most_frames(model)):
            with computing_on(model.device):
                stacked, mask = pad_items([to_device(values[number], model.device) for number in group], model.device)
                features = encode(stacked, mask)
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


@torch.inference_mode()
def complete_batch(
    model: VideoLlama, prompts: Sequence[Prompt], options: GenerationOptions, prefix: SharedPrefix | None = None
) -> list[str]:
    """Like `VideoLlama.complete` for each prompt, in the same order, but all together.

    In float32 greedy answers are the same; in half precision a near tie of two tokens may fall the other way. Each row
    ends at its own stop string or end-of-sequence token.

    Args:
        prompts: from `VideoLlama.prepare`, with the same stop strings; they need not be equally long.
        options: how to draw the answers.
        prefix: keeps the states of the common beginning for the next batch; see `GenerationOptions.reuses_states`.
    """
    if model.decodes_statically(options):
        answers = dict(complete_stream(model, enumerate(prompts), options, len(prompts)))
        return [answers[number] for number in range(len(prompts))]
    tokenizer, stop_strings = model.processor.tokenizer, prompts[0].stop_strings
    kwargs: dict[str, Any] = options.to_generate_kwargs()
    kwargs |= stop_arguments(stop_strings, tokenizer)
    shared = 0
    if prefix is not None and options.reuses_states:
        shared, states = prefix.take(model.model, prompts)
        if states is not None:
            kwargs["past_key_values"] = states
    embeds, mask = _pad_left([prompt.inputs_embeds[0] for prompt in prompts], shared)
    output = model.model.generate(
        inputs_embeds=embeds, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **kwargs
    )
    texts = tokenizer.batch_decode([_up_to_end(ids, model) for ids in output.tolist()], skip_special_tokens=True)
    return [cut_at_stop(text, stop_strings) for text in texts]


Key = TypeVar("Key")


def complete_stream(
    model: VideoLlama, prompts: Iterable[tuple[Key, Prompt]], options: GenerationOptions, num_rows: int
) -> Iterator[tuple[Key, str]]:
    """Like `VideoLlama.complete` for each prompt, as many together as there are rows, by a `StaticDecoder`.

    An answer that ends gives its row to the next prompt.

    Args:
        prompts: from `VideoLlama.prepare`, each with a key that its answer comes with. They are taken when rows are
            free.
        options: how to draw the answers; `VideoLlama.decodes_statically` holds for them.
        num_rows: prompts that are answered together.

    Yields:
        keys and answers, in the order in which answers end.
    """
    supply = iter(prompts)
    while begun := list(itertools.islice(supply, num_rows)):
        longest, too_long = max(len(prompt.keys) for _, prompt in begun), list[tuple[Key, Prompt]]()
        with model.borrow_decoder(num_rows, longest, options) as decoder:
            room = decoder.max_length - options.max_new_tokens
            requests = _make_requests(itertools.chain(begun, supply), room, too_long, model)
            for request in decoder.run(requests, options):
                ids = _up_to_end(request.ids, model)
                text = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
                yield request.key, cut_at_stop(text, request.stop_strings)
        supply = itertools.chain(too_long, supply)


@dataclass(eq=False)
class _Question(Request):
    """A request that knows whose it is."""

    key: Any = None
    stop_strings: Sequence[str] = ()


def _make_requests(
    prompts: Iterable[tuple[Any, Prompt]], room: int, too_long: list[tuple[Any, Prompt]], model: VideoLlama
) -> Iterator[_Question]:
    """Requests for the prompts up to the first that is longer than `room`, which goes to `too_long`."""
    for key, prompt in prompts:
        if len(prompt.keys) > room:
            too_long.append((key, prompt))
            return
        has_ended = stop_test(prompt.stop_strings, model.processor.tokenizer)
        question = _Question(prompt.inputs_embeds, prompt.keys, has_ended=has_ended)
        question.key, question.stop_strings = key, prompt.stop_strings
        yield question


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
