"""The frame encoder's blocks as the code in `native/` computes them in bfloat16: for inference, the same numbers.

Where a CPU has AMX for the matrix products, what lies between them takes as long as they do if every operation reads
and writes memory for itself. The C code does a block in one go, with weights in the order in which it multiplies them.
`can_pack` says whether it is there for a block and this CPU; without it timm's own blocks do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from video_llama.model import eva_block

__all__ = ["PackedBlock", "PackedLinear", "PatchProduct", "all_weights", "can_pack"]


def can_pack(block: EvaBlock) -> bool:
    """Whether a block's weights are of the kind that is packed, and the code for it is here."""
    weight = block.mlp.fc1.weight
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or any(n % eva_block.MULTIPLE for n in weight.shape)
    ):
        return False
    return eva_block.why_not() is None


def all_weights(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module and, each unpacked only when its turn comes, those that are packed."""
    yield from module.parameters()
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            yield layer.weight


class PackedLinear(nn.Module):
    """The weights of a frozen linear layer, packed for `eva_block.forward`; a `state_dict` has them in the usual order.

    Args:
        linear: whose weight, in bfloat16 on a CPU, is packed; its bias is kept as it is.
        input_group, output_group: so many numbers in a row belong together and are filled up with zeros to a multiple
            of `eva_block.MULTIPLE`; by default all of them.

    Attributes:
        packed: as `eva_block.pack` makes it.
        num_loads: how often another weight was loaded into it.
    """

    def __init__(self, linear: nn.Linear, input_group: int | None = None, output_group: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._groups = (output_group or self.out_features, input_group or self.in_features)
        self.packed = self._pack(linear.weight.detach())
        self.num_loads = 0

    @property
    def weight(self) -> Tensor:
        """A copy of the weight in the usual order: (out_features, in_features), bfloat16."""
        weight = eva_block.unpack(self.packed)
        for dimension, group in enumerate(self._groups):
            groups = weight.unflatten(dimension, (-1, _rounded_up(group)))
            weight = groups.narrow(dimension + 1, 0, group).flatten(dimension, dimension + 1)
        return weight.contiguous()

    def _pack(self, weight: Tensor) -> Tensor:
        for dimension, group in enumerate(self._groups):
            weight = fill_groups(weight, dimension, group)
        return eva_block.pack(weight.contiguous())

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
            self.packed = self._pack(weight.detach().to(torch.bfloat16))
            self.num_loads += 1


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
    """The weights of a block of EVA ViT, with the names of timm's: pre-norm attention and MLP (Fang et al., 2022).

    Args:
        block: of a ViT without rotary positions, gates and layer scales; its linear layers are replaced.
    """

    def __init__(self, block: EvaBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self._head_width = self.attn.proj.in_features // self.attn.num_heads
        self.attn.qkv = PackedLinear(self.attn.qkv, output_group=self._head_width)
        self.attn.proj = PackedLinear(self.attn.proj, input_group=self._head_width)
        self.mlp.fc1, self.mlp.fc2 = PackedLinear(self.mlp.fc1), PackedLinear(self.mlp.fc2)

    def addresses(self) -> tuple[eva_block.Block, list[Tensor]]:
        """For `eva_block.forward`: the block, and the tensors that have to be kept until it is through.

        Raises:
            RuntimeError: a weight was replaced by one that the code in C cannot read.
        """
        attention, mlp = self.attn, self.mlp
        width, hidden, inner = attention.proj.out_features, mlp.fc1.out_features, attention.proj.packed.shape[1] * 32
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        kept: list[Tensor] = []

        def address(weight: Tensor, size: int) -> int:
            kept.append(weight)
            return _address(weight, size)

        def layer(linear: PackedLinear, bias: Tensor, outputs: int) -> eva_block.Layer:
            return eva_block.Layer(address(linear.packed, linear.packed.numel()), address(bias, outputs))

        block = eva_block.Block(
            width=width,
            heads=attention.num_heads,
            head_width=self._head_width,
            hidden=hidden,
            epsilon=self.norm1.eps,
            norm1_weight=address(self.norm1.weight, width),
            norm1_bias=address(self.norm1.bias, width),
            norm2_weight=address(self.norm2.weight, width),
            norm2_bias=address(self.norm2.bias, width),
            qkv=layer(attention.qkv, fill_groups(bias, 0, self._head_width), 3 * inner),
            proj=layer(attention.proj, attention.proj.bias, width),
            fc1=layer(mlp.fc1, mlp.fc1.bias, hidden),
            fc2=layer(mlp.fc2, mlp.fc2.bias, width),
        )
        return block, kept


def _address(weight: Tensor, size: int) -> int:
    is_there = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if not is_there or not weight.is_contiguous() or weight.numel() != size:
        raise RuntimeError(
            f"a packed frame encoder needs its weights in bfloat16 on the CPU, of their size and contiguous; there is "
            f"one in {weight.dtype} on {weight.device}, of shape {tuple(weight.shape)} with strides {weight.stride()}: "
            "load the model with pack=False"
        )
    return weight.data_ptr()


def fill_groups(tensor: Tensor, dimension: int, group: int) -> Tensor:
    """Zeros behind every `group` numbers along a dimension, up to a multiple of `eva_block.MULTIPLE`."""
    missing = _rounded_up(group) - group
    if not missing:
        return tensor
    groups = tensor.unflatten(dimension, (-1, group))
    behind = [0, 0] * (groups.ndim - dimension - 2)
    return F.pad(groups, (*behind, 0, missing)).flatten(dimension, dimension + 1)


def _rounded_up(number: int) -> int:
    return -(-number // eva_block.MULTIPLE) * eva_block.MULTIPLE
