"""Count the memory that a configuration needs from its parameters' shapes, and compare it with the device's.

This happens before anything is loaded: otherwise gigabytes are read in vain, or the system ends the process. What is
certain is an error: on a GPU, weights larger than what is free; on a CPU, weights larger than all memory that this
process may ever have. What may fail is a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers.initialization import no_init_weights

from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_configuration import block_sizes
from video_llama.model.encoder_graph import CHUNK_SIZE
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = [
    "SWITCH",
    "DeviceMemory",
    "MemoryEstimate",
    "batch_that_fits",
    "build_skeleton",
    "check_model_fits",
    "estimate_memory",
    "read_device_memory",
    "single_device",
]

logger = logging.getLogger(__name__)

SWITCH = "VIDEO_LLAMA_CHECK_MEMORY"
"""Environment variable; 0 loads without comparing."""

# bitsandbytes: one float32 scale for each row (8 bit) or, quantized itself, for each block of 64 weights (4 bit).
BITS_PER_QUANTIZED_WEIGHT = {8: 8.0, 4: 4.0 + 8 / 64 + 32 / (64 * 256)}

_GIB = 2**30
# Of a GPU: what cuBLAS and cuDNN set aside, and what the allocator leaves in pieces.
_OVERHEAD = 3 * _GIB // 4
# Of what is free, for one batch: others wait with their embeddings, and caches are copied to grow.
_BATCH_SHARE = 0.8
# Limit, usage and statistics of a container, version 2 and version 1. psutil sees the whole machine only.
_CGROUPS = (
    tuple(f"/sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat")),
    tuple(f"/sys/fs/cgroup/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
)


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
        """Return the bytes of all weights together."""
        return self.language_model + self.vision + self.audio

    @property
    def total(self) -> int:
        """Return the bytes that a device should have free; the allocator's own overhead comes on top."""
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device.

    Args:
        free, total: what can be had now, and without other programs.
        is_soft: whether other programs give back memory when it runs short, as they may on a CPU.
    """

    free: int
    total: int
    is_soft: bool = False


def build_skeleton(config: VideoLlamaConfig) -> VideoLlamaForConditionalGeneration:
    """Return the model on the meta device: shapes only."""
    with torch.device("meta"), no_init_weights():
        model = VideoLlamaForConditionalGeneration(config)
    # Otherwise done when values are initialized.
    model.tie_weights()
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
        language_model_bits: 8 or 4 for a quantized language model; None for none.
        num_frames: frames of each video.
        context_length: tokens of prompt and answer together.
        batch_size: prompts at a time, each with one video.
        skeleton: what `build_skeleton(config)` gave, to save its time.
    """
    model = skeleton or build_skeleton(config)
    num_tokens = context_length * batch_size
    return MemoryEstimate(
        language_model=_language_model_bytes(model.language_model, bytes_per_value, language_model_bits),
        vision=_num_values(model.video_branch) * bytes_per_value,
        audio=_num_values(model.audio_branch) * bytes_per_value,
        kv_cache=_kv_cache_values(config) * num_tokens * bytes_per_value,
        activations=_activation_values(config, num_frames * batch_size, num_tokens) * bytes_per_value,
    )


def check_model_fits(
    config: VideoLlamaConfig,
    dtype: torch.dtype,
    *,
    device_map: Any,
    quantization_config: Any = None,
    skeleton: VideoLlamaForConditionalGeneration | None = None,
) -> None:
    """Compare what a model needs with what its device has.

    Nothing is compared where accelerate spreads the model over devices: it moves what does not fit.

    Args:
        config, skeleton: as for `estimate_memory`.
        dtype: of the weights.
        device_map, quantization_config: as transformers' `from_pretrained` takes them.

    Raises:
        ConfigError: the weights alone are larger than the device's memory.
    """
    device = single_device(device_map)
    if device is None or os.environ.get(SWITCH) == "0":
        return
    memory = read_device_memory(device)
    if memory is None:
        return
    bits = _quantized_bits(quantization_config or getattr(config, "quantization_config", None))
    skeleton = skeleton or build_skeleton(config)

    def needed(**changes: Any) -> MemoryEstimate:
        settings = {"bytes_per_value": dtype.itemsize, "language_model_bits": bits, **changes}
        return estimate_memory(config, skeleton=skeleton, **settings)

    need = needed()
    # On a CPU other programs can give memory back, so only what exceeds all memory is certain to fail.
    limit, which = memory.free, "free"
    if memory.is_soft:
        limit, which = memory.total, "in all"
    if need.weights > limit:
        raise ConfigError(
            f"the model cannot fit {device}: its weights take {_gib(need.weights)} ({_parts(need)}), and there is "
            f"{_gib(limit)} {which}. {_advice(needed, dtype, bits, limit)}; {SWITCH}=0 tries it all the same"
        )
    # From here on the numbers are estimates, so too little memory is only worth a warning.
    overhead, words = 0, ""
    if device.type == "cuda":
        overhead, words = _OVERHEAD, " (and what CUDA itself sets aside)"
    if need.total + overhead > memory.free:
        more, advice = need.total - need.weights + overhead, _advice(needed, dtype, bits, memory.free - overhead)
        logger.warning(
            f"the model may not fit {device}: weights take {_gib(need.weights)}, cache and activations of an answer"
            f"{words} {_gib(more)} more; {_gib(memory.free)} is free. {advice}"
        )


