"""The frame encoder: EVA ViT-g/14 (Fang et al., "EVA", 2022), as BLIP-2 truncates it.

timm's `Eva` is exact for it, so this file only says which of timm's options make the published model:
a class token, learned absolute positions, biases for queries and values but not for keys, and no norm after
the last block (BLIP-2 puts its own, `vision_norm`, behind it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from video_llama.model import eva_block
from video_llama.model.activation import FrugalGELU
from video_llama.model.configuration import VideoLlamaVisionConfig
from video_llama.model.packed_block import PackedBlock, PatchProduct, can_pack
from video_llama.model.qformer import is_offloaded, trains
from video_llama.utils.threads import map_on_threads

__all__ = ["EvaVit", "build_eva_vit", "interpolate_position_table"]


class EvaVit(Eva):
    """timm's EVA ViT, which can be made to answer faster on a CPU."""

    patch_embed: nn.Module
    is_packed = False
    shares_images = False  # over threads, each of which takes its images through the whole encoder

    def pack(self) -> bool:
        """Make it answer faster on a CPU; elsewhere nothing is done.

        Images are shared out over threads. In bfloat16 the blocks are brought into the form of `packed_block.py`, if
        the CPU has AMX (`eva_block.why_not`): for good, and frozen, each weight being let go of once it is packed.
        Names and values of a `state_dict` stay as they are, but it holds copies; `parameters()` has no packed weights.
        A packed block is not called: its hooks do not run, and `forward_features` and the like are refused. Where
        images are shared out, a hook runs for each thread's part.

        Returns:
            whether the blocks are packed now.
        """
        if is_offloaded(self) or any(weight.device.type != "cpu" for weight in self.parameters()):
            return False
        self.shares_images = True
        if not self.is_packed and all(can_pack(block) for block in self.blocks):
            self.requires_grad_(False)
            self.patch_embed = PatchProduct(self.patch_embed)
            for number, block in enumerate(self.blocks):
                self.blocks[number] = PackedBlock(block)
            self.is_packed = True
        return self.is_packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EvaVit:
        if self.is_packed:
            moved = fn(torch.empty(0, dtype=torch.bfloat16))
            if moved.dtype != torch.bfloat16 or moved.device.type != "cpu":
                raise RuntimeError(
                    f"this model's frame encoder is packed for bfloat16 on the CPU and cannot become {moved.dtype} on "
                    f"{moved.device}: load it there (device=, dtype=), or load it with pack=False"
                )
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Images (images, 3, height, width) to all tokens (images, 1 + patches, width).

        Args:
            x: images.
            options: what timm's forward takes; nothing once the blocks are packed.

        Raises:
            RuntimeError: the blocks are packed, and there are options or gradients are wanted.
        """
        if self.is_packed:
            if options:
                raise RuntimeError(f"a packed frame encoder takes no {', '.join(options)}: load it with pack=False")
            if trains(self) or (x.requires_grad and torch.is_grad_enabled()):
                raise RuntimeError("a packed frame encoder lets no gradient through: load the model with pack=False")
            with torch.no_grad():
                return self._encode_packed(x)
        if is_offloaded(self):
            # timm's shorter way reads the layer's weight without calling the layer, which would bring the weight in.
            for block in self.blocks:
                block.attn.qkv_bias_separate = True
        encode = partial(super().forward, **options)
        tokens: Tensor = map_on_threads(encode, x) if self.shares_images and x.device.type == "cpu" else encode(x)
        return tokens

    def forward_features(self, *arguments: Any, **options: Any) -> Tensor:
        """As in timm.

        Raises:
            RuntimeError: the blocks are packed.
        """
        self._refuse_if_packed("forward_features")
        tokens: Tensor = super().forward_features(*arguments, **options)
        return tokens

    def forward_intermediates(self, *arguments: Any, **options: Any) -> Any:
        """As in timm.

        Raises:
            RuntimeError: the blocks are packed.
        """
        self._refuse_if_packed("forward_intermediates")
        return super().forward_intermediates(*arguments, **options)

    def _refuse_if_packed(self, name: str) -> None:
        if self.is_packed:
            raise RuntimeError(f"a packed frame encoder has no {name}: load the model with pack=False")

    def _encode_packed(self, pictures: Tensor) -> Tensor:
        patches = self.patch_embed(pictures)
        states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1).float()
        blocks, kept = zip(*(block.addresses() for block in self.blocks), strict=True)
        eva_block.forward(blocks, states.add_(self.pos_embed), torch.get_num_threads())
        del kept  # not before the blocks have read it
        return states.to(torch.bfloat16)


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
