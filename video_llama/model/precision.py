"""Weights that keep more digits than the rest of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["KEPT_FROM_FLOAT16", "LOGIT_SCALE", "keeping_float32", "kept_dtype"]

KEPT_FROM_FLOAT16 = ("qformer",)
"""Parts of the names of weights that are not converted to float16: the Q-Formers, whose states can exceed its range."""
LOGIT_SCALE = "log_logit_scale"
"""End of the names of weights that are always float32: rounded to bfloat16, ImageBind's 20 would be 20.09."""


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
