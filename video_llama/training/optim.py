"""The optimizer and the two learning-rate schedules of the published recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.optim import AdamW

from video_llama.config import RunConfig
from video_llama.registry import SCHEDULES

__all__ = ["Schedule", "StepSchedule", "build_optimizer", "build_schedule", "split_by_weight_decay"]


def split_by_weight_decay(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters with and without weight decay: vectors and biases have none."""
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (no_decay if parameter.ndim < 2 or "bias" in name else decay)[name] = parameter
    return decay, no_decay


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, beta2: float = 0.999, is_scaled: bool = False
) -> AdamW:
    """AdamW over the model's trainable parameters, in the recipe's two groups.

    Args:
        model: its parameters that require gradients are taken.
        lr, weight_decay, beta2: of AdamW; vectors and biases do not decay.
        is_scaled: the loss is scaled, as float16 needs it.

    Raises:
        ValueError: nothing in the model trains.
    """
    decay, no_decay = split_by_weight_decay(model.named_parameters())
    if not decay and not no_decay:
        raise ValueError("no parameter requires a gradient: every part of the model is frozen")
    groups: list[dict[str, Any]] = [
        {"params": list(decay.values()), "weight_decay": weight_decay},
        {"params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    # In one pass over the memory; elsewhere torch chooses, and gradient scaling has its say.
    kinds = {parameter.device.type for parameter in (*decay.values(), *no_decay.values())}
    is_fused = kinds == {"cpu"} or (kinds == {"cuda"} and not is_scaled)
    return AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True if is_fused else None)


@SCHEDULES.register("linear_warmup_cosine_lr")
@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine from `init_lr` to `min_lr` (Loshchilov and Hutter 2017).

    As in the original, the cosine runs over all steps, those of the warm-up included, so that the rate drops a
    little where the warm-up hands over. Unlike there, a warm-up longer than an epoch runs once and does not
    start again with every epoch.

    Args:
        init_lr: the rate at the end of the warm-up.
        min_lr: the rate at the end of training.
        warmup_lr: the rate of the first step; negative for none.
        warmup_steps: steps until `init_lr`.
        max_epoch, iters_per_epoch: their product is the number of steps.
        lr_decay_rate: not used by the cosine; factor per epoch of the step schedule.
    """

    init_lr: float
    min_lr: float
    max_epoch: int
    iters_per_epoch: int
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    lr_decay_rate: float = 1.0

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over all epochs."""
        if step < self.warmup_steps:
            start = self.init_lr if self.warmup_lr < 0 else self.warmup_lr
            return min(self.init_lr, start + (self.init_lr - start) * step / self.warmup_steps)
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        progress = step / (self.max_epoch * self.iters_per_epoch)
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULES.register("linear_warmup_step_lr")
@dataclass(frozen=True)
class StepSchedule(Schedule):
    """Linear warm-up, then a constant rate that each epoch multiplies by `lr_decay_rate`, down to `min_lr`."""

    def _after_warmup(self, step: int) -> float:
        return max(self.min_lr, self.init_lr * self.lr_decay_rate ** (step // self.iters_per_epoch))


def build_schedule(run: RunConfig) -> Schedule:
    """The schedule that a configuration names.

    Raises:
        ConfigError: no such schedule.
    """
    names = [setting.name for setting in fields(Schedule)]
    schedule: Schedule = SCHEDULES.build(run.lr_sched, **{name: getattr(run, name) for name in names})
    return schedule
