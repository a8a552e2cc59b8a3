"""Loading, the first token and the tokens after it, against transformers' InstructBLIP and its plain generation."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.benches.instructblip import NUM_FRAMES, load_peer, make_peer, peer_inputs
from benchmarks.benches.language import load
from benchmarks.benches.timing import ROOT, Row, alternate
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.prompt_parts import media_prefix
from video_llama.utils.devices import resolve_dtype

ANSWER_TOKENS = 32
PEER_NAME = "InstructBLIP"


def measure_loading(who: str, folder: Path, dtype: str) -> dict[str, float]:
    """What `instructblip.py` prints in a process of its own: seconds, mebibytes, weights."""
    command = [sys.executable, "-m", "benchmarks.benches.instructblip", who, str(folder.resolve()), dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_loading(size: str, repeats: int, folder: Path) -> list[Row]:
    """Seconds and peak memory until all weights are there and were touched, in processes that take turns."""
    dtype = resolve_dtype("auto", "cpu")
    model = load(size, folder, "auto").model
    own = folder / f"random_{'tiny' if size == 'tiny' else 'small'}_hf"
    peer = make_peer(model.config, folder / f"instructblip_{size}_{dtype_name(dtype)}", dtype)
    del model
    folders = {"ours": own, "peer": peer}
    found: dict[str, list[dict[str, float]]] = {who: [] for who in folders}
    for number in range(repeats + 1):
        for who in folders if number % 2 == 0 else reversed(folders):
            result = measure_loading(who, folders[who], dtype_name(dtype))
            if number:  # the first round fills the system's cache
                found[who].append(result)
    medians = {
        who: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for who, results in found.items()
    }
    ours, theirs = medians["ours"], medians["peer"]
    rows = []
    for key, what, unit in (("seconds", "load time", "s"), ("mebibytes", "peak memory of loading", "MiB")):
        note = f"weights {ours['weights']:.0f} and {theirs['weights']:.0f} MiB, {dtype_name(dtype)}"
        rows.append(Row("loading", what, ours[key], theirs[key], unit, PEER_NAME, None, None, note))
    return rows


@torch.inference_mode()
def run_tokens(size: str, repeats: int, folder: Path) -> list[Row]:
    """Frames to the first token against InstructBLIP; further tokens against `generate` of the language model alone."""
    model = load(size, folder, "auto")
    dtype = model.model.dtype
    peer = load_peer(make_peer(model.model.config, folder / f"instructblip_{size}_{dtype_name(dtype)}", dtype), dtype)
    side = model.model.config.vision_config.image_size
    pixels = torch.randn(NUM_FRAMES, 3, side, side, generator=torch.Generator().manual_seed(0))
    return [_first_token(model, peer, pixels, repeats), *_further_tokens(model, pixels, repeats)]


def _prompt(model: VideoLlama, pixels: Tensor) -> Prompt:
    conversation = model.new_conversation()
    conversation.ask("What is happening?")
    conversation = conversation.up_to_answer()
    conversation.introduce(media_prefix([pixels], None))
    return model.prepare(conversation, [model.encode(pixels)])


def _first_token(model: VideoLlama, peer: Any, pixels: Tensor, repeats: int) -> Row:
    """As many tokens of text for both; InstructBLIP gives the language model more tokens for each frame."""
    one = GenerationOptions(max_new_tokens=1)
    num_text = sum(isinstance(key, int) for key in _prompt(model, pixels).keys)
    inputs = peer_inputs(peer, pixels[None].to(peer.dtype), num_text)
    texts: dict[str, str] = {}

    def ours() -> None:
        model.media_cache.clear()
        texts["ours"] = model.complete(_prompt(model, pixels), one)

    medians = alternate({"ours": ours, "peer": lambda: peer.generate(**inputs, max_new_tokens=1)}, repeats)
    prompt = _prompt(model, pixels)
    best = model.model(inputs_embeds=prompt.inputs_embeds).logits[0, -1].argmax()
    agrees = texts["ours"] == cut_at_stop(
        model.processor.tokenizer.decode([best], skip_special_tokens=True), prompt.stop_strings
    )
    note = (
        f"{len(prompt.keys)} tokens of prompt against {inputs['input_ids'].shape[1]}, {dtype_name(model.model.dtype)}"
    )
    what = f"first token about {NUM_FRAMES} frames"
    return Row("tokens", what, medians["ours"], medians["peer"], "s", PEER_NAME, None, agrees, note)


def _further_tokens(model: VideoLlama, pixels: Tensor, repeats: int) -> list[Row]:
    """One answer; with the language model's own `generate`, and as one would without its cache."""
    prompt, tokenizer = _prompt(model, pixels), model.processor.tokenizer
    options = GenerationOptions(max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS)
    texts: dict[str, str] = {}

    def ours() -> None:
        texts["ours"] = model.complete(prompt, options)

    def plain(name: str, use_cache: bool) -> None:
        ids = model.model.language_model.generate(
            inputs_embeds=prompt.inputs_embeds,
            attention_mask=torch.ones(prompt.inputs_embeds.shape[:2], dtype=torch.long),
            max_new_tokens=ANSWER_TOKENS,
            min_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts[name] = cut_at_stop(tokenizer.decode(ids[0], skip_special_tokens=True), prompt.stop_strings)

    names = {"its own generate": True, "generate without a cache": False}
    tasks: dict[str, Any] = {name: partial(plain, name, use_cache) for name, use_cache in names.items()}
    medians = alternate({"ours": ours, **tasks}, repeats)
    what = f"{ANSWER_TOKENS} tokens after {len(prompt.keys)}, {dtype_name(model.model.dtype)}"
    speed = f"{ANSWER_TOKENS / medians['ours']:.1f} tokens/s"
    rows = []
    for name, has_cache in names.items():
        # Without a cache, bfloat16 rounds otherwise, and a random model's likeliest tokens lie close together.
        comparable = has_cache or model.model.dtype == torch.float32
        agrees = texts["ours"] == texts[name] if comparable else None
        note = f"{speed}, {medians.processor_ratio('ours', name)}"
        rows.append(Row("tokens", what, medians["ours"], medians[name], "s", name, None, agrees, note))
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
