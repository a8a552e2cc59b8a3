"""Training mode for what trains, evaluation mode for what is frozen."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["keep_frozen_parts_evaluating", "requires_gradients"]


def keep_frozen_parts_evaluating(model: nn.Module) -> None:
    """Put what trains in training mode and the rest in evaluation mode, in one walk over the modules.

    A module is frozen if it holds parameters and none of them trains; one without parameters goes with what it is in.
    A frozen layer with gradient checkpointing recomputes its activations in training mode only: it gets that mode, and
    its children, which could drop something, do not.

    Args:
        model: its modules' `training` is set where it differs.
    """
    _set_modes(model, True, _survey(model, {}))


def requires_gradients(module: nn.Module) -> bool:
    """Return whether any parameter in a module requires a gradient."""
    own = module._parameters.values()
    if any(parameter is not None and parameter.requires_grad for parameter in own):
        return True
    return any(child is not None and requires_gradients(child) for child in module._modules.values())


_Survey = dict[nn.Module, bool | None]  # whether any parameter below trains; None where there is no parameter


def _survey(module: nn.Module, survey: _Survey) -> _Survey:
    """Look at a module and all below it once."""
    trains: bool | None = None
    for parameter in module._parameters.values():
        if parameter is not None:
            trains = trains or parameter.requires_grad
    for child in module._modules.values():
        if child is not None:
            if child not in survey:
                _survey(child, survey)
            below = survey[child]
            trains = below if trains is None else trains or bool(below)
    survey[module] = trains
    return survey


def _set_modes(module: nn.Module, is_on: bool, survey: _Survey) -> None:
    """Set the mode of a module and of all below it; `is_on` is that of what it is in."""
    trains = survey[module]
    is_on = is_on if trains is None else trains
    mode = is_on or (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing)
    if module.training != mode:
        module.training = mode
    for child in module._modules.values():
        if child is not None:
            _set_modes(child, is_on, survey)
