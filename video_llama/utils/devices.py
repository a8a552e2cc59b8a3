"""Compute on a device: make it the thread's current one, and say in one line what went wrong there."""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Iterator

import torch

from video_llama.errors import DeviceError, OutOfMemoryError, VideoLlamaError

__all__ = ["CAPTURING", "LESS_TO_ANSWER", "LESS_TO_LOAD", "computing_on", "is_out_of_memory", "release_memory"]

CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: torch captures one at a time."""

LESS_TO_ANSWER = (
    "take fewer clips at a time (batch_size), fewer frames (num_frames) or a shorter answer (max_new_tokens), or load "
    "the language model in 4 bit (load_in_4bit)"
)
LESS_TO_LOAD = (
    "load the language model in 4 or 8 bit (load_in_4bit, load_in_8bit), or spread the model over all devices "
    "(device_map='auto')"
)

# What torch, cuBLAS (which needs memory for each thread's handle) and Metal say.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED", re.I
)
_FATAL = re.compile(r"(CUDA|HIP)( driver)? error|device-side assert", re.I)


@contextlib.contextmanager
def computing_on(device: torch.device, less: str = LESS_TO_ANSWER) -> Iterator[None]:
    """Make a device the current one of this thread, where kernels and libraries that ask for it find it.

    Args:
        device: of any kind; a GPU without a number is the current one already.
        less: what to do where memory runs out.

    Raises:
        OutOfMemoryError: the device has too little free memory. What the failed computation held is free again.
        DeviceError: a failure after which this process can compute nothing more there.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        translated = _translate(error, device, less)
        if translated is None:
            raise
        traceback.clear_frames(error.__traceback__)  # their tensors
        if isinstance(translated, OutOfMemoryError):
            release_memory()
        try:
            raise translated from error
        finally:
            del translated  # or this frame and the error hold each other, and what other frames hold, until gc runs


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library that it calls, found no memory on a device."""
    said = str(error).strip().partition("\n")[0]
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(said) is not None


def release_memory() -> None:
    """Give back what torch keeps of freed GPU memory, in pieces that the next request might not fit."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _translate(error: RuntimeError, device: torch.device, less: str) -> VideoLlamaError | None:
    """The error in the words of this package; None for one that is not the device's."""
    said = str(error).strip().splitlines() or [""]
    if is_out_of_memory(error):
        return OutOfMemoryError(f"{_where(said[0], device)} is out of memory{_amounts(said[0])}: {less}")
    if isinstance(error, torch.AcceleratorError) or _FATAL.search(said[0]):
        return DeviceError(
            f"{device} failed, and this process can compute nothing more there ({said[0]}): start again. Where it "
            "happened is shown with the environment variable CUDA_LAUNCH_BLOCKING=1"
        )
    return None


def _where(said: str, device: torch.device) -> str:
    """With several GPUs, the one that torch names."""
    number = re.search(r"GPU (\d+)", said)
    return str(device) if number is None else f"cuda:{number[1]}"


def _amounts(said: str) -> str:
    """As far as torch tells them."""
    patterns = {
        "{} asked for": r"[Tt]ried to allocate ([\d.]+ \w+)",
        "{} free": r"of which ([\d.]+ \w+) is free",
        "{} in all": r"total capacity of ([\d.]+ \w+)",
    }
    found = {words: re.search(pattern, said) for words, pattern in patterns.items()}
    told = [words.format(match[1]) for words, match in found.items() if match is not None]
    return f" ({', '.join(told)})" if told else ""
