"""The vision-language branch (Zhang, Li and Bing 2023, section 2.1.1): frames in, language-model tokens out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize, EncoderGraphs
from video_llama.model.eva_vit import build_eva_vit
from video_llama.model.frozen import as_frozen
from video_llama.model.qformer import QFormer, position_rows, run_qformer
from video_llama.processor.transforms import normalize_pixels

__all__ = ["VideoBranch"]


class VideoBranch(nn.Module):
    """EVA ViT and BLIP-2 Q-Former on each frame, frame positions, a Q-Former over all frames, a projection.

    Everything before the frame positions is frozen in the published recipe and depends on the file alone:
    `encode_frames` is that part, `pool` the rest.

    Attributes:
        chunk_size: frames that the encoder takes at once.
    """

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk_size: ChunkSize = "auto"
        self._graphs = EncoderGraphs()
        vision, width = config.vision_config, config.qformer_config.hidden_size
        # Frozen in the published recipe: one frame at a time, to BLIP-2's 32 query outputs.
        self.vision_encoder = build_eva_vit(vision)
        self.vision_norm = nn.LayerNorm(vision.hidden_size, eps=vision.output_norm_eps)
        self.qformer = QFormer(config.qformer_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        # Trained: from the tokens of all frames to the width of the language model.
        self.frame_position_embedding = nn.Embedding(config.max_frame_positions, width)
        self.video_qformer = QFormer(config.video_qformer_config)
        self.video_query_tokens = nn.Parameter(torch.empty(1, config.num_video_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        frame_tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the language-model tokens of each video.

        Args:
            pixel_values: (videos, frames, 3, height, width), float, normalised with CLIP's mean and std; or uint8,
                which is normalised here.
            frame_mask: (videos, frames), bool, False on the frames that pad a shorter video.
            frame_tokens: what `encode_frames` returned earlier, in place of the pixels.

        Returns:
            (videos, video_queries, language_width).

        Raises:
            ValueError: neither pixels nor tokens.
        """
        if frame_tokens is None:
            if pixel_values is None:
                raise ValueError("give pixel_values or frame_tokens")
            frame_tokens = self.encode_frames(pixel_values, frame_mask)
        return self.pool(frame_tokens, frame_mask)

    def encode_frames(self, pixel_values: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Return BLIP-2's query outputs for every frame: (videos, frames, queries, width), zeros on padding frames."""
        # Padding frames are not encoded: the real frames of all videos form one batch.
        real = pixel_values.flatten(0, 1) if frame_mask is None else pixel_values[frame_mask]
        encoders = (self.vision_encoder, self.vision_norm, self.qformer)
        weights = (*encoders, self.query_tokens)
        with as_frozen(pixel_values.device.type, *encoders):
            tokens = self._graphs.run(self._encode, real, self.chunk_size, *weights, prepare=self._prepare)
        # tokens: (real frames, queries, width)
        if frame_mask is None:
            return tokens.unflatten(0, pixel_values.shape[:2])
        # Put the tokens of the real frames back in their places; padding frames stay zero.
        frame_tokens = tokens.new_zeros(*frame_mask.shape, *tokens.shape[1:])
        frame_tokens[frame_mask.to(tokens.device)] = tokens
        return frame_tokens

    def _prepare(self, frames: Tensor) -> Tensor:
        if frames.dtype == torch.uint8:
            frames = normalize_pixels(frames)
        return frames.to(self.vision_norm.weight.dtype)

    def _encode(self, frames: Tensor) -> Tensor:
        """Map frames (frames, 3, height, width) to query outputs (frames, queries, width)."""
        states = self.vision_norm(self.vision_encoder(frames))
        # What trains is in float32, which need not be both of the two.
        return run_qformer(self.qformer, self.query_tokens, states.to(self.qformer.layernorm.weight.dtype))

    def pool(self, frame_tokens: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Map frame tokens to language-model tokens.

        Args:
            frame_tokens: (videos, frames, queries, width), as `encode_frames` returns them.
            frame_mask: (videos, frames), bool.

        Returns:
            (videos, video_queries, language_width).
        """
        states = self.add_frame_positions(frame_tokens, frame_mask)
        # One mask value for each frame becomes one for each of its tokens.
        mask = None if frame_mask is None else frame_mask.repeat_interleave(frame_tokens.shape[2], dim=1)
        return self.project(states, mask)

    def add_frame_positions(self, frame_tokens: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Add its frame's position to each token: (videos, frames, queries, width) to (videos, tokens, width)."""
        positions = position_rows(self.frame_position_embedding, frame_tokens.shape[1], frame_mask)
        return (frame_tokens.to(positions) + positions[:, :, None]).flatten(1, 2)

    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens with positions, (videos, tokens, width), and project: (videos, video_queries, language_width)."""
        pooled = run_qformer(self.video_qformer, self.video_query_tokens, states, mask)
        return self.projection(pooled.to(self.projection.weight.dtype))
