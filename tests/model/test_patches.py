"""Patches as products: the same as the convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from video_llama.model.layers import PatchConv2d, PatchConv3d

IMAGES, CLIPS = (2, 3, 29, 28), (2, 3, 4, 28, 30)


@pytest.mark.parametrize(
    ("patches", "convolve", "shape", "kernel", "stride"),
    [
        (PatchConv2d, F.conv2d, IMAGES, (7, 7), (7, 7)),  # a row of pixels remains
        (PatchConv2d, F.conv2d, IMAGES, (7, 7), (5, 7)),
        (PatchConv3d, F.conv3d, CLIPS, (2, 14, 7), (2, 14, 7)),
        (PatchConv3d, F.conv3d, CLIPS, (2, 14, 14), (1, 7, 7)),
    ],
)
def test_patches_are_what_the_convolution_gives_whether_they_overlap_or_not(
    patches: type[nn.Module], convolve: object, shape: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, pixels = patches(3, 8, kernel, stride=stride), torch.randn(shape)
    expected = convolve(pixels, layer.weight, layer.bias, stride=stride)
    torch.testing.assert_close(layer(pixels), expected, rtol=1e-5, atol=1e-5)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (8, 3, *kernel),
        "bias": (8,),
    }
