"""Weights that keep more digits than the rest of the model, and parts that are never quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError

__all__ = [
    "KEPT_FROM_FLOAT16",
    "LOGIT_SCALE",
    "NOT_QUANTIZED",
    "keeping_float32",
    "kept_dtype",
    "let_gradients_through",
    "spare_parts",
]

KEPT_FROM_FLOAT16 = ("qformer", "video_qformer", "audio_qformer")
"""Parts of the names of weights that are not converted to float16: the Q-Formers, whose states can exceed its range."""
LOGIT_SCALE = "log_logit_scale"
"""End of the names of weights that are always float32: rounded to bfloat16, ImageBind's 20 would be 20.09."""

NOT_QUANTIZED = ("model.video_branch", "model.audio_branch", "video_branch", "audio_branch", "lm_head")
"""The branches, where quantization costs accuracy and saves little, and the output layer; of either model class."""
# What the methods of quantization that transformers knows call the modules that they leave alone.
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def spare_parts(quantization: Any) -> Any:
    """Return a quantization config, or its keys, that leaves alone what is never quantized here.

    Args:
        quantization: as `from_pretrained` takes it; None stays.
    """
    is_mapping = isinstance(quantization, dict)
    quantization = copy.deepcopy(quantization)
    if is_mapping and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        quantization.setdefault("llm_int8_skip_modules", None)
    for name in _SKIPPED:
        held = quantization.get(name, ...) if is_mapping else getattr(quantization, name, ...)
        if held is ...:
            continue
        names = [*(held or ()), *(part for part in NOT_QUANTIZED if part not in (held or ()))]
        if is_mapping:
            quantization[name] = names
        else:
            setattr(quantization, name, names)
    return quantization


def let_gradients_through(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes as they were loaded: rearranged for a CPU, they have no gradient.

    Raises:
        ConfigError: answers were generated on the CPU before, and the layers are rearranged already.
    """
    for layer in model.modules():
        # PEFT's layers around them have the same name.
        if type(layer).__name__ != "Linear4bit":
            continue
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                "the 4-bit language model was rearranged for answers on the CPU, and no gradient can pass it: load it "
                "anew with from_pretrained, and call train() before anything else"
            )
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the precision of a weight in a model of a precision."""
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    is_kept = name.endswith(LOGIT_SCALE)
    if dtype == torch.float16:
        is_kept = is_kept or any(part in name for part in KEPT_FROM_FLOAT16)
    return torch.float32 if is_kept else dtype


def keeping_float32(convert: Callable[[Tensor], Tensor], *reduced: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Wrap what `nn.Module._apply` takes so that nothing is converted to one of the reduced precisions.

    What would be becomes float32, unrounded, on the device where it would go.
    """

    def apply(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        # A tensor that has this precision already only moves.
        if converted.dtype in reduced and tensor.dtype != converted.dtype:
            return tensor.to(converted.device, torch.float32)
        return converted

    return apply
