"""Load the language model in 8 or 4 bit (bitsandbytes); projections, Q-Formers and encoders are never quantized."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from video_llama.errors import ConfigError
from video_llama.utils.devices import resolve_dtype
from video_llama.utils.extras import require_extra

__all__ = ["prepare_quantized_layers", "quantization_config"]


def quantization_config(load_in_8bit: bool, load_in_4bit: bool, device: torch.device) -> BitsAndBytesConfig | None:
    """Return what `from_pretrained` takes; 4 bit is nf4 with quantized scales, computed in half precision.

    Raises:
        ConfigError: both, or bitsandbytes is not installed.
    """
    if not (load_in_8bit or load_in_4bit):
        return None
    if load_in_8bit and load_in_4bit:
        raise ConfigError("choose one of load_in_8bit (low_resource) and load_in_4bit")
    require_extra("bitsandbytes", "8 and 4 bit")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=resolve_dtype("auto", device),
    )


def prepare_quantized_layers(model: nn.Module, *, for_training: bool = False) -> None:
    """Bring 4-bit layers on a CPU into their final form now, one by one.

    bitsandbytes rearranges the weights of a layer when it is first used. Without this, old and new copies of all layers
    are mixed in the heap, so that freed memory cannot be given back: 2.3 GiB for 7B.

    Args:
        model: with layers of bitsandbytes or without.
        for_training: leave the weights as they are for good, since rearranged ones let no gradient through.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        if for_training:
            layer.support_avx512bf16_for_cpu = False
        elif layer.weight.device.type == "cpu":
            # One forward pass in evaluation mode makes bitsandbytes rearrange the weights of this layer.
            with torch.inference_mode():
                layer.eval()(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
            _return_freed_memory()


def _return_freed_memory() -> None:
    """Give back to the system what glibc keeps for later; other C libraries do so by themselves."""
    if sys.platform == "linux":
        # `CDLL(None)` looks in the running process. Other C libraries on Linux do not have this function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
