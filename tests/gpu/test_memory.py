"""How much memory is taken, and what happens when there is too little."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from benchmarks.making import make_model
from tests.gpu.conftest import load
from tests.gpu.test_answers import OPTIONS, make_prompt
from video_llama.checkpoints.memory import estimate_memory
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions

MIB = 2**20


def test_the_estimate_is_near_the_peak_of_an_answer(cuda: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(cuda)
    model = make_model("7b", cuda, num_text_layers=4)  # all of ViT-g, and the published widths
    config = model.model.config
    torch.cuda.reset_peak_memory_stats(cuda)
    frames = torch.randn(8, 3, 224, 224)
    with torch.inference_mode():
        features = model.encode(frames).features
        ids = torch.randint(3, 30_000, (1, 300), device=cuda)
        embeds = torch.cat([features[None], model.model.get_input_embeddings()(ids)], dim=1)
        model.model.generate(inputs_embeds=embeds, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    peak = torch.cuda.max_memory_allocated(cuda) - before
    estimate = estimate_memory(config, context_length=embeds.shape[1] + 16).total
    print(f"peak {peak / MIB:.0f} MiB, estimated {estimate / MIB:.0f} MiB")
    assert 0.85 < peak / estimate < 1.15


def test_too_little_memory_is_one_clear_error_and_the_process_goes_on(
    tiny_checkpoint: Path, cuda: torch.device
) -> None:
    model = load(tiny_checkpoint, cuda)
    prompt = make_prompt(model)
    wanted = model.complete(prompt, OPTIONS)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + 64 * MIB) / total, cuda)
    huge = torch.randn(6000, 3, 56, 56)  # 215 MiB
    try:
        with pytest.raises((VideoLlamaError, torch.OutOfMemoryError), match="memory") as caught:
            model.caption([huge], max_new_tokens=4)
        if isinstance(caught.value, VideoLlamaError):
            assert "\n" not in str(caught.value)
        assert model.caption([huge[:2]], max_new_tokens=4) != []
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    assert model.complete(prompt, GenerationOptions(max_new_tokens=24, min_new_tokens=24)) == wanted
