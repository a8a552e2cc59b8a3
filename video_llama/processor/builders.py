"""The media processors that configs name, and the functions that read files with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch

from video_llama.constants import DEFAULT_NUM_FRAMES
from video_llama.errors import ConfigError
from video_llama.media.image import ImageInput
from video_llama.processor.media_processor import AudioInput, AudioSegments, MediaProcessor, VideoFrames
from video_llama.registry import PROCESSORS
from video_llama.utils.devices import resolve_device

__all__ = ["load_processor", "process_audio", "process_images", "process_video"]


@PROCESSORS.register("alpro_video_eval")
def build_video_eval_processor(n_frms: int = DEFAULT_NUM_FRAMES, **settings: Any) -> MediaProcessor:
    """Frames at equal steps, whole: for evaluation and for use."""
    return _build(num_frames=n_frms, **settings)


@PROCESSORS.register("alpro_video_train")
def build_video_train_processor(
    n_frms: int = DEFAULT_NUM_FRAMES,
    sampling: Literal["uniform", "headtail"] = "headtail",
    min_scale: float = 0.5,
    max_scale: float = 1.0,
    **settings: Any,
) -> MediaProcessor:
    """Frames at random from both halves of the video, all cut to the same random part: for training."""
    return _build(num_frames=n_frms, sampling=sampling, crop_scale=(min_scale, max_scale), **settings)


@PROCESSORS.register("blip2_image_eval")
def build_image_eval_processor(**settings: Any) -> MediaProcessor:
    """Images, whole: for evaluation and for use."""
    return _build(**settings)


@PROCESSORS.register("blip2_image_train")
def build_image_train_processor(min_scale: float = 0.5, max_scale: float = 1.0, **settings: Any) -> MediaProcessor:
    """Images cut to a random part and mirrored at random: for training."""
    return _build(crop_scale=(min_scale, max_scale), **settings)


def load_processor(name: str = "alpro_video_eval", **settings: Any) -> MediaProcessor:
    """The media processor that a config's name and settings mean.

    Args:
        name: one of the registry `PROCESSORS`.
        settings: `n_frms`, `image_size`, `mean`, `std`, `min_scale`, `max_scale`, or fields of
            `MediaProcessor`.
    """
    processor = PROCESSORS.build(name, **settings)
    if not isinstance(processor, MediaProcessor):
        raise ConfigError(f"{name!r} is a processor of text, not of media")
    return processor


def process_video(
    path: str | os.PathLike[str],
    processor: MediaProcessor,
    device: torch.device | str = "cpu",
    *,
    num_frames: int | None = None,
    audio: bool = True,
) -> tuple[VideoFrames, AudioSegments | None]:
    """`MediaProcessor.process_video` with the results on a device.

    Raises:
        MediaError: as `MediaProcessor.process_video`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    frames, sound = processor.process_video(path, num_frames=num_frames, audio=audio)
    return frames.to(device), None if sound is None else sound.to(device)


def process_images(
    images: ImageInput | Sequence[ImageInput], processor: MediaProcessor, device: torch.device | str = "cpu"
) -> VideoFrames | list[VideoFrames]:
    """`MediaProcessor.process_image` for one image, or for each of a list, with the results on a device.

    Raises:
        MediaError: as `MediaProcessor.process_image`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)):
        return [processor.process_image(image).to(device) for image in images]
    return processor.process_image(images).to(device)


def process_audio(sound: AudioInput, processor: MediaProcessor, device: torch.device | str = "cpu") -> AudioSegments:
    """`MediaProcessor.process_audio` with the result on a device.

    Raises:
        MediaError: as `MediaProcessor.process_audio`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    return processor.process_audio(sound).to(device)


def _build(**settings: Any) -> MediaProcessor:
    known = {setting.name for setting in fields(MediaProcessor)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(
            f"unknown settings of a media processor: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    # Configs write `mean: null` for the default.
    return MediaProcessor(**{name: value for name, value in settings.items() if value is not None})
