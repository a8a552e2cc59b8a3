"""The frame encoder: EVA ViT-g/14 (Fang et al., "EVA", 2022), as BLIP-2 truncates it.

timm's `Eva` is exact for it, so this file only says which of timm's options make the published model:
a class token, learned absolute positions, biases for queries and values but not for keys, and no norm after
the last block (BLIP-2 puts its own, `vision_norm`, behind it).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from video_llama.model.activation import FrugalGELU
from video_llama.model.configuration import VideoLlamaVisionConfig
from video_llama.model.patches import PatchConv2d
from video_llama.model.qformer import is_offloaded

__all__ = ["EvaVit", "build_eva_vit", "interpolate_position_table"]


class EvaVit(Eva):
    """timm's EVA ViT, which knows accelerate's offloading."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Images (images, 3, height, width) to all tokens (images, 1 + patches, width).

        Args:
            x: images.
            options: what timm's forward takes.
        """
        if is_offloaded(self):
            # timm's shorter way reads the layer's weight without calling the layer, which would bring the weight in.
            for block in self.blocks:
                block.attn.qkv_bias_separate = True
        tokens: Tensor = super().forward(x, **options)
        return tokens


def build_eva_vit(config: VideoLlamaVisionConfig) -> EvaVit:
    """An uninitialised-by-checkpoint EVA ViT that maps (images, 3, H, W) to all tokens (images, 1 + patches, width)."""
    encoder = EvaVit(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        # timm truncates width * ratio to an integer; the half keeps rounding from landing one below.
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        drop_path_rate=config.drop_path_rate,
        num_classes=0,
        global_pool="",
    )
    encoder.norm = nn.Identity()
    side = config.patch_size
    encoder.patch_embed.proj = PatchConv2d(3, config.hidden_size, side, stride=side)
    for block in encoder.blocks:
        block.mlp.act = FrugalGELU()
    return encoder


def interpolate_position_table(table: Tensor, num_patches: int) -> Tensor:
    """Fit a learned position table to another image size, as He et al. (MAE, 2022) do: bicubic, class token apart.

    Args:
        table: (1, 1 + old_patches, width), the class token first; old_patches is a square number.
        num_patches: patches of the new image size, a square number.

    Returns:
        (1, 1 + num_patches, width), in the table's dtype; the table itself if the size is already right.
    """
    old_side, new_side = math.isqrt(table.shape[1] - 1), math.isqrt(num_patches)
    if old_side == new_side:
        return table
    class_token, patches = table[:, :1], table[:, 1:]
    grid = patches.reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)  # (1, width, old_side, old_side)
    grid = F.interpolate(grid.float(), size=(new_side, new_side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)  # (1, num_patches, width)
    return torch.cat([class_token, patches], dim=1)
