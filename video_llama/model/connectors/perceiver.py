"""A perceiver resampler (Alayrac et al., "Flamingo", 2022, arXiv 2204.14198, section 3.1.1).

Learned latents attend to the tokens of all frames and, in the same softmax, to each other; a feed-forward layer
follows. The idea of latents that read a long input is Perceiver's (Jaegle et al. 2021, arXiv 2103.03206).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.frame_branch import FrameBranch, pool_patches
from video_llama.registry import CONNECTORS

__all__ = ["PerceiverBranch"]


class LatentAttention(nn.Module):
    """Attention of latents to media tokens and to themselves; its parts are named as those of a Q-Former."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_attention_heads = num_heads
        self.scaling = (width // num_heads) ** -0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (batch, latents, width).

        Args:
            hidden_states: (batch, latents, width).
            encoder_hidden_states: (batch, tokens, width).
            mask: (batch, tokens), bool, False on tokens that are not attended to.
        """
        read = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        query, key, value = (
            layer(states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, hidden_states), (self.key, read), (self.value, read))
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class ResamplerLayer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual connection."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.latent_norm = nn.LayerNorm(width)
        # The name by which the demo finds what to record.
        self.crossattention = nn.ModuleDict({"attention": LatentAttention(width, num_heads)})
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, width)
        )

    def forward(self, latents: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Return the latents (batch, latents, width), updated."""
        attention = self.crossattention["attention"]
        read = attention(hidden_states=self.latent_norm(latents), encoder_hidden_states=states, mask=mask)
        latents = latents + self.output(read)
        updated: Tensor = latents + self.feed_forward(latents)
        return updated


@CONNECTORS.register("perceiver")
class PerceiverBranch(FrameBranch):
    """Frame encoder, averaged patches, frame positions, a perceiver resampler, a projection."""

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config)
        sizes, vision_width = config.video_qformer_config, config.vision_config.hidden_size
        width = sizes.hidden_size
        self.frame_position_embedding = nn.Embedding(config.max_frame_positions, vision_width)
        layers = [
            ResamplerLayer(width, sizes.num_attention_heads, sizes.intermediate_size)
            for _ in range(sizes.num_hidden_layers)
        ]
        self.connector = nn.ModuleDict(
            {
                "input": nn.Linear(vision_width, width),
                "input_norm": nn.LayerNorm(width),
                "layers": nn.ModuleList(layers),
                "norm": nn.LayerNorm(width),
            }
        )
        self.video_query_tokens = nn.Parameter(torch.empty(1, config.num_video_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the number of averaged patches of a frame."""
        return {"tokens_per_frame": 64}

    @property
    def attention(self) -> nn.Module:
        """Return the resampler."""
        return self.connector

    def reduce(self, states: Tensor) -> Tensor:
        """Average the patches of each frame: (frames, tokens_per_frame, width)."""
        vision = self.config.vision_config
        return pool_patches(states, vision.num_prefix_tokens, self.config.connector["tokens_per_frame"])

    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read tokens with positions, (videos, tokens, width), and project: (videos, video_queries, language_width)."""
        states = self.connector["input_norm"](self.connector["input"](states))
        latents = self.video_query_tokens.expand(len(states), -1, -1).to(states.dtype)
        layers: Any = self.connector["layers"]
        for layer in layers:
            latents = layer(latents, states, mask)
        return self.projection(self.connector["norm"](latents))
