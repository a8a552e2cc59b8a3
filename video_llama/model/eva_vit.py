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
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaVisionConfig
from video_llama.model.layers import InplaceGELU, PatchConv2d

__all__ = ["build_eva_vit", "interpolate_position_table"]


class FrameAttention(EvaAttention):
    """timm's attention of EVA with the biases added in the product, where its layer is a plain one.

    Any other layer must be called: accelerate's offloading brings the weight in for the call, and a PEFT adapter
    adds its own part.
    """

    def forward(self, x: Tensor, *ignored: Any, **none: Any) -> Tensor:
        """Attend within (images, tokens, width); further arguments of timm have no meaning for this model."""
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        if type(self.qkv) is nn.Linear and not hasattr(self.qkv, "_hf_hook"):
            states = F.linear(x, self.qkv.weight, bias)  # (images, tokens, 3 * width)
        else:
            states = self.qkv(x) + bias
        heads = states.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))  # (images, heads, tokens, head_width)
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


def build_eva_vit(config: VideoLlamaVisionConfig) -> Eva:
    """Build an EVA ViT, not yet loaded, that maps (images, 3, H, W) to all tokens (images, 1 + patches, width)."""
    encoder = Eva(
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
    # What timm has no option for: no last norm, patches as products, biases in the product, GELU in place.
    encoder.norm = nn.Identity()
    side = config.patch_size
    encoder.patch_embed.proj = PatchConv2d(3, config.hidden_size, side, stride=side)
    for block in encoder.blocks:
        block.attn = FrameAttention(config.hidden_size, config.num_attention_heads, scale_norm=False)
        block.mlp.act = InplaceGELU()
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
