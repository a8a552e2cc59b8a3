"""Sections that write text: tokens, captions, many visitors, and the memory that an answer takes."""

from __future__ import annotations

import importlib.util
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.clips import make_clips
from benchmarks.harness import Bench, Figures
from video_llama.checkpoints.memory import estimate_memory
from video_llama.inference.cache import PrefixCache
from video_llama.inference.captioning import DEFAULT_PROMPT
from video_llama.inference.completion import generate_text
from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.workers import read_ahead
from video_llama.processor.clips import ClipReader
from video_llama.prompt_parts import media_prefix

Generate = Callable[[int], Any]
GIB = 2**30


def options(num_tokens: int, **changes: Any) -> GenerationOptions:
    """Greedy, of exactly so many tokens."""
    return GenerationOptions(max_new_tokens=num_tokens, min_new_tokens=num_tokens, **changes)


def make_prompts(bench: Bench, number: int) -> list[Prompt]:
    """Prompts of random tokens."""
    model, length = bench.model, bench.sizes.prompt_tokens
    generator = torch.Generator().manual_seed(number)
    vocabulary = model.model.config.text_config.vocab_size
    ids = torch.randint(3, vocabulary, (number, length), generator=generator)
    embeds = model.model.get_input_embeddings()(ids.to(bench.device)).detach()
    stops = model.new_conversation().stop_strings
    return [Prompt(list(row.tolist()), embeds[index : index + 1], stops) for index, row in enumerate(ids)]


@torch.inference_mode()
def decode(bench: Bench, figures: Figures) -> None:
    """Tokens after a prompt: with a cache of fixed size, as transformers does it, and the language model alone."""
    model, sizes = bench.model, bench.sizes
    for batch in sizes.batches:
        prompts = make_prompts(bench, batch)
        stacked = torch.cat([prompt.inputs_embeds for prompt in prompts])

        def fixed(number: int, prompts: Sequence[Prompt] = prompts) -> Any:
            return generate_text(model, prompts, options(number, static_cache=True))

        def compiled(number: int, prompts: Sequence[Prompt] = prompts) -> Any:
            return generate_text(model, prompts, options(number, static_cache=True, compile=True))

        def eager(number: int, prompts: Sequence[Prompt] = prompts) -> Any:
            return generate_text(model, prompts, options(number, static_cache=False))

        def peer(number: int, stacked: Tensor = stacked) -> Any:
            return model.model.language_model.generate(
                inputs_embeds=stacked,
                attention_mask=torch.ones(stacked.shape[:2], dtype=torch.long, device=bench.device),
                max_new_tokens=number,
                min_new_tokens=number,
                do_sample=False,
                pad_token_id=0,
            )

        row: Figures = {}
        figures[f"batch {batch}, fixed cache"] = row
        row["first_call_s"] = bench.once(partial(fixed, sizes.new_tokens))
        _steps(bench, row, fixed, batch, repeats=4)
        theirs: Figures = {}
        figures[f"batch {batch}, LlamaForCausalLM.generate"] = theirs
        _steps(bench, theirs, peer, batch, repeats=1)
        row["speed_up"] = theirs["ms_step"] / row["ms_step"]
        ways = {"fixed cache": fixed}
        if bench.on_gpu or batch == 1:  # compiling takes a CPU long
            ways["fixed cache, compiled"] = compiled
            fused: Figures = {}
            figures[f"batch {batch}, fixed cache, compiled"] = fused
            fused["first_call_s"] = bench.once(partial(compiled, sizes.new_tokens))
            _steps(bench, fused, compiled, batch, repeats=4)
            fused["speed_up"] = theirs["ms_step"] / fused["ms_step"]
        if batch in (1, max(sizes.batches)):
            for name, generate in ways.items():
                generate(sizes.few_tokens)
                profile = bench.kernels(partial(generate, sizes.few_tokens))
                figures[f"batch {batch}, {name}: kernels"] = profile.pop("top")
                figures[f"batch {batch}, {name}"]["profile"] = profile
        if batch == 1:
            plain: Figures = {}
            figures[f"batch {batch}, eager"] = plain
            _steps(bench, plain, eager, batch, repeats=1)
            plain["speed_up"] = theirs["ms_step"] / plain["ms_step"]
        pairs = zip(fixed(sizes.new_tokens), eager(sizes.new_tokens), strict=True)
        row["texts_as_eager"] = sum(ours == its for ours, its in pairs) / batch


def _steps(bench: Bench, row: Figures, generate: Generate, batch: int, repeats: int) -> None:
    """The time of one token, from the difference of a long and a short answer, against the bytes it must read."""
    sizes = bench.sizes
    few = bench.seconds(lambda: generate(sizes.few_tokens), repeats, warmup=1)
    many = bench.seconds(lambda: generate(sizes.new_tokens), repeats, warmup=1 if repeats > 2 else 0)
    step = max(many - few, 1e-9) / (sizes.new_tokens - sizes.few_tokens)
    row["ms_step"], row["tokens_s"] = step * 1e3, batch / step
    row["many_s"], row["few_s"] = many, few
    row["of_copy_bandwidth"] = _step_bytes(bench, batch) / step / bench.copy_bandwidth


