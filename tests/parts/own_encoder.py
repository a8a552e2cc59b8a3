"""A frame encoder, an audio encoder and a connector of somebody else, as their package would register them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from video_llama.model.audio_encoders import AudioEncoder
from video_llama.model.connectors.mlp import MLPBranch
from video_llama.model.encoder_configuration import AudioEncoderConfig, FrameEncoderConfig
from video_llama.model.frame_encoders import FrameEncoder
from video_llama.registry import AUDIO_ENCODERS, CONNECTORS, FRAME_ENCODERS

SIDE, WIDTH = 8, 12
"""Of a patch, and of its token."""


class Patches(nn.Module):
    """A linear layer on each patch; it says how far pixels were shifted by a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, WIDTH, SIDE, stride=SIDE)
        self.register_buffer("shift", torch.full((1,), 0.5), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        return self.linear(frames + self.shift).flatten(2).transpose(1, 2)


@FRAME_ENCODERS.register("own_patches")
class OwnFrameEncoder(FrameEncoder):
    @classmethod
    def read(cls, keys: dict[str, Any]) -> FrameEncoderConfig:
        size = keys.get("image_size", 32)
        tokens = (size // SIDE) ** 2
        return FrameEncoderConfig(image_size=size, mean=[0.5] * 3, std=[0.25] * 3, hidden_size=WIDTH, num_tokens=tokens)

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return dict(Patches().state_dict())

    @classmethod
    def build(cls, config: FrameEncoderConfig) -> nn.Module:
        return Patches()


class Bins(nn.Module):
    """The mean of each mel bin over time, through a linear layer: one vector for each segment."""

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_bins, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values[:, 0].mean(dim=2))


@AUDIO_ENCODERS.register("own_bins")
class OwnAudioEncoder(AudioEncoder):
    @classmethod
    def read(cls, keys: dict[str, Any]) -> AudioEncoderConfig:
        return AudioEncoderConfig(input_size=[20, 50], segment_seconds=0.5, num_segments=3, output_size=WIDTH)

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        torch.manual_seed(6)
        return dict(Bins(20).state_dict())

    @classmethod
    def build(cls, config: AudioEncoderConfig) -> nn.Module:
        return Bins(config.input_size[0])


@CONNECTORS.register("own_mlp")
class OwnBranch(MLPBranch):
    """The MLP under another name."""
