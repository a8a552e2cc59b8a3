"""Convert what was trained to the layout of the original's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    PROJECTION,
    QFORMER,
    VIDEO_BRANCH,
    part_of,
    to_original_name,
)
from video_llama.config import Config
from video_llama.model.encoder_configuration import FrameEncoderConfig
from video_llama.model.parts import AUDIO_PARTS, adapter_parameters, trained_parts
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["original_checkpoint"]


def original_checkpoint(
    model: VideoLlamaForConditionalGeneration, trained: Mapping[str, Tensor], config: Config, epoch: int
) -> dict[str, Any]:
    """Return `{"model", "config", "epoch"}` as `ckpt` and `ckpt_2` read it.

    Each branch of which a Q-Former or a projection trained is whole, with the frozen tensors of `model` beside what
    trained (`trained`: our names, on the CPU), under the original's names. So is the video branch where the frame
    encoder, its Q-Former or the language model trained, of which only these are added. There is no optimizer and no
    buffer. The configuration is kept as plain values.
    """
    whole = trained_parts(config.model)
    parts = set()
    if whole & AUDIO_PARTS:
        parts.add(AUDIO_BRANCH)
    if whole - AUDIO_PARTS:
        parts |= {VIDEO_BRANCH, PROJECTION}
        if isinstance(model.config.vision_config, FrameEncoderConfig):
            # No file of BLIP-2's fits another frame encoder.
            parts.add(QFORMER)
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    weights = {}
    for name, parameter in model.named_parameters():
        # Adapters have files of their own.
        if id(parameter) in adapters:
            continue
        # Weights beside them lie one level deeper.
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        part = part_of(plain)
        if part is not None and (name in trained or part in parts):
            value = trained[name] if name in trained else parameter.detach().cpu()
            weights[to_original_name(plain)] = value.contiguous()
    return {"model": weights, "config": OmegaConf.to_container(OmegaConf.structured(config)), "epoch": epoch}
