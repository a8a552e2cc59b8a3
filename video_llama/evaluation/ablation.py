"""Take one thing away from the model or from what it is given, to see what that thing is good for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.processor.media_processor import AudioSegments, VideoFrames

__all__ = ["ABLATIONS", "apply_to_media", "apply_to_model"]

ABLATIONS = {
    "frame_positions": "the frame position embeddings are zero",
    "video_qformer": "the video Q-Former returns its queries as they are",
    "audio_qformer": "the audio Q-Former returns its queries as they are",
    "audio": "sound is not listened to; a sound file is heard as silence",
    "shuffle_frames": "the frames come in random order",
    "swap_audio": "the sound is that of another file",
}

Media = tuple[VideoFrames | None, AudioSegments | None]
"""What is seen and what is heard of one file."""


class _Answer(NamedTuple):
    last_hidden_state: Tensor


class _BlindQFormer(nn.Module):
    """In the place of a Q-Former: looks at nothing."""

    def forward(self, query_embeds: Tensor, **ignored: Any) -> _Answer:
        return _Answer(query_embeds)


def apply_to_model(name: str | None, model: VideoLlama) -> None:
    """Change the model in place, where the ablation is of the model.

    Raises:
        ConfigError: no such ablation, or the model has not the part.
    """
    if name is None:
        return
    if name not in ABLATIONS:
        raise ConfigError(f"unknown ablation {name!r}. Known: {', '.join(ABLATIONS)}")
    branches = model.model.video_branch, model.model.audio_branch
    if name in ("audio_qformer", "audio", "swap_audio") and branches[1] is None:
        raise ConfigError(f"ablation {name!r}: the model has no audio branch")
    if name == "frame_positions":
        branches[0].frame_position_embedding.weight.data.zero_()
    elif name == "video_qformer":
        branches[0].video_qformer = _BlindQFormer()
    elif name == "audio_qformer":
        assert branches[1] is not None
        branches[1].audio_qformer = _BlindQFormer()


def apply_to_media(name: str | None, items: Sequence[Media], seed: int = 0) -> list[Media]:
    """The media of all files as the ablation leaves them."""
    changes: dict[str, Callable[[], list[Media]]] = {
        "audio": lambda: [_deafened(item) for item in items],
        "shuffle_frames": lambda: _shuffled(items, seed),
        "swap_audio": lambda: _swapped(items, seed),
    }
    return changes[name]() if name in changes else list(items)


def _deafened(item: Media) -> Media:
    frames, sound = item
    if frames is None and sound is not None:  # something must be introduced
        return None, replace(sound, values=torch.full_like(sound.values, float(sound.values.min())))
    return frames, None


def _shuffled(items: Sequence[Media], seed: int) -> list[Media]:
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[Media] = []
    for frames, sound in items:
        if frames is not None:
            order = torch.randperm(len(frames.pixel_values), generator=generator)
            frames = replace(frames, pixel_values=frames.pixel_values[order], frames=frames.frames[order.numpy()])
        shuffled.append((frames, sound))
    return shuffled


def _swapped(items: Sequence[Media], seed: int) -> list[Media]:
    """Each sound to another file, drawn at random; files without sound stay without."""
    places = [index for index, (_, sound) in enumerate(items) if sound is not None]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    swapped = list(items)
    for position, next_position in zip(order, order[1:] + order[:1], strict=True):  # a circle: none keeps its own
        frames, _ = items[places[position]]
        swapped[places[position]] = (frames, items[places[next_position]][1])
    return swapped
