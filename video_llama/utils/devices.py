"""Choose a device and its precision, compute there, and report its errors in one line."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import traceback
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError, DeviceError, OutOfMemoryError, VideoLlamaError

__all__ = [
    "CAPTURING",
    "LESS_TO_ANSWER",
    "LESS_TO_LOAD",
    "NARROW_WIDTH",
    "computing_on",
    "execution_device",
    "is_out_of_memory",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "set_seed",
    "to_device",
]

CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: torch captures one at a time."""

NARROW_WIDTH = 512
"""Below this width of its widest part, a model is faster on a CPU in float32 than in bfloat16: video-llama-tiny (192)
captions 26.2 clips/s in float32 and 21.6 in bfloat16 on 2 cores of an AMD EPYC; ViT-g (1408) is twice as fast in
bfloat16."""

LESS_TO_ANSWER = (
    "take fewer clips at a time (batch_size), fewer frames (num_frames) or a shorter answer (max_new_tokens), or load "
    "the language model in 4 bit (load_in_4bit)"
)
LESS_TO_LOAD = (
    "load the language model in 4 or 8 bit (load_in_4bit, load_in_8bit), or spread the model over all devices "
    "(device_map='auto')"
)

_DEVICES = "it should be cpu, cuda, cuda:1 (…) or mps"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What torch, cuBLAS (which needs memory for each thread's handle) and Metal say.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED", re.I
)
_FATAL = re.compile(r"(CUDA|HIP)( driver)? error|device-side assert", re.I)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    # numpy accepts seeds of 32 bits only.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the given device, checked; by default the current GPU (Nvidia, AMD, then Apple), else the CPU.

    Raises:
        ConfigError: there is no such device, or it is of a kind that is not supported.
    """
    if device is not None:
        return _check_device(device)
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if backend.is_available():
            return torch.device(kind)
    return torch.device("cpu")


def _check_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {str(device)!r}; {_DEVICES}") from error
    if chosen.type not in ("cpu", "cuda", "mps", "meta"):
        raise ConfigError(f"device {chosen} is not supported; {_DEVICES}")
    gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        found = f"torch {torch.__version__} found {gpus} GPU(s)"
        raise ConfigError(f"device {chosen} is not available: {found}; use cpu, or install torch for your GPU")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps is not available: torch found no Apple GPU; use cpu")
    return chosen


def resolve_dtype(
    dtype: str | torch.dtype | None, device: str | torch.device, half: bool = True, width: int | None = None
) -> torch.dtype:
    """Return the precision to load weights in.

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
        if dtype not in _DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; it should be auto, {', '.join(_DTYPES)} or a torch dtype")
        return _DTYPES[dtype]
    place = torch.device(device)
    if not half:
        return torch.float32
    if place.type == "cpu":
        is_narrow = width is not None and width < NARROW_WIDTH
        return torch.bfloat16 if _cpu_computes_bfloat16() and not is_narrow else torch.float32
    if place.type == "cuda" and _gpu_computes_bfloat16(place):
        return torch.bfloat16
    return torch.float16


def _cpu_computes_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    # The function is absent before torch 2.12.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _gpu_computes_bfloat16(device: torch.device) -> bool:
    # torch answers for the current GPU.
    with _current(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device; to a GPU the copy is asynchronous."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # Only copies from pinned memory are asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)


def execution_device(module: nn.Module) -> torch.device:
    """Return where a layer computes: the device of its weights, or the one accelerate brings the weights to."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if place is None else torch.device(place)


class computing_on(contextlib.AbstractContextManager[None]):
    """Make a device the current one of this thread, where kernels and libraries look for it.

    Args:
        device: of any kind; a GPU without a number is the current one already.
        less: what to do where memory runs out.

    Raises:
        OutOfMemoryError: the device has too little free memory. What the failed computation held is free again.
        DeviceError: a failure after which this process can compute nothing more there.
    """

    # A class, not a generator: from Python 3.12 on, the frames of a generator and of `contextlib` and the error would
    # hold each other, and the tensors of the failed computation, until the garbage collector runs.
    def __init__(self, device: torch.device, less: str = LESS_TO_ANSWER) -> None:
        self._device = device
        self._less = less
        self._current = _current(device)

    def __enter__(self) -> None:
        self._current.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current.__exit__(kind, error, trace)
        if not isinstance(error, RuntimeError):
            return
        translated = _translate(error, self._device, self._less)
        if translated is None:
            return
        # The frames of the failed computation hold its tensors.
        traceback.clear_frames(trace)
        if isinstance(translated, OutOfMemoryError):
            release_memory()
        try:
            raise translated from error
        finally:
            # Otherwise this frame and the error hold each other until gc runs.
            del translated


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index is None:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch, or a library that it calls, found no memory on a device."""
    first_line = str(error).strip().partition("\n")[0]
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(first_line) is not None


def release_memory() -> None:
    """Give back what torch keeps of freed GPU memory, in blocks that the next request might not fit."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _translate(error: RuntimeError, device: torch.device, less: str) -> VideoLlamaError | None:
    """Return the error as one of this package; None for one that does not come from the device."""
    first_line = str(error).strip().partition("\n")[0]
    if is_out_of_memory(error):
        return OutOfMemoryError(f"{_place(first_line, device)} is out of memory{_amounts(first_line)}: {less}")
    if isinstance(error, torch.AcceleratorError) or _FATAL.search(first_line):
        return DeviceError(
            f"{device} failed, and this process can compute nothing more there ({first_line}): start again. The "
            "environment variable CUDA_LAUNCH_BLOCKING=1 shows where it happened"
        )
    return None


def _place(message: str, device: torch.device) -> str:
    """Return the GPU that torch names in its message, else the device."""
    number = re.search(r"GPU (\d+)", message)
    return str(device) if number is None else f"cuda:{number[1]}"


def _amounts(message: str) -> str:
    """Return the amounts of memory that torch names."""
    patterns = {
        "{} asked for": r"[Tt]ried to allocate ([\d.]+ \w+)",
        "{} free": r"of which ([\d.]+ \w+) is free",
        "{} in all": r"total capacity of ([\d.]+ \w+)",
    }
    found = {words: re.search(pattern, message) for words, pattern in patterns.items()}
    amounts = ", ".join(words.format(match[1]) for words, match in found.items() if match)
    return f" ({amounts})" if amounts else ""
