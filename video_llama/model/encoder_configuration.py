"""The configurations of encoders other than the published ones: what the rest of the model must know, and their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["AudioEncoderConfig", "BlockSizes", "FrameEncoderConfig", "block_sizes"]


class FrameEncoderConfig(PreTrainedConfig):
    """A frame encoder of the registry `FRAME_ENCODERS`.

    Args:
        name: in the registry.
        image_size: side of the square that frames are resized to, in pixels.
        mean, std: per channel, for RGB values from 0 to 1.
        hidden_size: width of what it returns.
        num_tokens: that it returns for one frame.
        num_prefix_tokens: how many of them come before those of the patches (class token, registers).
        settings: all that the entry needs to build the module again, in types of JSON.
        module: the Python module that registered the name, for the message where it is missing.
    """

    model_type = "video_llama_frame_encoder"
    base_config_key = "vision_config"

    name: str = ""
    image_size: int = 224
    mean: Any = None
    std: Any = None
    hidden_size: int = 768
    num_tokens: int = 196
    num_prefix_tokens: int = 0
    settings: Any = None
    module: Any = None

    @property
    def num_patches(self) -> int:
        """Return the number of patches of one frame."""
        return self.num_tokens - self.num_prefix_tokens


class AudioEncoderConfig(PreTrainedConfig):
    """An audio encoder of the registry `AUDIO_ENCODERS`.

    Args:
        name: in the registry.
        input_size: of the features of one segment, as the encoder takes them: (bins, frames), or (frames, bins).
        sample_rate_hz: rate that audio is resampled to.
        segment_seconds: length of a segment.
        num_segments: segments that are taken of a file.
        extractor: settings of the feature extractor of transformers that makes the features.
        output_size: width of what it returns.
        num_output_tokens: that are kept of one segment.
        settings, module: as for `FrameEncoderConfig`.
    """

    model_type = "video_llama_audio_encoder"
    base_config_key = "audio_config"

    name: str = ""
    input_size: tuple[int, ...] | list[int] = (128, 204)
    sample_rate_hz: int = 16000
    segment_seconds: float = 2.0
    num_segments: int = 8
    extractor: Any = None
    output_size: int = 768
    num_output_tokens: int = 1
    settings: Any = None
    module: Any = None


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of an encoder's blocks, for estimates."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


def block_sizes(config: Any) -> BlockSizes:
    """Return the sizes of the blocks of a frame or audio encoder; of an unknown one those of a usual transformer.

    Args:
        config: of the published encoder, or of another.
    """
    own: dict[str, Any] = config.to_dict()
    width = own.get("hidden_size") or own["output_size"]
    inside = (own.get("settings") or {}).get("config") or own
    # Composite models have theirs one level deeper.
    inside = inside.get("vision_config") or inside.get("audio_config") or inside
    intermediate = inside.get("intermediate_size") or inside.get("encoder_ffn_dim") or 4 * width
    layers = inside.get("num_hidden_layers") or inside.get("encoder_layers") or 12
    return BlockSizes(width, intermediate, layers)
