"""Run parts that do not train: in evaluation mode, without a graph and without autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["as_frozen", "in_own_precision", "keep_frozen_parts_evaluating", "requires_gradients", "trains"]


def requires_gradients(module: nn.Module) -> bool:
    """Return whether any parameter in a module requires a gradient."""
    # A recursion over the dictionaries takes little more than half the time of `module.parameters()`.
    own = module._parameters.values()
    if any(parameter is not None and parameter.requires_grad for parameter in own):
        return True
    return any(child is not None and requires_gradients(child) for child in module._modules.values())


def trains(*modules: nn.Module) -> bool:
    """Return whether gradients are wanted for any parameter of the modules."""
    return torch.is_grad_enabled() and any(map(requires_gradients, modules))


@contextlib.contextmanager
def as_frozen(device_type: str, *modules: nn.Module) -> Iterator[None]:
    """Run encoders of which nothing trains without a graph and without autocast.

    Their inputs come in the precision of their weights, in which they also answer and fill the feature cache;
    autocast would only cast norms and attention to float32 and back. Nothing changes for modules of which
    something trains.

    Args:
        device_type: where they run, e.g. "cuda".
        modules: the encoders.
    """
    # The usual case at inference: nothing to switch, and no parameters to look at.
    has_autocast = _is_autocast(device_type)
    if not has_autocast and not torch.is_grad_enabled():
        yield
        return
    is_trained = any(map(requires_gradients, modules))
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and is_trained))
        if has_autocast and not is_trained:
            settings.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def in_own_precision(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Switch autocast off for a frozen module in half precision, and yield its inputs in that precision.

    Autocast would check every operation there and change none. Nothing changes for any other module.
    """
    device_type = inputs.device.type
    dtype = _frozen_half_precision(module) if _is_autocast(device_type) else None
    if dtype is None:
        yield inputs
        return
    with torch.autocast(device_type, enabled=False):
        yield inputs.to(dtype)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _frozen_half_precision(module: nn.Module) -> torch.dtype | None:
    """Return the half precision of all weights of a frozen module; None if something trains or has another one."""
    first = next(module.parameters(), None)
    if first is None or first.dtype not in (torch.float16, torch.bfloat16):
        return None
    return first.dtype if _is_frozen_in(module, first.dtype) else None


def _is_frozen_in(module: nn.Module, dtype: torch.dtype) -> bool:
    for weight in module._parameters.values():
        if weight is not None and (weight.requires_grad or weight.dtype != dtype):
            return False
    return all(child is None or _is_frozen_in(child, dtype) for child in module._modules.values())


def keep_frozen_parts_evaluating(model: nn.Module) -> None:
    """Put what trains in training mode and the rest in evaluation mode, in one walk over the modules.

    A module is frozen if it holds parameters and none of them trains; one without parameters takes the mode of its
    parent. A frozen layer with gradient checkpointing recomputes its activations in training mode only: it gets that
    mode, but its children do not, since they could drop something.

    Args:
        model: its modules' `training` is set where it differs.
    """
    _set_modes(model, True, _survey(model, {}))


# Whether any parameter below a module trains; None where there is no parameter.
_Survey = dict[nn.Module, bool | None]


def _survey(module: nn.Module, survey: _Survey) -> _Survey:
    """Look at a module and all below it once."""
    is_trained: bool | None = None
    for parameter in module._parameters.values():
        if parameter is not None:
            is_trained = is_trained or parameter.requires_grad
    for child in module._modules.values():
        if child is not None:
            if child not in survey:
                _survey(child, survey)
            below = survey[child]
            # None (no parameter yet) gives way to what the child says; otherwise one trained part is enough.
            is_trained = below if is_trained is None else is_trained or bool(below)
    survey[module] = is_trained
    return survey


def _set_modes(module: nn.Module, is_on: bool, survey: _Survey) -> None:
    """Set the mode of a module and of all below it; `is_on` is the mode of its parent."""
    is_trained = survey[module]
    if is_trained is not None:
        is_on = is_trained
    # `mode` may be on for a frozen layer with checkpointing; its children get `is_on`, which is not changed by that.
    mode = is_on or (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing)
    if module.training != mode:
        module.training = mode
    for child in module._modules.values():
        if child is not None:
            _set_modes(child, is_on, survey)
