"""Build the optimizer of what trains, and the two learning-rate schedules of the published recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from torch import nn
from torch.optim import AdamW

from video_llama.config import RunConfig
from video_llama.model.parts import ADAPTERS, adapter_parameters, part_of_parameter
from video_llama.registry import SCHEDULES

__all__ = [
    "Schedule",
    "StepSchedule",
    "build_optimizer",
    "build_schedule",
    "split_by_weight_decay",
]


def split_by_weight_decay(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split trainable parameters into those with weight decay and those without: vectors and biases."""
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        # Weight decay is meant for the weights of products, not for norms and biases.
        if parameter.ndim < 2 or "bias" in name:
            no_decay[name] = parameter
        else:
            decay[name] = parameter
    return decay, no_decay


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    beta2: float = 0.999,
    is_scaled: bool = False,
    part_lr: Mapping[str, float] | None = None,
) -> AdamW:
    """Build AdamW over the model's trainable parameters, in the recipe's two groups for each learning rate.

    Args:
        is_scaled: the loss is scaled, as float16 needs it.
        part_lr: the rates of single parts, and of the adapters (`lora`), that differ from `lr`.

    Raises:
        ValueError: nothing in the model trains.
    """
    rates = _rates(model, lr, part_lr or {})
    decay, no_decay = split_by_weight_decay(model.named_parameters())
    devices = {parameter.device.type for parameter in [*decay.values(), *no_decay.values()]}
    if not devices:
        raise ValueError("no parameter requires a gradient: every part of the model is frozen")
    groups = []
    # The recipe's own rate comes first, so that its two groups are the first and the second in every run.
    for rate in dict.fromkeys([lr, *rates.values()]):
        for parameters, decay_of_group in ((decay, weight_decay), (no_decay, 0.0)):
            held = [parameter for name, parameter in parameters.items() if rates[name] == rate]
            if held or rate == lr:
                groups.append({"params": held, "weight_decay": decay_of_group, "lr": rate})
    # The fused kernel goes through memory once. Elsewhere, and with gradient scaling on a GPU, torch chooses.
    is_fused = devices == {"cpu"} or (devices == {"cuda"} and not is_scaled)
    return AdamW(groups, lr=lr, betas=(0.9, beta2), fused=is_fused or None)


def _rates(model: nn.Module, lr: float, part_lr: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rate of each trainable parameter, by name."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    rates = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = ADAPTERS if id(parameter) in adapters else part_of_parameter(name)
            rates[name] = part_lr.get(part or "", lr)
    return rates


@SCHEDULES.register("linear_warmup_cosine_lr")
@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine from `init_lr` to `min_lr` (Loshchilov and Hutter 2017).

    As in the original, the cosine runs over all steps, those of the warm-up included, so the rate drops a little
    where the warm-up ends. Unlike there, a warm-up longer than an epoch runs once, not again in every epoch.

    Args:
        init_lr, min_lr: the rate at the end of the warm-up, and of training.
        warmup_lr: the rate of the first iteration; negative for `init_lr`, that is, no warm-up.
        warmup_steps: iterations of the warm-up.
        lr_decay_rate: factor per epoch of the step schedule; the cosine does not use it.
    """

    init_lr: float
    min_lr: float
    max_epoch: int
    iters_per_epoch: int
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    lr_decay_rate: float = 1.0

    def lr(self, step: int) -> float:
        """Return the learning rate of iteration `step`, counted from 0 over all epochs.

        Iterations are batches of each process. With `run.accum_grad_iters`, a step of the optimizer has several.
        """
        if step >= self.warmup_steps:
            return self._after_warmup(step)
        start = self.warmup_lr
        if start < 0:
            start = self.init_lr
        return min(self.init_lr, start + (self.init_lr - start) * step / self.warmup_steps)

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
    """Build the schedule that `run.lr_sched` names.

    Raises:
        ConfigError: no such schedule.
    """
    options = {field.name: getattr(run, field.name) for field in fields(Schedule)}
    schedule: Schedule = SCHEDULES.build(run.lr_sched, **options)
    return schedule
