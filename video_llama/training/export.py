"""Convert what was trained to the layout of the original's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from video_llama.checkpoints.weight_mapping import AUDIO_BRANCH, PROJECTION, VIDEO_BRANCH, part_of, to_original_name
from video_llama.config import Config
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.optim import trained_branches

__all__ = ["original_checkpoint"]


def original_checkpoint(
    model: VideoLlamaForConditionalGeneration, trained: Mapping[str, Tensor], config: Config, epoch: int
) -> dict[str, Any]:
    """Return `{"model", "config", "epoch"}` as `ckpt` and `ckpt_2` read it.

    Each trained branch is whole, with the frozen tensors of `model` beside what trained (`trained`: our names, on the
    CPU), under the original's names; no optimizer and no buffers. The configuration is kept as plain values.
    """
    trains = trained_branches(config.model)
    parts = {VIDEO_BRANCH, PROJECTION} if trains.video or trains.projection else set()
    if trains.audio:
        parts.add(AUDIO_BRANCH)
    weights = {}
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            value = trained[name] if name in trained else parameter.detach().cpu()
            weights[to_original_name(name)] = value.contiguous()
    return {"model": weights, "config": OmegaConf.to_container(OmegaConf.structured(config)), "epoch": epoch}
