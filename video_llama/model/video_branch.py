"""The published vision-language branch (Zhang, Li and Bing 2023, section 2.1.1): frames to language-model tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.frame_branch import FrameBranch
from video_llama.model.qformer import QFormer, run_qformer
from video_llama.registry import CONNECTORS

__all__ = ["VideoBranch", "build_video_branch"]


@CONNECTORS.register("qformer")
class VideoBranch(FrameBranch):
    """EVA ViT and BLIP-2 Q-Former on each frame, frame positions, a Q-Former over all frames, a projection.

    Everything before the frame positions is frozen in the published recipe and depends on the file alone.
    """

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config)
        width = config.qformer_config.hidden_size
        # Frozen in the published recipe: one frame at a time, to BLIP-2's 32 query outputs.
        self.qformer = QFormer(config.qformer_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        # Trained: from the tokens of all frames to the width of the language model.
        self.frame_position_embedding = nn.Embedding(config.max_frame_positions, width)
        self.video_qformer = QFormer(config.video_qformer_config)
        self.video_query_tokens = nn.Parameter(torch.empty(1, config.num_video_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    @classmethod
    def configure(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that the keys set; the published connector has no settings of its own."""
        fields = super().configure(keys)
        settings = fields.pop("connector")
        sizes = dict(fields["video_qformer_config"])
        if settings["frame_layers"] is not None:
            sizes["num_hidden_layers"] = settings["frame_layers"]
        return fields | {"qformer_config": sizes}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the depth of the Q-Former on each frame; by default BLIP-2's."""
        return {"frame_layers": None}

    @property
    def encoder_parts(self) -> tuple[nn.Module, ...]:
        """Return the frame encoder, its norm and BLIP-2's Q-Former."""
        return self.vision_encoder, self.vision_norm, self.qformer

    @property
    def encoder_weights(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """Return these, and the queries, which are a parameter of the branch itself."""
        return *self.encoder_parts, self.query_tokens

    @property
    def attention(self) -> nn.Module:
        """Return the Q-Former over all frames."""
        return self.video_qformer

    def reduce(self, states: Tensor) -> Tensor:
        """Return BLIP-2's query outputs for every frame: (frames, queries, width)."""
        # What trains is in float32, which need not be both of the two.
        return run_qformer(self.qformer, self.query_tokens, states.to(self.qformer.layernorm.weight.dtype))

    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens with positions, (videos, tokens, width), and project: (videos, video_queries, language_width)."""
        pooled = run_qformer(self.video_qformer, self.video_query_tokens, states, mask)
        return self.projection(pooled.to(self.projection.weight.dtype))


def build_video_branch(config: VideoLlamaConfig) -> FrameBranch:
    """Build the branch whose connector a configuration names.

    Raises:
        ConfigError: an unknown connector or frame encoder.
    """
    connector = config.connector or {"name": "qformer"}
    branch: FrameBranch = CONNECTORS.get(connector["name"], connector.get("module"))(config)
    return branch
