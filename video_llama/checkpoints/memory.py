"""How much memory a configuration needs, counted from the shapes of its parameters before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import CHUNK_SIZE
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["MemoryEstimate", "build_skeleton", "estimate_memory"]

# bitsandbytes: one float32 scale for each row (8 bit) or, quantised itself, for each block of 64 weights (4 bit).
BITS_PER_QUANTISED_WEIGHT = {8: 8.0, 4: 4.0 + 8 / 64 + 32 / (64 * 256)}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use.

    Args:
        language_model, vision, audio: weights of the parts.
        kv_cache: keys and values of `context_length` tokens.
        activations: the widest moment of the frame encoder and of the prompt's pass through the language model.
    """

    language_model: int
    vision: int
    audio: int
    kv_cache: int
    activations: int

    @property
    def weights(self) -> int:
        """All weights together."""
        return self.language_model + self.vision + self.audio

    @property
    def total(self) -> int:
        """What a device should have free; the allocator's own overhead comes on top."""
        return self.weights + self.kv_cache + self.activations


def build_skeleton(config: VideoLlamaConfig) -> VideoLlamaForConditionalGeneration:
    """The model without memory: shapes only."""
    with torch.device("meta"), no_init_weights():
        model = VideoLlamaForConditionalGeneration(config)
    model.language_model.tie_weights()  # comes with the initial values
    return model


def estimate_memory(
    config: VideoLlamaConfig,
    *,
    bytes_per_value: int = 2,
    language_model_bits: int | None = None,
    num_frames: int = 8,
    context_length: int = 1024,
    batch_size: int = 1,
    skeleton: VideoLlamaForConditionalGeneration | None = None,
) -> MemoryEstimate:
    """Count the memory that inference with a configuration needs.

    Args:
        config: the model.
        bytes_per_value: 2 for half precision, 4 for float32; of weights, cache and activations alike.
        language_model_bits: 8 or 4 for a quantised language model; None for none.
        num_frames: frames of each video.
        context_length: tokens of prompt and answer together.
        batch_size: prompts at a time, each with one video.
        skeleton: what `build_skeleton(config)` gave, to save its time.
    """
    model = skeleton or build_skeleton(config)
    audio = model.audio_branch
    return MemoryEstimate(
        language_model=_language_model_bytes(model.language_model, bytes_per_value, language_model_bits),
        vision=_num_values(model.video_branch) * bytes_per_value,
        audio=0 if audio is None else _num_values(audio) * bytes_per_value,
        kv_cache=_kv_cache_values(config) * context_length * batch_size * bytes_per_value,
        activations=_activation_values(config, num_frames * batch_size, context_length * batch_size) * bytes_per_value,
    )


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _language_model_bytes(model: Any, bytes_per_value: int, bits: int | None) -> int:
    """Quantisation reaches the linear layers only; embeddings, norms and the output layer stay as they are."""
    total = _num_values(model)
    if bits is None:
        return total * bytes_per_value
    output = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not output)
    quantised = sum(module.weight.numel() for module in linear)
    return int(quantised * BITS_PER_QUANTISED_WEIGHT[bits] / 8) + (total - quantised) * bytes_per_value


def _kv_cache_values(config: VideoLlamaConfig) -> int:
    """Values the cache holds for one token."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_width


def _activation_values(config: VideoLlamaConfig, num_frames: int, num_tokens: int) -> int:
    """The larger of: one frame-encoder block over the frames that it takes at once, with the pixels and query tokens of
    all frames; one language-model block over all prompts.

    A block holds its input, the residual sum and the widest intermediate (twice, before and after the
    activation function); fused attention keeps no score matrix.
    """
    vision, text = config.vision_config, config.get_text_config()
    tokens = min(num_frames, 2 * CHUNK_SIZE) * ((vision.image_size // vision.patch_size) ** 2 + 1)
    kept = num_frames * (3 * vision.image_size**2 + config.num_query_tokens * config.qformer_config.hidden_size)
    encoder = kept + tokens * (2 * vision.hidden_size + 2 * vision.intermediate_size)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    decoder = num_tokens * (2 * text.hidden_size + 2 * intermediate)
    return max(encoder, decoder)
