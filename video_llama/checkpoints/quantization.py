"""The language model in 8 or 4 bit (bitsandbytes); projections, Q-Formers and encoders are never quantised."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from video_llama.errors import ConfigError
from video_llama.utils.devices import resolve_dtype
from video_llama.utils.extras import require_extra

__all__ = ["prepare_quantized_layers", "quantization_config", "skip_branch_quantization"]

MEDIA_MODULES = ("video_branch", "audio_branch")


def quantization_config(load_in_8bit: bool, load_in_4bit: bool, device: torch.device) -> BitsAndBytesConfig:
    """What transformers' `from_pretrained` takes; 4 bit is nf4 with quantised scales, computed in half precision.

    Raises:
        ConfigError: both, or bitsandbytes is not installed.
    """
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


def skip_branch_quantization(options: Mapping[str, Any]) -> dict[str, Any]:
    """Have quantisation leave out the branches, where it costs accuracy and saves little, and the output layer."""
    quantization = options.get("quantization_config")
    for attribute in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, attribute) and not getattr(quantization, attribute):
            setattr(quantization, attribute, [*MEDIA_MODULES, "language_model.lm_head"])
    return dict(options)


def prepare_quantized_layers(model: nn.Module, *, for_training: bool = False) -> None:
    """Have 4-bit layers on a CPU take their final form now, one by one.

    bitsandbytes rearranges the weights of a layer when it is first used. Old and new copies of all layers then lie
    about in the heap, so that freed ones cannot be given back: 2.3 GiB for 7B.

    Args:
        model: with layers of bitsandbytes or without.
        for_training: leave the weights as they are for good, since rearranged ones let no gradient through.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        if for_training:
            layer.support_avx512bf16_for_cpu = False
        elif layer.weight.device.type == "cpu":
            with torch.inference_mode():
                layer.eval()(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
            _return_freed_memory()


def _return_freed_memory() -> None:
    """Give back to the system what glibc keeps for later; other C libraries do so by themselves."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
