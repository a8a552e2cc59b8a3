"""The processors of media and captions that configs name, and the functions that read files with them."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from video_llama.constants import DEFAULT_NUM_FRAMES
from video_llama.errors import CheckpointError, ConfigError, translate_foreign
from video_llama.media.pixels import FramesInMemory, is_array
from video_llama.processor.media_processor import AudioInput, AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.registry import PROCESSORS
from video_llama.utils.devices import resolve_device

__all__ = ["BlipCaptionProcessor", "load_processor", "process_audio", "process_images", "process_video"]

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_WHITE_SPACE_RUN = re.compile(r"\s{2,}")


@PROCESSORS.register("alpro_video_eval")
def build_video_eval_processor(n_frms: int = DEFAULT_NUM_FRAMES, **settings: Any) -> MediaProcessor:
    """Build a processor that takes whole frames at equal steps: for evaluation and for use."""
    return _build(num_frames=n_frms, **settings)


@PROCESSORS.register("alpro_video_train")
def build_video_train_processor(
    n_frms: int = DEFAULT_NUM_FRAMES,
    sampling: Literal["uniform", "headtail"] = "headtail",
    min_scale: float = 0.5,
    max_scale: float = 1.0,
    **settings: Any,
) -> MediaProcessor:
    """Build a processor for training: random frames from both halves of a video, all cut to the same part."""
    return _build(num_frames=n_frms, sampling=sampling, crop_scale=(min_scale, max_scale), **settings)


@PROCESSORS.register("blip2_image_eval")
def build_image_eval_processor(**settings: Any) -> MediaProcessor:
    """Build a processor that takes whole images: for evaluation and for use."""
    return _build(**settings)


@PROCESSORS.register("blip2_image_train")
def build_image_train_processor(min_scale: float = 0.5, max_scale: float = 1.0, **settings: Any) -> MediaProcessor:
    """Build a processor for training: images cut to a random part and mirrored at random."""
    return _build(crop_scale=(min_scale, max_scale), **settings)


@PROCESSORS.register("blip_caption")
class BlipCaptionProcessor:
    """Lower-case a caption, remove punctuation and limit its length, as BLIP does (Li et al. 2022, arXiv 2201.12086).

    Args:
        prompt: text in front of every caption.
        max_words: most words kept, those of the prompt not counted.
    """

    def __init__(self, prompt: str = "", max_words: int = 50) -> None:
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """Return the cleaned caption."""
        plain = _PUNCTUATION.sub(" ", caption.lower())
        plain = _WHITE_SPACE_RUN.sub(" ", plain).rstrip("\n").strip(" ")
        # Words are what single spaces separate: a line break inside a caption stays, and counts as no gap.
        return self.prompt + " ".join(plain.split(" ")[: self.max_words])


def load_processor(name: str | os.PathLike[str] = "alpro_video_eval", **settings: Any) -> MediaProcessor:
    """Build the media processor that a config's name and settings describe.

    Args:
        name: one of the registry `PROCESSORS`; or a saved folder, whose own processor is loaded.
        settings: `n_frms`, `image_size`, `mean`, `std`, `min_scale`, `max_scale`, or fields of
            `MediaProcessor`; of a saved folder only the last.

    Raises:
        ConfigError: an unknown name, or settings that make no sense.
        CheckpointError: the folder is damaged.
    """
    if os.path.isfile(os.path.join(name, "processor_config.json")):
        with translate_foreign(CheckpointError, name, "it must hold what save_pretrained of the processor wrote"):
            whole = VideoLlamaProcessor.from_pretrained(name)
        return _replaced(whole.media_processor, settings)
    processor = PROCESSORS.build(os.fspath(name), **settings)
    if not isinstance(processor, MediaProcessor):
        raise ConfigError(f"{name!r} is a processor of text, not of media")
    return processor


def process_video(
    path: Any,
    processor: MediaProcessor,
    device: torch.device | str = "cpu",
    *,
    num_frames: int | None = None,
    audio: bool = True,
) -> tuple[VideoFrames, AudioSegments | None]:
    """Run `MediaProcessor.process_video` and put the results on a device.

    Raises:
        MediaError: as `MediaProcessor.process_video`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    frames, sound = processor.process_video(path, num_frames=num_frames, audio=audio)
    return frames.to(device), None if sound is None else sound.to(device)


def process_images(
    images: Any, processor: MediaProcessor, device: torch.device | str = "cpu"
) -> VideoFrames | list[VideoFrames]:
    """Run `MediaProcessor.process_image` on one image or on each of a list or batch; put the results on a device.

    Raises:
        MediaError: as `MediaProcessor.process_image`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    # Values of a batch have one range.
    if is_array(images) and images.ndim == 4:
        batch = FramesInMemory(images)
        images = batch.take(range(len(batch)))
    if isinstance(images, (list, tuple)):
        return [processor.process_image(image).to(device) for image in images]
    return processor.process_image(images).to(device)


def process_audio(sound: AudioInput, processor: MediaProcessor, device: torch.device | str = "cpu") -> AudioSegments:
    """Run `MediaProcessor.process_audio` and put the result on a device.

    Raises:
        MediaError: as `MediaProcessor.process_audio`.
        ConfigError: there is no such device.
    """
    device = resolve_device(device)
    return processor.process_audio(sound).to(device)


def _build(**settings: Any) -> MediaProcessor:
    # Configs write `mean: null` for the default.
    return _replaced(MediaProcessor(), {name: value for name, value in settings.items() if value is not None})


def _replaced(processor: MediaProcessor, settings: dict[str, Any]) -> MediaProcessor:
    known = {setting.name for setting in fields(MediaProcessor)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(
            f"unknown settings of a media processor: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    return replace(processor, **settings)
