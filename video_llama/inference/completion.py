"""Continue prompts: all text that the package generates comes through `generate_ids` or a `StaticDecoder`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from video_llama.inference.cache import PrefixCache, SharedPrefix
from video_llama.inference.generation import GenerationOptions, cut_at_stop, stop_arguments, stop_test
from video_llama.inference.loaded_model import LoadedModel, Prompt
from video_llama.inference.static_decoder import Request, end_ids
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.utils.devices import computing_on, execution_device

__all__ = ["answer_text", "generate_ids", "generate_one", "generate_text", "pad_prompts", "stream_texts"]

Key = TypeVar("Key")


def generate_ids(
    model: VideoLlamaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    options: GenerationOptions,
    stop_strings: Sequence[str] = (),
    states: Cache | None = None,
    **others: Any,
) -> list[list[int]]:
    """Continue prompts with `generate` of `transformers`; this is the only place that calls it.

    Args:
        model, tokenizer: the model in evaluation mode, and the tokenizer of its language model.
        inputs: arguments of the model, a row for each prompt; padded on the left.
        options, stop_strings: how answers are generated, and what ends them.
        states: keys and values of the beginning of the prompts.
        others: further arguments of `generate`, such as a streamer.

    Returns:
        ids of each answer, up to and with its end-of-sequence token or its stop string.

    Raises:
        OutOfMemoryError: the device has no room for prompts and answers.
    """
    kwargs = options.to_generate_kwargs() | stop_arguments(stop_strings, tokenizer) | others
    if states is not None:
        kwargs["past_key_values"] = states
    with computing_on(execution_device(model.get_input_embeddings())):
        rows = model.generate(**inputs, **kwargs, pad_token_id=tokenizer.pad_token_id).tolist()
    # `generate` pads the rows that end early until the last row has ended.
    return [_up_to_end(ids, end_ids(model.generation_config)) for ids in rows]


def pad_prompts(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return prompts as `input_ids` and `attention_mask`, (prompts, longest), int64, padded on the left.

    So every prompt ends where its answer begins.
    """
    longest = max(len(ids) for ids in prompts)
    rows = [[pad_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


@torch.inference_mode()
def generate_text(
    model: LoadedModel, prompts: Sequence[Prompt], options: GenerationOptions, prefix: SharedPrefix | None = None
) -> list[str]:
    """Answer all prompts together, in the same order; a row ends at its own stop string or end-of-sequence token.

    In float32 greedy answers are those of one prompt at a time; in half precision a near tie of two tokens may fall
    the other way.

    Args:
        model, options: what answers, and how.
        prompts: from `LoadedModel.prepare`, with the same stop strings; they need not be equally long.
        prefix: keeps the states of the common beginning for the next batch; not used with beam search.

    Raises:
        OutOfMemoryError: the device has no room for prompts and answers.
    """
    if model.decoders.serves(options):
        # Answers end in any order. The numbers of the prompts bring them back into order.
        answers = dict(stream_texts(model, enumerate(prompts), options, len(prompts)))
        return [answers[number] for number in range(len(prompts))]
    # Only what follows the common beginning is padded and computed.
    shared, states = 0, None
    if prefix is not None and options.reuses_states:
        with computing_on(model.device):
            shared, states = prefix.take(model.model, [prompt.keys for prompt in prompts], prompts[0].inputs_embeds)
    inputs = _pad_left([prompt.inputs_embeds[0] for prompt in prompts], shared)
    stop_strings = prompts[0].stop_strings
    rows = generate_ids(model.model, model.processor.tokenizer, inputs, options, stop_strings, states)
    return [answer_text(model, ids, stop_strings) for ids in rows]


def stream_texts(
    model: LoadedModel, prompts: Iterable[tuple[Key, Prompt]], options: GenerationOptions, num_rows: int
) -> Iterator[tuple[Key, str]]:
    """Answer prompts with a `StaticDecoder`, as many together as there are rows.

    Args:
        model, options: what answers, and how; `model.decoders.serves(options)` holds.
        prompts: from `LoadedModel.prepare`, each with the key that its answer gets; taken when rows are free.
        num_rows: prompts that are answered together.

    Yields:
        keys and answers, in the order in which answers end.
    """
    # A decoder's rows have room for the longest of the first prompts. If a later one is longer, the answers that have
    # begun are finished, and the rest goes to a decoder with longer rows.
    supply = iter(prompts)
    while begun := list(itertools.islice(supply, num_rows)):
        longest, too_long = max(len(prompt.keys) for _, prompt in begun), list[tuple[Key, Prompt]]()
        with model.decoders.borrow(num_rows, longest, options) as decoder:
            room = decoder.max_length - options.max_new_tokens
            requests = _make_requests(itertools.chain(begun, supply), room, too_long, model)
            for request in decoder.run(requests, options):
                key, stop_strings = request.key
                yield key, answer_text(model, request.ids, stop_strings)
        # The prompt that did not fit is first in the next round, so the next decoder has room for it.
        supply = itertools.chain(too_long, supply)


@torch.inference_mode()
def generate_one(
    model: LoadedModel,
    prompt: Prompt,
    options: GenerationOptions,
    cache: PrefixCache | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Callable[..., Tensor] | None = None,
) -> list[int]:
    """Return the ids of the answer to one prompt.

    Args:
        model, prompt, options: what answers what, and how.
        cache: reuses and extends what an earlier prompt computed; not used with beam search.
        streamer, stopping_criteria: of `transformers`: gets the tokens as they come; ends the answer.
    """
    states = None
    if cache is not None and options.reuses_states:
        states = cache.take(prompt.keys)
    others: dict[str, Any] = {"streamer": streamer, "stopping_criteria": stopping_criteria}
    if model.decoders.serves(options):
        ids = _run_one_row(model, prompt, options, states, **others)
    else:
        inputs = {"inputs_embeds": prompt.inputs_embeds}
        tokenizer, stop_strings = model.processor.tokenizer, prompt.stop_strings
        [ids] = generate_ids(model.model, tokenizer, inputs, options, stop_strings, states, **others)
    # Only after success: after an error the cache stays empty, without half of an answer.
    if cache is not None and states is not None:
        cache.put([*prompt.keys, *ids], states)
    return ids


def answer_text(model: LoadedModel, ids: Sequence[int], stop_strings: Sequence[str]) -> str:
    """Return the text of an answer, without what ends it."""
    return cut_at_stop(model.processor.tokenizer.decode(ids, skip_special_tokens=True), stop_strings)


def _run_one_row(
    model: LoadedModel,
    prompt: Prompt,
    options: GenerationOptions,
    states: Cache | None,
    streamer: Any,
    stopping_criteria: Any,
) -> list[int]:
    """Answer as `generate_one` does, with a `StaticDecoder`."""
    has_stopped = stop_test(prompt.stop_strings, model.processor.tokenizer)
    if streamer is not None:
        # The streamers of transformers take what comes first for the prompt.
        streamer.put(torch.empty(1, 0, dtype=torch.long))

    def has_ended(ids: list[int]) -> bool:
        # The decoder calls this after each token: pass it on, ask the caller, then look for stop strings.
        if streamer is not None:
            streamer.put(torch.tensor(ids[-1:]))
        if stopping_criteria is not None and stopping_criteria(torch.tensor([ids]), None).any():
            return True
        return has_stopped(ids)

    request = Request(prompt.inputs_embeds, states=states, has_ended=has_ended)
    with model.decoders.borrow(1, request.length, options) as decoder:
        for _ in decoder.run([request], options):
            pass
    if streamer is not None:
        streamer.end()
    return request.ids


def _make_requests(
    prompts: Iterable[tuple[Any, Prompt]], room: int, too_long: list[tuple[Any, Prompt]], model: LoadedModel
) -> Iterator[Request]:
    """Yield requests for the prompts up to the first that is longer than `room`, which goes to `too_long`."""
    for key, prompt in prompts:
        if len(prompt.keys) > room:
            too_long.append((key, prompt))
            return
        has_ended = stop_test(prompt.stop_strings, model.processor.tokenizer)
        yield Request(prompt.inputs_embeds, prompt.keys, has_ended=has_ended, key=(key, prompt.stop_strings))


def _pad_left(rows: Sequence[Tensor], shared: int) -> dict[str, Tensor]:
    """Return embeddings (rows, longest, width) and their mask (rows, longest), int64, of rows (length, width).

    Padding follows the first `shared` positions, which all rows have in common.
    """
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    # A row is the shared beginning, then padding, then its own rest. So all rows end at the last position,
    # where their answers begin.
    for number, row in enumerate(rows):
        own = longest - (len(row) - shared)
        embeds[number, :shared], embeds[number, own:] = row[:shared], row[shared:]
        mask[number, :shared], mask[number, own:] = 1, 1
    return {"inputs_embeds": embeds, "attention_mask": mask}


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return the ids without what pads the row after its end-of-sequence token."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids
