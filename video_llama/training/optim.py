"""Choose what trains, and build its optimizer and the two learning-rate schedules of the published recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import nn
from torch.optim import AdamW

from video_llama.config import ModelConfig, RunConfig
from video_llama.errors import ConfigError
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.registry import SCHEDULES

__all__ = [
    "Schedule",
    "StepSchedule",
    "TrainedParts",
    "build_optimizer",
    "build_schedule",
    "freeze_for_training",
    "split_by_weight_decay",
    "trained_branches",
]


@dataclass(frozen=True)
class TrainedParts:
    """Which small parts train; the encoders and the language model never do.

    Args:
        video: the video Q-Former, its queries and the frame positions (`frozen_video_Qformer: False`).
        projection: the video projection (`frozen_llama_proj: False`).
        audio: the audio Q-Former, its queries, the segment positions and the audio projection
            (`frozen_audio_Qformer: False`).
    """

    video: bool
    projection: bool
    audio: bool


def trained_branches(config: ModelConfig) -> TrainedParts:
    """Return the parts that a configuration trains.

    Raises:
        ConfigError: nothing trains, an encoder should train, or the audio branch should train but is not built.
    """
    if not config.freeze_vit or not config.freeze_qformer:
        raise ConfigError("model.freeze_vit and model.freeze_qformer must be True: the encoders do not train")
    parts = TrainedParts(not config.frozen_video_Qformer, not config.frozen_llama_proj, not config.frozen_audio_Qformer)
    if not (parts.video or parts.projection or parts.audio):
        raise ConfigError(
            "everything is frozen: set model.frozen_video_Qformer and frozen_llama_proj, or frozen_audio_Qformer, "
            "to False"
        )
    if parts.audio and not config.equip_audio_branch:
        raise ConfigError("model.frozen_audio_Qformer is False, but equip_audio_branch is False, too")
    return parts


def freeze_for_training(model: VideoLlamaForConditionalGeneration, parts: TrainedParts) -> None:
    """Set `requires_grad` so that only the given parts train (Zhang, Li and Bing 2023, section 2.3).

    Raises:
        ConfigError: the audio branch should train, but the model has none.
    """
    # Freeze everything first, so that only the parts named below train.
    model.requires_grad_(False)
    video, audio = model.video_branch, model.audio_branch
    if parts.video:
        video.video_qformer.requires_grad_(True)
        video.frame_position_embedding.requires_grad_(True)
        video.video_query_tokens.requires_grad_(True)
    if parts.projection:
        video.projection.requires_grad_(True)
    if parts.audio:
        if audio is None:
            raise ConfigError("the audio branch cannot train: the model was built without it")
        audio.audio_qformer.requires_grad_(True)
        audio.segment_position_embedding.requires_grad_(True)
        audio.audio_query_tokens.requires_grad_(True)
        audio.projection.requires_grad_(True)


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
    model: nn.Module, *, lr: float, weight_decay: float, beta2: float = 0.999, is_scaled: bool = False
) -> AdamW:
    """Build AdamW over the model's trainable parameters, in the recipe's two groups.

    Args:
        is_scaled: the loss is scaled, as float16 needs it.

    Raises:
        ValueError: nothing in the model trains.
    """
    decay, no_decay = (list(group.values()) for group in split_by_weight_decay(model.named_parameters()))
    devices = {parameter.device.type for parameter in decay + no_decay}
    if not devices:
        raise ValueError("no parameter requires a gradient: every part of the model is frozen")
    # The fused kernel goes through memory once. Elsewhere, and with gradient scaling on a GPU, torch chooses.
    is_fused = devices == {"cpu"} or (devices == {"cuda"} and not is_scaled)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(0.9, beta2), fused=is_fused or None)


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
