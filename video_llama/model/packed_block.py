"""The frame encoder's blocks as an x86 CPU computes them fastest in bfloat16: nothing but inference, the same numbers.

Where AMX makes the matrix products fast, all that lies between them counts. So weights are packed once into the order
oneDNN multiplies them in, biases and residual sums are done by the products themselves, and products take the images
one by one, all of them before the next weight, so that one image's states stay in a core's cache. The GELU stays
an operation of its own: as part of the product it takes as long.

The fused products are operators that torch keeps for what `torch.compile` generates. `can_pack` says whether
this torch and this CPU have them; without them timm's own blocks do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from video_llama.utils.utils import cpu_has

__all__ = ["PackedBlock", "PackedLinear", "PatchProduct", "all_weights", "can_pack"]

MIN_WIDTH = 512
"""In narrower models calling an operator for every image costs more than packing gains."""

ROW_MULTIPLE = 16
"""Attention runs a fifth faster when the number of keys is a multiple of the CPU's tiles of 16 rows."""


def can_pack(block: EvaBlock) -> bool:
    """Whether a block's weights are of the kind that gains, and torch and the CPU are able to."""
    weight = block.mlp.fc1.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.shape[1] < MIN_WIDTH:
        return False
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return cpu_has("avx512_bf16", "amx_bf16") and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def all_weights(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module and, each unpacked only when its turn comes, those that are packed."""
    yield from module.parameters()
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            yield layer.weight


class PackedLinear(nn.Module):
    """A frozen linear layer with its weight in oneDNN's order; a `state_dict` has it in the usual one.

    Args:
        linear: whose weight, in bfloat16 on a CPU, is packed; its bias is kept as it is.
        rows: of the inputs to expect; any other number works too.
        extra_inputs, extra_outputs: zeros that inputs and outputs have behind the layer's own features.
    """

    def __init__(self, linear: nn.Linear, rows: int, extra_inputs: int = 0, extra_outputs: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._rows, self._extra = rows, (extra_inputs, extra_outputs)
        self._packed = self._pack(linear.weight.detach())

    @property
    def weight(self) -> Tensor:
        """A copy of the weight in the usual order: (out_features, in_features), bfloat16."""
        return self._packed.to_dense()[: self.out_features, : self.in_features].clone()

    def forward(self, states: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        """The layer's product.

        Args:
            states: (rows, in_features + extra_inputs), bfloat16.
            bias: (out_features), in the place of the layer's own.
            add_to: (rows, out_features), to which the result is added (in a new tensor).

        Returns:
            (rows, out_features + extra_outputs), bfloat16.
        """
        bias = self.bias if bias is None else bias
        if bias is not None and self._extra[1]:
            bias = F.pad(bias, (0, self._extra[1]))
        product = torch.ops.mkldnn._linear_pointwise
        if add_to is not None:
            result: Tensor = product.binary(states, add_to, self._packed, bias, "add")
        else:
            result = product(states, self._packed, bias, "none", [], "")
        return result

    def _pack(self, weight: Tensor) -> Tensor:
        extra_inputs, extra_outputs = self._extra
        padded = F.pad(weight, (0, extra_inputs, 0, extra_outputs)).contiguous()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(padded, self._rows)
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": self.weight}  # oneDNN's own form can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = self._pack(state["_packed"])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight, shape = state_dict.get(prefix + "weight"), (self.out_features, self.in_features)
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif tuple(weight.shape) != shape:
            error_msgs.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the file, {shape} here")
        else:
            self._packed = self._pack(weight.detach().to(torch.bfloat16))


class PatchProduct(nn.Module):
    """Patch embedding as a plain product: patches do not overlap, and a convolution takes a CPU twice as long for it.

    Args:
        patch_embed: timm's, whose weights it takes over.
    """

    def __init__(self, patch_embed: PatchEmbed) -> None:
        super().__init__()
        self.proj, self._image_size = patch_embed.proj, tuple(patch_embed.img_size)

    def forward(self, images: Tensor) -> Tensor:
        """(images, channels, height, width) to (images, patches, width).

        Raises:
            ValueError: the images have another size than the model's.
        """
        if tuple(images.shape[-2:]) != self._image_size:
            raise ValueError(f"pictures are {tuple(images.shape[-2:])} pixels where the model takes {self._image_size}")
        height, width = self.proj.kernel_size
        pixels = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # as the weight has them: channel, y, x
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class PackedBlock(nn.Module):
    """A block of EVA ViT for inference, with the names of timm's: pre-norm attention and MLP (Fang et al., 2022).

    Args:
        block: of a ViT without rotary positions, gates and layer scales; its linear layers are replaced.
        tokens: of each image.
    """

    def __init__(self, block: EvaBlock, tokens: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        extra = _extra_features(self.mlp.fc1.out_features)
        self.attn.qkv = PackedLinear(self.attn.qkv, _rounded_up(tokens))
        self.attn.proj = PackedLinear(self.attn.proj, tokens)
        self.mlp.fc1 = PackedLinear(self.mlp.fc1, tokens, extra_outputs=extra)
        self.mlp.fc2 = PackedLinear(self.mlp.fc2, tokens, extra_inputs=extra)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """One block.

        Args:
            images: each (tokens, width), bfloat16.

        Returns:
            as many of the same shape.
        """
        attention, mlp, tokens = self.attn, self.mlp, len(images[0])
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        spare, mask = _spare_rows(images[0])
        # Each result takes the place of what it was computed from, so that its memory is used again at once.
        wide = [attention.qkv(torch.cat([self.norm1(image), spare]), bias=bias) for image in images]
        for number, qkv in enumerate(wide):
            wide[number] = self._attend(qkv, tokens, mask)
        images = [attention.proj(seen, add_to=image) for seen, image in zip(wide, images, strict=True)]
        for number, image in enumerate(images):
            wide[number] = mlp.act(mlp.fc1(self.norm2(image)))
        return [mlp.fc2(hidden, add_to=image) for hidden, image in zip(wide, images, strict=True)]

    def _attend(self, qkv: Tensor, tokens: int, mask: Tensor | None) -> Tensor:
        """Attention of one image: (tokens and spare rows, 3 * width) to (tokens, width)."""
        query, key, value = qkv.view(1, len(qkv), 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query[:, :, :tokens], key, value, attn_mask=mask)
        return found.transpose(1, 2).reshape(tokens, -1)


def _spare_rows(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Zeros to put behind an image (tokens, width), and what keeps its tokens from looking at them."""
    tokens = len(image)
    spare = image.new_zeros(_rounded_up(tokens) - tokens, image.shape[1])
    if not len(spare):
        return spare, None
    mask = image.new_zeros(1, 1, 1, tokens + len(spare))
    mask[..., tokens:] = -torch.inf
    return spare, mask


def _rounded_up(tokens: int) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _extra_features(features: int) -> int:
    """To add to a tensor whose rows, of a multiple of 2 KiB, would all fall onto the same few sets of the caches."""
    return 16 if features % 1024 == 0 else 0