def batch_that_fits(
    model: VideoLlamaForConditionalGeneration, device: torch.device, context_length: int, num_beams: int = 1
) -> int:
    """Return how many prompts a loaded model can answer together.

    On a GPU it is what fits its free memory, as a multiple of 8 up to 128, or 1 if 8 do not fit; 8 on other devices.

    Args:
        model, device: the device is that of its token embeddings.
        context_length: tokens of the longest prompt and answer together.
        num_beams: each keeps its own keys and values.
    """
    memory = read_device_memory(device) if device.type == "cuda" else None
    if memory is None:
        return 8
    # The weights are in memory already, so only the cache and the activations have to fit into what is free.
    room = _BATCH_SHARE * (memory.free - _OVERHEAD)
    for batch_size in range(128, 0, -8):
        estimate = estimate_memory(
            model.config,
            bytes_per_value=model.dtype.itemsize,
            context_length=context_length,
            batch_size=batch_size * num_beams,
            skeleton=model,
        )
        if estimate.kv_cache + estimate.activations <= room:
            return batch_size
    return 1


def single_device(device_map: Any) -> torch.device | None:
    """Return the one device that all of the model goes to; None if accelerate chooses, or if there are several."""
    # A device map may name a device for each layer. There is one device to compare with only if all names are the same.
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    place = places.pop() if len(places) == 1 else None
    if place is None:
        return None
    if isinstance(place, int):
        place = f"cuda:{place}"
    try:
        return torch.device(place)
    except RuntimeError:
        # Words such as "auto", "balanced" or "disk" name no device of torch.
        return None


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Return what a device has; None for a kind that cannot be asked."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # The driver counts what torch has reserved as used, but torch can reuse the part that holds no tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return DeviceMemory(free + cached, total)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(total - torch.mps.current_allocated_memory(), total)
    if device.type == "cpu":
        return _cpu_memory()
    return None


def _cpu_memory() -> DeviceMemory:
    """Return what the machine has with its swap space, or the container."""
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    free, total = machine.available + swap.free, machine.total + swap.total
    # A container may have less memory than the machine. Each limit that can be read lowers both numbers.
    for limit_file, usage_file, stat_file in _CGROUPS:
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            statistics = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):
            # There are no such files outside of a container, and "max" stands for no limit.
            continue
        # The system drops cached files when memory runs short.
        reclaimable = int(statistics.get("inactive_file", 0))
        free, total = min(free, limit - usage + reclaimable), min(total, limit)
    return DeviceMemory(free, total, is_soft=True)


def _num_values(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


def _language_model_bytes(model: Any, bytes_per_value: int, bits: int | None) -> int:
    """Count the bytes of the weights; only the linear layers are quantized, without the output layer."""
    total = _num_values(model)
    if bits is None:
        return total * bytes_per_value
    # The output layer is a linear layer as well, but it is left out of quantization.
    output = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not output)
    quantized = sum(module.weight.numel() for module in linear)
    return int(quantized * BITS_PER_QUANTIZED_WEIGHT[bits] / 8) + (total - quantized) * bytes_per_value


def _kv_cache_values(config: VideoLlamaConfig) -> int:
    """Return how many values the cache holds for one token."""
    text = config.get_text_config()
    # With grouped-query attention, several heads of queries share one head of keys and values, which are cached.
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # The factor 2 stands for keys and values.
    return 2 * text.num_hidden_layers * heads * head_width


def _activation_values(config: VideoLlamaConfig, num_frames: int, num_tokens: int) -> int:
    """Return the larger of a frame-encoder block and a language-model block.

    The encoder takes some frames at once, beside the pixels and query tokens of all; the language model takes all
    prompts. A block holds its input, the residual sum and the widest intermediate (twice, before and after the
    activation function); fused attention keeps no score matrix.
    """
    vision, text = config.vision_config, config.get_text_config()
    # A frame has one token for each patch, and a class token or others.
    tokens = min(num_frames, 2 * CHUNK_SIZE) * vision.num_tokens
    # Pixels (three channels) and query tokens are kept for all frames, while the encoder works on some of them.
    num_kept, width = config.frame_tokens_shape
    kept = num_frames * (3 * vision.image_size**2 + num_kept * width)
    block = block_sizes(vision)
    encoder = kept + tokens * (2 * block.hidden_size + 2 * block.intermediate_size)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    decoder = num_tokens * (2 * text.hidden_size + 2 * intermediate)
    return max(encoder, decoder)


def _quantized_bits(quantization: Any) -> int | None:
    """Return 8 or 4 where bitsandbytes quantizes; None for other methods, whose size is not known here."""
    values = quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})
    for bits in (8, 4):
        if values.get(f"load_in_{bits}bit") or values.get(f"_load_in_{bits}bit"):
            return bits
    return None


def _advice(needed: Callable[..., MemoryEstimate], dtype: torch.dtype, bits: int | None, room: int) -> str:
    """Say what takes less, with its size, the smallest change first."""
    ways = []
    if dtype.itemsize > 2:
        ways.append(("half precision (dtype='bfloat16')", bits))
    # Suggest only fewer bits than the user has chosen already.
    ways += [(f"load_in_{fewer}bit", fewer) for fewer in (8, 4) if bits is None or fewer < bits]
    sentences = []
    for name, fewer in ways:
        size = needed(bytes_per_value=2, language_model_bits=fewer).total
        sentences.append(f"{name} needs {_gib(size)}")
        if size > room:
            sentences[-1] += ", too much as well"
    if needed().audio:
        sentences.append(f"no audio branch saves {_gib(needed().audio)}")
    return "; ".join([*sentences, "device_map='auto' spreads it over all devices and the disk"])


def _parts(need: MemoryEstimate) -> str:
    parts = {"language model": need.language_model, "vision": need.vision, "audio": need.audio}
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)


def _gib(size: int) -> str:
    size = max(size, 0)
    if size >= _GIB / 10:
        return f"{size / _GIB:.1f} GiB"
    return f"{size / 2**20:.1f} MiB"
