"""Take one thing away from the model or from its input, to see what it contributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from video_llama.errors import ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.processor.media_processor import AudioSegments, VideoFrames

__all__ = ["ABLATIONS", "Media", "apply_to_media", "apply_to_model"]

ABLATIONS = {
    "frame_positions": "the frame position embeddings are zero",
    "video_qformer": "the video Q-Former returns its queries as they are",
    "audio_qformer": "the audio Q-Former returns its queries as they are",
    "audio": "audio tracks are left out; an audio file becomes silence",
    "shuffle_frames": "the frames come in random order",
    "swap_audio": "the audio is that of another file",
}

Media = tuple[VideoFrames | None, AudioSegments | None]
"""Frames and audio of one file."""


class _IdentityQFormer(nn.Module):
    """Stands in for a Q-Former and returns its queries."""

    def forward(self, query_embeds: Tensor, **ignored: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=query_embeds)


def apply_to_model(name: str | None, model: VideoLlama) -> None:
    """Change the model in place, if the ablation is one of the model.

    Raises:
        ConfigError: an unknown ablation, or one of the audio branch of a model that has none.
    """
    if name is None:
        return
    if name not in ABLATIONS:
        raise ConfigError(f"unknown ablation {name!r}. Known: {', '.join(ABLATIONS)}")
    video, audio = model.model.video_branch, model.model.audio_branch
    if "audio" in name and audio is None:
        raise ConfigError(f"ablation {name!r}: the model has no audio branch")
    if name == "frame_positions":
        video.frame_position_embedding.weight.data.zero_()
    elif name == "video_qformer":
        video.video_qformer = _IdentityQFormer()
    elif name == "audio_qformer" and audio is not None:
        audio.audio_qformer = _IdentityQFormer()


def apply_to_media(name: str | None, items: Sequence[Media], seed: int = 0) -> list[Media]:
    """Return the media of all files, changed if the ablation is one of the media."""
    if name == "audio":
        return [_without_audio(item) for item in items]
    if name == "shuffle_frames":
        generator = torch.Generator().manual_seed(seed)
        return [_with_shuffled_frames(item, generator) for item in items]
    if name == "swap_audio":
        return _with_swapped_audio(items, seed)
    return list(items)


def _without_audio(item: Media) -> Media:
    frames, audio = item
    if frames is not None or audio is None:
        return frames, None
    # An audio file has nothing else to ask about.
    return None, replace(audio, values=torch.full_like(audio.values, float(audio.values.min())))


def _with_shuffled_frames(item: Media, generator: torch.Generator) -> Media:
    frames, audio = item
    if frames is None:
        return item
    # The input of the model and the frames to show must have the same order.
    order = torch.randperm(len(frames.pixel_values), generator=generator)
    return replace(frames, pixel_values=frames.pixel_values[order], frames=frames.frames[order.numpy()]), audio


def _with_swapped_audio(items: Sequence[Media], seed: int) -> list[Media]:
    """Give each file's audio to another file, drawn at random; files without audio stay without."""
    places = [index for index, (_, audio) in enumerate(items) if audio is not None]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    swapped = list(items)
    # Along a circle, so that no file keeps its own.
    for position, next_position in zip(order, order[1:] + order[:1], strict=True):
        frames, _ = items[places[position]]
        swapped[places[position]] = (frames, items[places[next_position]][1])
    return swapped
