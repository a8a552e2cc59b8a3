"""A loaded model in a few words: its name, size, precision and modalities."""

from __future__ import annotations

import os
from pathlib import Path

from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["in_words", "summarize_model"]


def summarize_model(model: VideoLlamaForConditionalGeneration, origin: str | os.PathLike[str] | None) -> str:
    """Return a line such as "video-llama-tiny, 5.4 M parameters, float32, frames and audio".

    Args:
        model: the model.
        origin: what it was loaded from, if from files.
    """
    name = type(model).__name__
    if origin is not None:
        name = Path(origin).name
    precision = str(model.dtype).removeprefix("torch.")
    if getattr(model.config, "quantization_config", None) is not None:
        precision += ", quantized"
    modalities = "frames only"
    if model.audio_branch is not None:
        modalities = "frames and audio"
    return f"{name}, {in_words(model.num_parameters())} parameters, {precision}, {modalities}"


def in_words(number: int) -> str:
    """Return a number of parameters such as 6738415616 as "6.7 B"."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.1f} M"
