"""Constants shared by every part of the package; `from video_llama.constants import *` exports `__all__`."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "AUDIO_PLACEHOLDER",
    "AUDIO_SAMPLE_RATE_HZ",
    "DEFAULT_AUDIO_PATCH_TOKEN",
    "DEFAULT_IMAGE_PATCH_TOKEN",
    "DEFAULT_IMAGE_SIZE",
    "DEFAULT_NUM_FRAMES",
    "IGNORE_INDEX",
    "IMAGE_MEAN",
    "IMAGE_PLACEHOLDER",
    "IMAGE_STD",
    "Modality",
]

Modality = Literal["video", "image", "audio"]
"""What a media item is."""

IGNORE_INDEX = -100
"""Label of a token that carries no loss (the value `torch.nn.functional.cross_entropy` ignores)."""

IMAGE_PLACEHOLDER = "<ImageHere>"
"""Where the tokens of a video or an image go in a prompt."""

AUDIO_PLACEHOLDER = "<AudioHere>"
"""Where the tokens of an audio track go in a prompt."""

# The names the original code uses for the same two strings.
DEFAULT_IMAGE_PATCH_TOKEN = IMAGE_PLACEHOLDER
DEFAULT_AUDIO_PATCH_TOKEN = AUDIO_PLACEHOLDER

# CLIP's per-channel statistics (Radford et al. 2021), for RGB values in 0…1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

DEFAULT_NUM_FRAMES = 8
DEFAULT_IMAGE_SIZE = 224
AUDIO_SAMPLE_RATE_HZ = 16_000
