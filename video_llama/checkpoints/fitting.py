"""Say before loading when a model cannot fit its device: gigabytes are read in vain otherwise, or the system kills us.

What is certain is an error: on a GPU, weights larger than what is free; on a CPU, weights larger than all memory that
this process may ever have. What may fail is a warning: a CPU whose other programs could still make room, or weights
that fit without the cache and the activations of an answer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from video_llama.checkpoints.memory import MemoryEstimate, build_skeleton, estimate_memory
from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["SWITCH", "DeviceMemory", "batch_that_fits", "check_model_fits", "read_device_memory", "single_device"]

logger = logging.getLogger(__name__)

SWITCH = "VIDEO_LLAMA_CHECK_MEMORY"
"""Environment variable; 0 loads without looking."""

_GIB = 2**30
_OVERHEAD = 3 * _GIB // 4  # of a GPU: what cuBLAS and cuDNN set aside, and what the allocator leaves in pieces
_BATCH_SHARE = 0.8  # of what is free, for one batch: others wait with their embeddings, and caches are copied to grow
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device.

    Args:
        free: what can be had now.
        total: what could be had if nobody else were there.
        is_soft: whether others give back memory when it runs short, as programs on a CPU may.
    """

    free: int
    total: int
    is_soft: bool = False


def check_model_fits(
    config: VideoLlamaConfig,
    dtype: torch.dtype,
    *,
    device_map: Any,
    quantization_config: Any = None,
) -> None:
    """Compare what a model needs with what its device has.

    Nothing is compared where accelerate spreads the model over devices: it moves what does not fit.

    Args:
        config: the model.
        dtype: of its weights.
        device_map: as transformers' `from_pretrained` takes it.
        quantization_config: of the language model.

    Raises:
        ConfigError: the weights alone are larger than the device's memory.
    """
    device = single_device(device_map)
    memory = None if device is None or os.environ.get(SWITCH) == "0" else read_device_memory(device)
    if memory is None:
        return
    bits = _bits(quantization_config or getattr(config, "quantization_config", None))
    skeleton = build_skeleton(config)

    def needed(**changes: Any) -> MemoryEstimate:
        settings = {"bytes_per_value": dtype.itemsize, "language_model_bits": bits, **changes}
        return estimate_memory(config, skeleton=skeleton, **settings)

    need = needed()
    limit = memory.total if memory.is_soft else memory.free
    if need.weights > limit:
        whose = "in all" if memory.is_soft else "free"
        raise ConfigError(
            f"the model cannot fit {device}: its weights take {_gib(need.weights)} ({_parts(need)}), and there is "
            f"{_gib(limit)} {whose}. {_advice(needed, dtype, bits, limit)}; {SWITCH}=0 tries it all the same"
        )
    overhead = _OVERHEAD if device is not None and device.type == "cuda" else 0
    if need.total + overhead > memory.free:
        logger.warning(
            "the model may not fit %s: weights take %s, cache and activations of an answer%s %s more; %s is free. %s",
            device,
            _gib(need.weights),
            " (and what CUDA itself sets aside)" if overhead else "",
            _gib(need.total - need.weights + overhead),
            _gib(memory.free),
            _advice(needed, dtype, bits, memory.free - overhead),
        )


def batch_that_fits(
    model: VideoLlamaForConditionalGeneration, device: torch.device, context_length: int, num_beams: int = 1
) -> int:
    """How many prompts a loaded model can answer together.

    Args:
        model: on the device.
        device: of its token embeddings.
        context_length: tokens of the longest prompt and answer together.
        num_beams: each keeps its own keys and values.

    Returns:
        on a GPU what fits its free memory, as a multiple of 8 up to 128, or 1 if 8 do not fit; 8 on other devices.
    """
    memory = read_device_memory(device) if device.type == "cuda" else None
    if memory is None:
        return 8
    room = _BATCH_SHARE * (memory.free - _OVERHEAD)

    def needed(batch_size: int) -> int:
        estimate = estimate_memory(
            model.config,
            bytes_per_value=model.dtype.itemsize,
            context_length=context_length,
            batch_size=batch_size * num_beams,
            skeleton=model,
        )
        return estimate.kv_cache + estimate.activations

    return next((number for number in range(128, 0, -8) if needed(number) <= room), 1)


def single_device(device_map: Any) -> torch.device | None:
    """The one device that all of the model goes to; None if accelerate chooses, or if there are several."""
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(places) != 1:
        return None
    place = places.pop()
    if isinstance(place, int) and not isinstance(place, bool):
        return torch.device("cuda", place)
    try:
        return None if place is None else torch.device(place)
    except RuntimeError:  # "auto", "balanced", "disk"
        return None


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """What a device has; None for a kind that does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return DeviceMemory(free + cached, total)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(total - torch.mps.current_allocated_memory(), total)
    return _cpu_memory() if device.type == "cpu" else None


def _cpu_memory() -> DeviceMemory:
    """Of the machine with its swap space, or of the container."""
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    free, total = machine.available + swap.free, machine.total + swap.total
    for limit_file, usage_file, stat_file in _CGROUPS:
        try:
            limit, usage = (int(Path(name).read_text()) for name in (limit_file, usage_file))
            lines = (line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):  # no container, or "max"
            continue
        reclaimable = {key: int(value) for key, value in lines}.get("inactive_file", 0)
        free, total = min(free, limit - usage + reclaimable), min(total, limit)
    return DeviceMemory(free, total, is_soft=True)


def _bits(quantization: Any) -> int | None:
    """8 or 4 where bitsandbytes quantises; None for none, and for other methods, whose size nobody knows here."""
    values = quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})
    for bits in (8, 4):
        if any(values.get(name) for name in (f"load_in_{bits}bit", f"_load_in_{bits}bit")):
            return bits
    return None


def _advice(needed: Callable[..., MemoryEstimate], dtype: torch.dtype, bits: int | None, room: int) -> str:
    """What takes less, with its size, the smallest change first."""
    choices: dict[str, int] = {}
    if dtype.itemsize > 2:
        choices["half precision (dtype='bfloat16')"] = needed(bytes_per_value=2).total
    if bits is None:
        choices |= {f"load_in_{few}bit": needed(bytes_per_value=2, language_model_bits=few).total for few in (8, 4)}
    elif bits == 8:
        choices["load_in_4bit"] = needed(language_model_bits=4).total
    audio = needed().audio
    shown = [
        f"{name} needs {_gib(size)}{'' if size <= room else ', too much as well'}" for name, size in choices.items()
    ]
    if audio:
        shown.append(f"no audio branch saves {_gib(audio)}")
    return "; ".join([*shown, "device_map='auto' spreads it over all devices and the disk"])


def _parts(need: MemoryEstimate) -> str:
    parts: Iterable[tuple[str, int]] = (
        ("language model", need.language_model),
        ("vision", need.vision),
        ("audio", need.audio),
    )
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts if size)


def _gib(size: int) -> str:
    return f"{max(size, 0) / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{max(size, 0) / 2**20:.1f} MiB"
