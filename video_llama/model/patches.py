"""Patch embeddings as plain products: where patches do not overlap, a convolution is the slow way to the same sums."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchConv2d", "PatchConv3d"]


class _PatchProduct(nn.modules.conv._ConvNd):
    """A convolution that multiplies patches if its kernel steps by its own size; names and shapes of weights stay.

    On GPUs a three-dimensional convolution of this kind in bfloat16 takes torch 2.9 and newer ten to twenty times as
    long as the product.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, channels, *size) to (images, features, *patches), as a convolution; features are contiguous."""
        if self.stride != self.kernel_size or any(self.padding) or self.groups != 1:
            return super().forward(pixels)
        counts = [length // side for length, side in zip(pixels.shape[2:], self.kernel_size, strict=True)]
        for dimension, (count, side) in enumerate(zip(counts, self.kernel_size, strict=True)):
            # Each dimension becomes two: which patch, and where in it.
            cut = pixels.narrow(2 + 2 * dimension, 0, count * side)
            pixels = cut.unflatten(2 + 2 * dimension, (count, side))
        number = len(counts)
        order = (0, *range(2, 2 + 2 * number, 2), 1, *range(3, 3 + 2 * number, 2))
        patches = pixels.permute(order).reshape(len(pixels), math.prod(counts), -1)  # as the weight has them
        products = F.linear(patches, self.weight.flatten(1), self.bias)  # (images, patches, features)
        return products.transpose(1, 2).unflatten(2, counts)


class PatchConv2d(_PatchProduct, nn.Conv2d):
    """`nn.Conv2d` for patches."""


class PatchConv3d(_PatchProduct, nn.Conv3d):
    """`nn.Conv3d` for patches of a few frames each."""
