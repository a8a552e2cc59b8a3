"""The video Q-Former straight on the patches of all frames, without a Q-Former for each frame.

The Q-Former is that of BLIP-2 (Li et al. 2023, arXiv 2301.12597), over all frames as in Video-LLaMA (Zhang, Li and
Bing 2023, arXiv 2306.02858). The patches of a frame are averaged over a coarser grid first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.frame_branch import FrameBranch, pool_patches
from video_llama.model.qformer import QFormer, run_qformer
from video_llama.registry import CONNECTORS

__all__ = ["VideoQFormerBranch"]


@CONNECTORS.register("video_qformer")
class VideoQFormerBranch(FrameBranch):
    """Frame encoder, averaged patches, frame positions, a Q-Former over all frames, a projection."""

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config)
        width = config.video_qformer_config.hidden_size
        self.frame_position_embedding = nn.Embedding(config.max_frame_positions, config.vision_config.hidden_size)
        self.video_qformer = QFormer(config.video_qformer_config)
        self.video_query_tokens = nn.Parameter(torch.empty(1, config.num_video_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the number of averaged patches of a frame."""
        return {"tokens_per_frame": 16}

    @property
    def attention(self) -> nn.Module:
        """Return the Q-Former."""
        return self.video_qformer

    def reduce(self, states: Tensor) -> Tensor:
        """Average the patches of each frame: (frames, tokens_per_frame, width)."""
        vision = self.config.vision_config
        return pool_patches(states, vision.num_prefix_tokens, self.config.connector["tokens_per_frame"])

    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens with positions, (videos, tokens, width), and project: (videos, video_queries, language_width)."""
        pooled = run_qformer(self.video_qformer, self.video_query_tokens, states, mask)
        return self.projection(pooled.to(self.projection.weight.dtype))
