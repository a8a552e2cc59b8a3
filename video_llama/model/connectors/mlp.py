"""An MLP behind pooling over space and time (Xu et al., "PLLaVA", 2024, arXiv 2404.16994, section 3.2).

The patches of all frames form a block of time, height and width, which is averaged to a fixed, smaller one; an MLP maps
each of its cells to a token of the language model. There is no attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.frame_branch import FrameBranch, pool_patches
from video_llama.registry import CONNECTORS

__all__ = ["MLPBranch"]


@CONNECTORS.register("mlp")
class MLPBranch(FrameBranch):
    """Frame encoder, averaged patches, frame positions, averages over time, an MLP whose last layer is `projection`."""

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config)
        width, vision_width = config.video_qformer_config.hidden_size, config.vision_config.hidden_size
        settings = config.connector
        num_tokens = settings["frames"] * settings["tokens_per_frame"]
        if num_tokens != config.num_video_query_tokens:
            raise ConfigError(
                f"the connector mlp gives frames * tokens_per_frame = {num_tokens} tokens, but num_video_query_token "
                f"is {config.num_video_query_tokens}"
            )
        self.frame_position_embedding = nn.Embedding(config.max_frame_positions, vision_width)
        self.connector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU())
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the numbers of averaged frames and of averaged patches of each."""
        return {"frames": 2, "tokens_per_frame": 16}

    @classmethod
    def configure(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that the keys set, the number of tokens included."""
        fields = super().configure(keys)
        settings = fields["connector"]
        return fields | {"num_video_query_tokens": settings["frames"] * settings["tokens_per_frame"]}

    def reduce(self, states: Tensor) -> Tensor:
        """Average the patches of each frame: (frames, tokens_per_frame, width)."""
        vision = self.config.vision_config
        return pool_patches(states, vision.num_prefix_tokens, self.config.connector["tokens_per_frame"])

    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average tokens with positions, (videos, tokens, width), over time, and map them to the language model."""
        frames = states.unflatten(1, (-1, self.config.connector["tokens_per_frame"]))
        shares = _time_shares(frames, mask, self.config.connector["frames"])  # (videos, cells, frames)
        cells = torch.einsum("vcf,vftw->vctw", shares, frames)
        return self.projection(self.connector(cells.flatten(1, 2)))


def _time_shares(frames: Tensor, mask: Tensor | None, num_cells: int) -> Tensor:
    """Return what each frame counts in each cell of time, as adaptive average pooling of the real frames has it.

    Args:
        frames: (videos, frames, tokens_per_frame, width).
        mask: (videos, frames * tokens_per_frame), bool, False on those of padding frames, which come last.

    Returns:
        (videos, num_cells, frames); each row adds up to 1.
    """
    num_videos, num_frames, num_tokens = frames.shape[:3]
    lengths = frames.new_full((num_videos,), num_frames, dtype=torch.long)
    if mask is not None:
        lengths = mask[:, ::num_tokens].sum(dim=1)
    cells = torch.arange(num_cells, device=frames.device)
    # Cell i of n holds the frames from floor(i * length / n) to ceil((i + 1) * length / n).
    begin = cells * lengths[:, None] // num_cells
    end = -(-(cells + 1) * lengths[:, None] // num_cells)
    places = torch.arange(num_frames, device=frames.device)
    inside = (places >= begin[..., None]) & (places < end[..., None])
    return inside.to(frames.dtype) / (end - begin)[..., None].to(frames.dtype)
