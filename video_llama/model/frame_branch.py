"""What all vision-language branches share: a frame encoder, run frozen, and positions of frames.

An entry of `CONNECTORS` is a class that derives from `FrameBranch`: it leads from the states of the frame encoder to
the tokens of the language model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize, EncoderGraphs
from video_llama.model.frozen import as_frozen
from video_llama.model.qformer import position_rows
from video_llama.model.towers import fill_buffers, take_keys
from video_llama.processor.transforms import normalize_pixels
from video_llama.registry import FRAME_ENCODERS

__all__ = ["FrameBranch", "pool_patches"]

QFORMER_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size")
"""Keys of `model.connector` that every connector takes: the sizes of what trains, of the audio Q-Former too."""


class FrameBranch(nn.Module, ABC):
    """A frame encoder on each frame, and what leads from all frames to the language model.

    `encode_frames` is what depends on each frame by itself, and is frozen and cached in most recipes; `pool` the rest.

    Attributes:
        chunk_size: frames that the encoder takes at once.
    """

    frame_position_embedding: nn.Embedding

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk_size: ChunkSize = "auto"
        self._graphs = EncoderGraphs()
        vision = config.vision_config
        self.vision_encoder: Any = self.build_encoder()
        # BLIP-2's norm has weights. Behind other encoders a norm without any keeps large states from what trains.
        self.vision_norm = nn.LayerNorm(vision.hidden_size, elementwise_affine=False)
        if isinstance(self.vision_encoder, Eva):
            self.vision_norm = nn.LayerNorm(vision.hidden_size, eps=vision.output_norm_eps)
        # What stays together on one device; FSDP shards each by itself.
        self._no_split_modules = [type(self).__name__, *_block_names(self.vision_encoder)]

    def build_encoder(self) -> nn.Module:
        """Build the frame encoder that the configuration names, without its weights."""
        vision = self.config.vision_config
        return FRAME_ENCODERS.get(vision.name, vision.module).build(vision)

    def fill_buffers(self) -> None:
        """Compute what the encoder has in buffers that no file holds. The model fills EVA's itself."""
        if not isinstance(self.vision_encoder, Eva):
            fill_buffers(self.vision_encoder, self.build_encoder)

    @classmethod
    def configure(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of `VideoLlamaConfig` that the keys of `model.connector` set.

        Raises:
            ConfigError: unknown keys, or values that make no sense.
        """
        name = keys.get("name", "qformer")
        given = take_keys(keys, f"model.connector ({name})", **dict.fromkeys(QFORMER_SIZES), **cls.settings())
        tokens = given.get("tokens_per_frame", 1)
        if not isinstance(tokens, int) or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ConfigError(f"model.connector.tokens_per_frame must be a square number, not {tokens!r}")
        sizes = {key: given.pop(key) for key in QFORMER_SIZES}
        sizes = {key: value for key, value in sizes.items() if value is not None}
        if not cls.__module__.startswith("video_llama."):
            # Only for the message where it is missing.
            given["module"] = cls.__module__
        return {"connector": {"name": name, **given}, "video_qformer_config": sizes, "audio_qformer_config": sizes}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the keys that this connector takes besides, with their defaults."""
        return {}

    @property
    def encoder_parts(self) -> tuple[nn.Module, ...]:
        """Return the modules that `encode_frames` runs."""
        return self.vision_encoder, self.vision_norm

    @property
    def encoder_weights(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """Return all that the result of `encode_frames` depends on, besides the settings."""
        return self.encoder_parts

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Return the precision in which frames are encoded."""
        weight = self.vision_norm.weight
        if weight is None:
            weight = next(self.vision_encoder.parameters())
        dtype: torch.dtype = weight.dtype
        return dtype

    @property
    def attention(self) -> nn.Module | None:
        """Return the module whose cross-attention layers say what was looked at; None if there are none."""
        return None

    @abstractmethod
    def reduce(self, states: Tensor) -> Tensor:
        """Map the encoder's states (frames, tokens, width) to what is kept of each frame: (frames, tokens, width)."""

    @abstractmethod
    def project(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map the tokens of all frames, with positions, to those of the language model.

        Args:
            states: (videos, frames * tokens, width).
            mask: (videos, frames * tokens), bool, False on those of padding frames.

        Returns:
            (videos, video_queries, language_width).
        """

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
        """Return what is kept of every frame: (videos, frames, tokens, width), zeros on padding frames."""
        # Padding frames are not encoded: the real frames of all videos form one batch.
        real = pixel_values.flatten(0, 1) if frame_mask is None else pixel_values[frame_mask]
        with as_frozen(pixel_values.device.type, *self.encoder_parts):
            tokens = self._graphs.run(
                self._encode, real, self.chunk_size, *self.encoder_weights, prepare=self._prepare
            )  # (real frames, tokens, width)
        if frame_mask is None:
            return tokens.unflatten(0, pixel_values.shape[:2])
        # Put the tokens of the real frames back in their places; padding frames stay zero.
        frame_tokens = tokens.new_zeros(*frame_mask.shape, *tokens.shape[1:])
        frame_tokens[frame_mask.to(tokens.device)] = tokens
        return frame_tokens

    def _prepare(self, frames: Tensor) -> Tensor:
        if frames.dtype == torch.uint8:
            vision = self.config.vision_config
            frames = normalize_pixels(frames, tuple(vision.mean), tuple(vision.std))
        return frames.to(self.encoder_dtype)

    def _encode(self, frames: Tensor) -> Tensor:
        """Map frames (frames, 3, height, width) to what is kept of each."""
        return self.reduce(self.vision_norm(self.vision_encoder(frames)))

    def pool(self, frame_tokens: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Map frame tokens to language-model tokens.

        Args:
            frame_tokens: (videos, frames, tokens, width), as `encode_frames` returns them.
            frame_mask: (videos, frames), bool.

        Returns:
            (videos, video_queries, language_width).
        """
        states = self.add_frame_positions(frame_tokens, frame_mask)
        # One mask value for each frame becomes one for each of its tokens.
        mask = None if frame_mask is None else frame_mask.repeat_interleave(frame_tokens.shape[2], dim=1)
        return self.project(states, mask)

    def add_frame_positions(self, frame_tokens: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Add its frame's position to each token: (videos, frames, tokens, width) to (videos, tokens, width)."""
        positions = position_rows(self.frame_position_embedding, frame_tokens.shape[1], frame_mask)
        return (frame_tokens.to(positions) + positions[:, :, None]).flatten(1, 2)


def pool_patches(states: Tensor, num_prefix_tokens: int, num_tokens: int) -> Tensor:
    """Average the patches of each frame over a coarser grid.

    Args:
        states: (frames, tokens, width); those of the patches fill a square, behind the others, which are left out.
        num_prefix_tokens: tokens before the patches.
        num_tokens: of the result, a square number.

    Returns:
        (frames, num_tokens, width).
    """
    patches = states[:, num_prefix_tokens:]
    if patches.shape[1] == num_tokens:
        return patches
    side, new_side = math.isqrt(patches.shape[1]), math.isqrt(num_tokens)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (frames, width, side, side)
    return F.adaptive_avg_pool2d(grid, new_side).flatten(2).transpose(1, 2)


def _block_names(encoder: nn.Module) -> list[str]:
    """Return the class names of the blocks of an encoder."""
    inner = getattr(encoder, "model", encoder)
    named = getattr(inner, "_no_split_modules", None)
    if named is not None:
        return list(named)
    return sorted({type(block).__name__ for block in getattr(inner, "blocks", ())})
