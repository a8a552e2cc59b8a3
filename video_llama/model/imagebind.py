"""One modality of ImageBind (Girdhar et al. 2023), the joint embedding of images, audio and more.

Written from the paper and from recorded inputs and outputs. A trunk is a pre-norm vision transformer with a
class token; the class token's last state goes through a LayerNorm and a linear head into the joint space and
is scaled to unit length. Audio differs from vision in three ways: its patches overlap and are normalised,
each attention layer has one extra learned key and value, and its unit vector is scaled by a constant (20).

The published ImageBind weights are CC BY-NC-SA 4.0: non-commercial use only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_llama.model.configuration import ImageBindTrunkConfig
from video_llama.model.layers import InplaceGELU, PatchConv3d
from video_llama.model.precision import keeping_float32

__all__ = ["ImageBindTrunk"]

# The paper's fixed temperature for audio, 1 / 0.05.
AUDIO_LOGIT_SCALE = 20.0
# The stem keeps torch's default epsilon, unlike the blocks.
STEM_NORM_EPS = 1e-5


class ImageBindTrunk(nn.Module):
    """Encode each input (a log-mel segment or an RGB frame) into one vector of the joint space."""

    def __init__(self, config: ImageBindTrunkConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_projection: nn.Conv2d | PatchConv3d
        self.patch_norm: nn.Module
        self.pre_norm: nn.Module
        if config.modality == "audio":
            self.patch_projection = nn.Conv2d(1, width, config.patch_size, stride=config.stride, bias=False)
            self.patch_norm = nn.LayerNorm(width, eps=STEM_NORM_EPS)
            self.pre_norm = nn.Identity()
            self.register_buffer("log_logit_scale", torch.tensor(math.log(AUDIO_LOGIT_SCALE), dtype=torch.float32))
        else:
            kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
            stride = (config.temporal_patch_size, config.stride, config.stride)
            self.patch_projection = PatchConv3d(3, width, kernel, stride=stride, bias=False)
            self.patch_norm = nn.Identity()
            self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.log_logit_scale = None
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.output_size, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return vectors of the joint space.

        Args:
            inputs: (..., 1, mel_bins, mel_frames) log-mel segments, or (..., 3, height, width) normalised frames.

        Returns:
            (..., output_size).
        """
        return self.project(self.encode(inputs))

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the class token's last state, normalised, before it enters the joint space: (..., hidden_size)."""
        # The blocks take one batch dimension: all leading ones are folded into it, and restored at the end.
        leading = inputs.shape[:-3]
        hidden_states = self._embed_patches(inputs.flatten(0, -4) if leading else inputs[None])
        for block in self.blocks:
            hidden_states = block(hidden_states)
        class_state = self.head_norm(hidden_states[:, 0])  # (inputs, hidden_size)
        return class_state.unflatten(0, leading) if leading else class_state[0]

    def project(self, class_state: Tensor) -> Tensor:
        """Map what `encode` returns, (..., hidden_size), into the joint space (..., output_size)."""
        joint = F.normalize(self.head(class_state), dim=-1)
        if self.log_logit_scale is None:
            return joint
        return joint * self.log_logit_scale.exp().to(joint.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImageBindTrunk:
        # The scale is converted from its value before, not from a rounded one.
        scale = self.log_logit_scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.log_logit_scale = keeping_float32(fn, torch.float16, torch.bfloat16)(scale)
        return self

    def _embed_patches(self, inputs: Tensor) -> Tensor:
        if self.config.modality == "vision":
            # A patch spans several frames of a clip: repeat the frame.
            inputs = inputs[:, :, None].expand(-1, -1, self.config.temporal_patch_size, -1, -1)
        patches = self.patch_projection(inputs).flatten(2).transpose(1, 2)  # (inputs, patches, width)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), self.patch_norm(patches)], dim=1)
        return self.pre_norm(tokens + self.position_embedding)  # (inputs, 1 + patches, width)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ImageBindTrunkConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class Attention(nn.Module):
    """Multi-head self-attention; for audio, with one learned key and value that every token may attend to."""

    def __init__(self, config: ImageBindTrunkConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        has_bias = config.modality == "audio"
        self.bias_k = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if has_bias else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if has_bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Each (inputs, tokens, width)
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        # The extra key and value stand behind those of the tokens.
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(len(key), -1, -1)], dim=1)  # (inputs, tokens + 1, width)
            value = torch.cat([value, self.bias_v.expand(len(value), -1, -1)], dim=1)
        heads = [states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads)  # (inputs, heads, tokens, head_width)
        return self.output(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: ImageBindTrunkConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = InplaceGELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))
