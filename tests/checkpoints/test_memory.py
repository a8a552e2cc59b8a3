"""The memory estimate counts what is really there."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.tiny_model import make_tiny_config
from video_llama.checkpoints.memory import BITS_PER_QUANTIZED_WEIGHT, estimate_memory
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def test_weights_are_the_bytes_of_the_loaded_model() -> None:
    config = make_tiny_config()
    model = VideoLlamaForConditionalGeneration(config).to(torch.bfloat16)
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate_memory(config).weights == loaded
    assert estimate_memory(config, bytes_per_value=4).weights == 2 * loaded
    assert estimate_memory(make_tiny_config(use_audio=False)).audio == 0


def test_the_cache_is_as_large_as_a_real_one() -> None:
    config, states = make_tiny_config(), DynamicCache()
    model = VideoLlamaForConditionalGeneration(config).eval()
    model(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=states)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in states.layers)
    assert estimate_memory(config, bytes_per_value=4, context_length=7, batch_size=3).kv_cache == real


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_shrinks_the_linear_layers_of_the_language_model_only(bits: int) -> None:
    half, quantized = estimate_memory(VideoLlamaConfig()), estimate_memory(VideoLlamaConfig(), language_model_bits=bits)
    assert (quantized.vision, quantized.audio, quantized.kv_cache) == (half.vision, half.audio, half.kv_cache)
    untouched = 2 * 2 * 32_000 * 4096  # embedding and output layer
    share = quantized.language_model - untouched
    assert share == pytest.approx((half.language_model - untouched) * BITS_PER_QUANTIZED_WEIGHT[bits] / 16, rel=1e-3)


def test_more_frames_and_tokens_need_more() -> None:
    config = VideoLlamaConfig()
    base = estimate_memory(config)
    assert estimate_memory(config, num_frames=64).activations > base.activations
    assert estimate_memory(config, context_length=4096).kv_cache == 4 * base.kv_cache
