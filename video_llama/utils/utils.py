"""Small things every part needs: devices, precisions, seeds, and building modules without filling them."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError

__all__ = ["NARROW_WIDTH", "disable_torch_init", "resolve_device", "resolve_dtype", "set_seed", "to_device"]

NARROW_WIDTH = 512
"""Below this width of its widest part, a model is faster on a CPU in float32 than in bfloat16: video-llama-tiny (192)
captions 26.2 clips/s in float32 and 21.6 in bfloat16 on 2 cores of an AMD EPYC, while ViT-g (1408) is twice as fast in
bfloat16."""

_SKIPPED_LAYERS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.Conv3d)


_DEVICES = "it should be cpu, cuda, cuda:1 (…) or mps"


class disable_torch_init(contextlib.AbstractContextManager[None]):
    """Skip the default random initialisation of layers that a checkpoint fills anyway.

    Works as `with disable_torch_init(): …` and only inside the block, so that no other module is ever left
    uninitialised. The bare call `disable_torch_init()`, as scripts for the original write it, changes nothing:
    the loaders of this package never initialise weights that they load.
    """

    def __enter__(self) -> None:
        self._saved = {layer: layer.reset_parameters for layer in _SKIPPED_LAYERS}
        for layer in _SKIPPED_LAYERS:
            layer.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *exception: Any) -> None:
        for layer, reset_parameters in self._saved.items():
            layer.reset_parameters = reset_parameters  # type: ignore[method-assign]


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or by default the current GPU (Nvidia's or AMD's; else Apple's), else the CPU.

    Raises:
        ConfigError: there is no such device, or it is of a kind that is not supported.
    """
    if device is not None:
        return _check_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {str(device)!r}; {_DEVICES}") from error
    if chosen.type not in ("cpu", "cuda", "mps", "meta"):
        raise ConfigError(f"device {chosen} is not supported; {_DEVICES}")
    gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise ConfigError(f"no device {chosen} here: torch sees {gpus or 'no'} GPU{'' if gpus == 1 else 's'}")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("no device mps here: torch sees no GPU of Apple's")
    return chosen


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; to a GPU it goes without anybody waiting for it."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def resolve_dtype(
    dtype: str | torch.dtype | None, device: str | torch.device, half: bool = True, width: int | None = None
) -> torch.dtype:
    """The precision to load weights in.

    Args:
        dtype: "float32", "bfloat16", "float16" or a torch dtype; "auto" or None chooses for the device.
        device: where the weights will be.
        half: with "auto", whether half precision is wanted where the device is good at it.
        width: of the model, the widest of its parts; None for a wide one.

    Returns:
        with "auto" and `half`: bfloat16 on a GPU that computes in it, float16 on other GPUs (and on MPS). On a CPU
        bfloat16 if it has instructions for it and the model is not narrow (`NARROW_WIDTH`), else float32: float16 is
        several times slower there.

    Raises:
        ConfigError: there is no such precision.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in named:
            raise ConfigError(f"unknown dtype {dtype!r}; it should be auto, {', '.join(named)} or a torch dtype")
        return named[dtype]
    place = torch.device(device)
    if not half:
        return torch.float32
    if place.type == "cpu":
        is_narrow = width is not None and width < NARROW_WIDTH
        return torch.bfloat16 if _cpu_computes_bfloat16() and not is_narrow else torch.float32
    if place.type == "cuda":
        # The current GPU is asked.
        with contextlib.nullcontext() if place.index is None else torch.cuda.device(place):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16


def _cpu_computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.12
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
