"""Pixels to what the vision encoder takes, and the random crops of training.

All randomness comes from torch's global generator: saving and restoring its state gives the same crops
again.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from video_llama.constants import IMAGE_MEAN, IMAGE_STD
from video_llama.media.image import resize_image

__all__ = [
    "normalize_anew",
    "normalize_frames",
    "normalize_pixels",
    "random_crop_frames",
    "random_crop_image",
    "random_source",
]

_Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_ASPECT_RATIOS = (3 / 4, 4 / 3)


def normalize_frames(
    frames: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Scale to 0…1, then subtract the mean and divide by the standard deviation of each channel.

    Args:
        frames: (frames, height, width, 3), uint8, RGB.

    Returns:
        (frames, 3, height, width), float32.
    """
    return normalize_pixels(torch.tensor(frames).permute(0, 3, 1, 2), mean, std).contiguous()


def normalize_pixels(
    pixels: torch.Tensor, mean: tuple[float, float, float] = IMAGE_MEAN, std: tuple[float, float, float] = IMAGE_STD
) -> torch.Tensor:
    """Normalise as `normalize_frames` does, but (frames, 3, height, width), uint8, on any device."""
    scaled = pixels.to(torch.float32) / 255
    means = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    deviations = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    return (scaled - means) / deviations


def normalize_anew(pixels: torch.Tensor, before: _Statistics, now: _Statistics) -> torch.Tensor:
    """Return normalised pixels as another mean and standard deviation would have made them.

    Args:
        pixels: (frames, 3, height, width), floating point.
        before, now: mean and standard deviation, per channel.
    """
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for values in (*before, *now)
    )
    return (pixels * old_std + old_mean - new_mean) / new_std


def random_crop_frames(frames: NDArray[np.uint8], size: int, scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Cut one random part out of all frames alike and enlarge it, bicubic.

    Args:
        frames: (frames, height, width, 3), uint8.
        size: height and width of the result.
        scale: smallest and largest share of the area to keep.

    Returns:
        (frames, size, size, 3), uint8.
    """
    pixels = torch.tensor(frames).permute(0, 3, 1, 2)  # (frames, 3, height, width)
    top, left, height, width = RandomResizedCrop.get_params(pixels, list(scale), list(_ASPECT_RATIOS))
    part = pixels[..., top : top + height, left : left + width].to(torch.float32)
    enlarged = torch.nn.functional.interpolate(part, (size, size), mode="bicubic", align_corners=False)
    # Bicubic overshoots at edges: clamp, where the reference lets the bytes wrap around to the other end.
    result: NDArray[np.uint8] = enlarged.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result


def random_crop_image(image: Image.Image, size: int, scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Resize a random part of an image and mirror it every other time: (size, size, 3), uint8."""
    top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(_ASPECT_RATIOS))
    pixels = resize_image(image.crop((left, top, left + width, top + height)), size)
    is_mirrored = bool(torch.rand(()) < 0.5)
    return pixels[:, ::-1].copy() if is_mirrored else pixels


def random_source() -> random.Random:
    """Return Python's random numbers, seeded from torch's generator."""
    return random.Random(int(torch.randint(2**62, ())))
