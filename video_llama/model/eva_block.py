"""The blocks of EVA ViT in C (`native/`): whether they were compiled and can run here, and how they are called.

The installation compiles them where there is a C compiler. They hold no state and do not know Python or torch: they
get addresses of tensors, which `forward` checks.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from video_llama.utils.utils import cpu_has

__all__ = ["MULTIPLE", "Block", "Layer", "forward", "pack", "unpack", "why_not"]

MULTIPLE = 32
"""Of which the numbers of a weight's inputs and outputs are."""

_MODULE = "video_llama.model._eva_block"
_INSTRUCTIONS = ("amx_bf16", "amx_tile", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
_SOURCES = Path(__file__).with_name("native")


class Layer(ctypes.Structure):
    """Addresses of a linear layer's packed weight and of its bias, one number for each output."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Block(ctypes.Structure):
    """Sizes of a block, and addresses of its weights, all in bfloat16."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "heads", "head_width", "hidden")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")),
        *((name, Layer) for name in ("qkv", "proj", "fc1", "fc2")),
    )


def why_not() -> str | None:
    """What keeps the blocks from running here, for people; None if nothing does."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return f"torch {torch.__version__} does not say what this CPU can; 2.12 does"
    if not all(cpu_has(name) for name in _INSTRUCTIONS):
        return "this CPU has no AMX for bfloat16"
    _, problem = _load()
    return problem


def forward(blocks: Sequence[Block], states: Tensor, threads: int) -> None:
    """Images through all blocks, in place.

    Args:
        blocks: of the same sizes.
        states: (images, tokens, width), float32.
        threads: to work on; each takes images of its own while there are enough, the rest is shared.

    Raises:
        ValueError: the states are not such a tensor.
        RuntimeError: the blocks cannot run here, or the system has no further thread or memory.
    """
    library, problem = _load()
    if library is None:
        raise RuntimeError(f"the packed frame encoder cannot run: {problem}; load the model with pack=False")
    if states.dtype != torch.float32 or states.ndim != 3 or not states.is_contiguous() or states.device.type != "cpu":
        raise ValueError(f"states should be three-dimensional, float32 and contiguous on the CPU: {states.shape}")
    if any(block.width != states.shape[2] for block in blocks):
        raise ValueError(f"states of width {states.shape[2]} do not fit the blocks")
    if not blocks or not states.numel():
        return
    table = (Block * len(blocks))(*blocks)
    whole = len(states) // threads * threads
    for part in (states[:whole], states[whole:]):
        if len(part):
            sizes = (len(part), states.shape[1])
            workspace = torch.empty(library.eva_block_workspace(table, *sizes, threads), dtype=torch.uint8)
            error = library.eva_block_forward(
                table, len(blocks), part.data_ptr(), *sizes, workspace.data_ptr(), threads
            )
            if error:
                raise RuntimeError(f"the frame encoder could not start {threads} threads: {os.strerror(error)}")


def pack(weight: Tensor) -> Tensor:
    """A weight as `forward` reads it.

    Args:
        weight: (outputs, inputs), bfloat16, both multiples of `MULTIPLE`.

    Returns:
        (outputs / 32, inputs / 32, 2, 16, 16, 2): the fourth counts pairs of inputs, the last the inputs of a pair.
    """
    outputs, inputs = weight.shape
    if weight.storage_offset() % 2:  # torch takes no view as pairs there
        weight = weight.clone()
    pairs = weight.view(torch.int32)  # moved as one number, four times as fast
    tiles = pairs.view(outputs // 32, 2, 16, inputs // 32, 16).permute(0, 3, 1, 4, 2)
    return tiles.contiguous().view(torch.bfloat16).unflatten(-1, (16, 2))


def unpack(packed: Tensor) -> Tensor:
    """The (outputs, inputs) that were packed, in a new tensor."""
    pairs = packed.flatten(-2).view(torch.int32).permute(0, 2, 4, 1, 3)
    return pairs.flatten(3).flatten(0, 2).contiguous().view(torch.bfloat16)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or what is wrong with it."""
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        return None, "video_llama was installed without a C compiler that knows AMX (gcc 11, clang 12 or newer)"
    try:
        library = ctypes.CDLL(found.origin)
        library.eva_block_source.restype = ctypes.c_char_p
        library.eva_block_workspace.restype = ctypes.c_int64
        library.eva_block_workspace.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
        whole, address = ctypes.c_int64, ctypes.c_void_p
        library.eva_block_forward.argtypes = [address, whole, address, whole, whole, address, whole]
    except (OSError, AttributeError) as error:
        return None, f"{found.origin} cannot be loaded ({error})"
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("[!.]*.[ch]")))
    if sources and library.eva_block_source().decode() != hashlib.sha256(sources).hexdigest():
        return None, f"{found.origin} was compiled from other sources; install video_llama once more, with a C compiler"
    if library.eva_block_prepare():
        return None, "the system does not let programs use AMX"
    return library, None
