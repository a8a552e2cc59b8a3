"""What keeps more digits than the rest of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["KEPT_FROM_FLOAT16", "LOGIT_SCALE", "half_precision_of_frozen", "keeping_float32", "kept_dtype"]

KEPT_FROM_FLOAT16 = ("qformer",)
"""In names of weights that float16 does not reach: the Q-Formers, whose states can exceed its range."""
LOGIT_SCALE = "log_logit_scale"
"""In names of weights that are always float32: rounded to bfloat16, ImageBind's 20 would be 20.09."""


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a weight in a model of a precision."""
    is_kept = name.endswith(LOGIT_SCALE) if dtype == torch.bfloat16 else _is_kept_from_float16(name)
    return torch.float32 if is_kept and dtype in (torch.float16, torch.bfloat16) else dtype


def _is_kept_from_float16(name: str) -> bool:
    return name.endswith(LOGIT_SCALE) or any(part in name for part in KEPT_FROM_FLOAT16)


def keeping_float32(convert: Callable[[Tensor], Tensor], *reduced: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` takes, except that nothing is converted to one of the reduced precisions.

    What would be becomes float32, unrounded, on the device where it would go.
    """

    def apply(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        if converted.dtype in reduced and tensor.dtype != converted.dtype:
            return tensor.to(converted.device, torch.float32)
        return converted

    return apply


def half_precision_of_frozen(module: nn.Module) -> torch.dtype | None:
    """The half precision that all weights of a frozen module have; None if something trains or has another one."""
    first = next(module.parameters(), None)
    if first is None or first.dtype not in (torch.float16, torch.bfloat16):
        return None
    return first.dtype if _is_frozen_in(module, first.dtype) else None


def _is_frozen_in(module: nn.Module, dtype: torch.dtype) -> bool:
    for weight in module._parameters.values():
        if weight is not None and (weight.requires_grad or weight.dtype != dtype):
            return False
    return all(child is None or _is_frozen_in(child, dtype) for child in module._modules.values())