def _step_bytes(bench: Bench, batch: int) -> float:
    """Weights once, and the keys and values of all positions half way through the answer."""
    language_model = bench.model.model.language_model
    text = language_model.config
    embeddings = language_model.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in language_model.parameters()) - embeddings.nbytes
    heads = text.num_key_value_heads
    kept = 2 * text.num_hidden_layers * heads * (text.hidden_size // text.num_attention_heads) * embeddings.itemsize
    positions = bench.sizes.prompt_tokens + (bench.sizes.new_tokens + bench.sizes.few_tokens) / 2
    return weights + batch * positions * kept


def captions(bench: Bench, figures: Figures) -> None:
    """Clips in memory, end to end, and transformers' InstructBLIP on frames that lie on the device already."""
    sizes, model = bench.sizes, bench.model
    clips = memory_clips(bench, sizes.num_clips)
    length = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens}
    ways: dict[str, dict[str, Any]] = {"fixed cache": {}}
    if bench.on_gpu:
        ways["fixed cache, compiled"] = {"compile": True}
    for batch, (way, extra) in itertools.product(sizes.caption_batches, ways.items()):
        given = {**length, **extra, "batch_size": batch, "static_cache": True}
        row: Figures = {}
        figures[f"batch {batch}, {way}"] = row
        row["first_call_s"] = bench.once(partial(model.caption, clips[:batch], **given))
        row["clips_s"] = len(clips) / bench.once(partial(model.caption, clips, **given))
    _parts(bench, figures, clips)
    peer_row: Figures = {}
    figures["InstructBlipVideo"] = peer_row
    rates = {}
    for batch in sizes.peer_batches:
        inputs = _peer_inputs(bench, batch)
        with torch.inference_mode():
            generate = {**inputs, **length, "do_sample": False, "pad_token_id": 0}
            seconds = bench.seconds(partial(bench.peer.generate, **generate), 1, 1)
        rates[batch] = batch / seconds
        peer_row[f"clips_s_batch_{batch}"] = rates[batch]
        peer_row["clips_s"] = max(rates.values())
    best = max(figures[f"batch {batch}, {way}"]["clips_s"] for batch in sizes.caption_batches for way in ways)
    figures["speed_up_over_peer"] = best / peer_row["clips_s"]
    some = clips[:32]
    seconds = bench.seconds(partial(model.caption, some, **length), 1, 0)
    figures["default settings"] = {"clips_s": len(some) / seconds}


def memory_clips(bench: Bench, number: int) -> list[Any]:
    """Clips of eight random frames, (8, side, side, 3), uint8."""
    side = bench.model.model.config.vision_config.image_size
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (8, side, side, 3), dtype=np.uint8) for _ in range(number)]


def _parts(bench: Bench, figures: Figures, clips: Sequence[Any]) -> None:
    """Seconds of the parts for one batch of clips, each by itself."""
    model, batch = bench.model, bench.sizes.caption_batches[0]
    reader = ClipReader(model.processor.media_processor)

    def read() -> list[Any]:
        return [reader(clip)[1][0].frames for clip in clips[:batch]]  # type: ignore[union-attr]

    def prepare(media: Sequence[Any]) -> list[Prompt]:
        return [_prompt(model, item, None, [features]) for item, features in zip(media, encoded, strict=True)]

    media = read()
    encoded = model.encode_batch(media)
    prompts = prepare(media)
    parts = {
        "read": bench.seconds(read, 2, 0),
        "encode": bench.seconds(lambda: model.encode_batch(media), 3, 1),
        "prepare": bench.seconds(lambda: prepare(media), 3, 1),
        "first token": bench.seconds(lambda: generate_text(model, prompts, options(1, static_cache=True)), 3, 1),
    }
    whole = bench.seconds(
        lambda: generate_text(model, prompts, options(bench.sizes.new_tokens, static_cache=True)), 3, 1
    )
    parts["other tokens"] = whole - parts["first token"]
    figures["prompt_tokens"] = len(prompts[0].keys)
    for name, seconds in parts.items():
        figures[f"{name}, {batch} clips"] = {"seconds": seconds}


def _prompt(model: VideoLlama, frames: Any, sound: Any, encoded: Sequence[EncodedMedia]) -> Prompt:
    """The captioner's question about frames, and sound or None, that are encoded already."""
    conversation = model.new_conversation().copy()
    conversation.ask(DEFAULT_PROMPT)
    conversation = conversation.up_to_answer()
    conversation.introduce(media_prefix([frames], sound))
    return model.prepare(conversation, encoded)


def _peer_inputs(bench: Bench, batch: int) -> dict[str, Tensor]:
    """Frames on the device, and a prompt with as many words as ours has."""
    config = bench.peer.config
    side = config.vision_config.image_size
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (batch, 8, 3, side, side)
    pixels = torch.randn(shape, generator=generator, device=bench.device, dtype=torch.bfloat16)
    num_words = max(8, bench.sizes.prompt_tokens - bench.model.model.config.num_video_query_tokens)
    words = torch.arange(3, 3 + num_words, device=bench.device).repeat(batch, 1)
    media = torch.full((batch, 8 * config.num_query_tokens), config.video_token_index, device=bench.device)
    return {"pixel_values": pixels, "qformer_input_ids": words[:, :8], "input_ids": torch.cat([media, words], dim=1)}


def files(bench: Bench, figures: Figures) -> None:
    """Clips from mp4 files, decoded by other processes while the model answers."""
    sizes, model = bench.sizes, bench.model
    number = max(sizes.num_clips // 2, 1)
    folder = bench.output / "clips"
    started = time.perf_counter()
    paths = make_clips(folder, number, sizes.file_seconds, sizes.file_size, max(sizes.workers))
    figures["making_s"] = time.perf_counter() - started
    batch = min(number, sizes.caption_batches[0])
    given: dict[str, Any] = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens}
    given |= {"batch_size": batch, "static_cache": True}
    model.caption(paths[:batch], num_workers=max(sizes.workers), **given)
    reader = ClipReader(model.processor.media_processor)
    for workers in sizes.workers:
        row: Figures = {}
        figures[f"{workers} workers"] = row
        row["whole_s"] = bench.once(partial(model.caption, paths, num_workers=workers, **given))
        row["clips_s"] = number / row["whole_s"]
        read = read_ahead(zip(count(), paths), reader, workers, 2 * batch + 2 * workers)
        row["reading_alone_s"] = bench.once(partial(list, read))
        row["reading_share"] = min(1.0, row["reading_alone_s"] / row["whole_s"])
    for path in paths:
        Path(path).unlink()


def kv(bench: Bench, figures: Figures) -> None:
    """Visitors of the page at the same time, each with a conversation of its own, on one model."""
    from video_llama.demo.shared_model import SharedModel

    sizes = bench.sizes
    shared = SharedModel(bench.model)
    prompts = make_prompts(bench, sizes.threads)
    for name, is_fixed in (("fixed cache", True), ("as the page does", None)):
        given = {} if is_fixed is None else {"static_cache": is_fixed}
        chosen = options(sizes.thread_tokens, **given)
        errors: list[Exception] = []
        all_visit = partial(_visit, shared, prompts, chosen, errors)
        row: Figures = {}
        figures[name] = row
        row["first_round_s"] = bench.once(all_visit)
        seconds = bench.once(all_visit)
        row["tokens_s"] = sizes.threads * sizes.thread_tokens / seconds
        if errors:
            row["errors"] = f"{len(errors)}: {type(errors[0]).__name__}: {str(errors[0])[:200]}"


def _visit(shared: VideoLlama, prompts: Sequence[Prompt], chosen: GenerationOptions, errors: list[Exception]) -> None:
    """Ask all at once, each in a thread, and wait for all answers."""
    stop = threading.Event()

    def ask(prompt: Prompt) -> None:
        try:
            "".join(shared.stream(prompt, chosen, PrefixCache(), stop))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(prompt,), daemon=True) for prompt in prompts]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()  # should the time be up


def memory(bench: Bench, figures: Figures) -> None:
    """The most memory that one answer takes, weights included, against the estimate."""
    model, sizes = bench.model, bench.sizes
    config = model.model.config
    weights = sum(weight.nbytes for weight in model.model.parameters())
    side = config.vision_config.image_size
    frames = torch.randn(8, 3, side, side)
    sound = torch.randn(8, 1, *config.audio_config.input_size)
    lengths: list[int] = []

    def answer() -> None:
        with torch.inference_mode():
            prompt = _prompt(model, frames, sound, [model.encode(sound), model.encode(frames)])
            lengths.append(len(prompt.keys))
            model.complete(prompt, options(sizes.new_tokens))

    answer()
    model.media_cache.clear()
    others = bench.allocated() - weights if bench.on_gpu else 0  # what earlier sections keep
    peak = bench.peak(answer) - others
    estimate = estimate_memory(config, context_length=lengths[-1] + sizes.new_tokens).total
    row: Figures = {"peak_gib": peak / GIB, "estimate_gib": estimate / GIB, "ratio": peak / estimate}
    figures["half precision, frames and sound"] = row
    is_there = importlib.util.find_spec("bitsandbytes") is not None
    figures["8 and 4 bit"] = "not measured here" if is_there else "bitsandbytes is not installed"
