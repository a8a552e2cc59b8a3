"""The audio encoders that `model.audio_encoder` names: features of a segment in, tokens of it out.

An entry of `AUDIO_ENCODERS` is a class with the three methods of `AudioEncoder`. The module that it builds maps
(segments, 1, *input_size) to one vector (segments, output_size) or to tokens (segments, num_output_tokens,
output_size), each segment by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from video_llama.errors import CheckpointError, ConfigError, translate_foreign
from video_llama.media.sampling import LogMelSettings
from video_llama.model.configuration import ImageBindTrunkConfig
from video_llama.model.encoder_configuration import AudioEncoderConfig
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.model.towers import (
    Encoder,
    build_tower,
    load_tower_weights,
    output_shape,
    read_tower_config,
    take_keys,
)
from video_llama.processor.audio_features import extract_features
from video_llama.registry import AUDIO_ENCODERS

__all__ = ["AudioEncoder"]

# What the published model takes of a file: eight segments of two seconds.
_SECONDS_OF_A_FILE = 16.0
_TOKENS_PER_SEGMENT = 8


class AudioEncoder(Encoder):
    """One kind of audio encoder; its configuration is an `AudioEncoderConfig`."""


@AUDIO_ENCODERS.register("imagebind")
class ImageBindEncoder(AudioEncoder):
    """The published one: ImageBind (Girdhar et al. 2023). Its weights are `model.imagebind_ckpt_path`."""

    @classmethod
    def read(cls, keys: dict[str, Any]) -> ImageBindTrunkConfig:
        """Return the published configuration."""
        take_keys(keys, "model.audio_encoder")
        return ImageBindTrunkConfig()

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return nothing: the weights are those of `model.imagebind_ckpt_path`."""
        return {}

    @classmethod
    def build(cls, config: ImageBindTrunkConfig) -> nn.Module:
        """Build the audio trunk."""
        return ImageBindTrunk(config)


class TransformersAudio(nn.Module):
    """An audio tower of transformers: features to the states of its last layer, averaged over time."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.model: Any = build_tower(config.settings["config"])
        self._num_tokens = config.num_output_tokens
        # CLAP reads its features as an image; the others as a sequence.
        own: Any = self.model.config
        self._is_image = hasattr(own, "spec_size")
        self._has_fusion = bool(getattr(own, "enable_fusion", False))
        # AST returns two tokens of its own, then patches, those of one frequency next to each other.
        self._prefix, self._rows = 0, 1
        if hasattr(own, "frequency_stride"):
            self._prefix = 2
            self._rows = (own.num_mel_bins - own.patch_size) // own.frequency_stride + 1

    def forward(self, values: Tensor) -> Tensor:
        """Map features (segments, 1, *input_size) to tokens (segments, num_output_tokens, width), in order of time."""
        options: dict[str, Tensor] = {}
        if self._has_fusion:
            # A segment is never longer than what the model takes.
            options["is_longer"] = values.new_zeros(len(values), 1, dtype=torch.bool)
        states: Tensor = self.model(values if self._is_image else values[:, 0], **options).last_hidden_state
        if states.ndim == 4:
            states = states.mean(dim=2).transpose(1, 2)  # (segments, width, frequencies, times) before
        else:
            states = states[:, self._prefix :].unflatten(1, (self._rows, -1)).mean(dim=1)
        return F.adaptive_avg_pool1d(states.transpose(1, 2), self._num_tokens).transpose(1, 2)


@AUDIO_ENCODERS.register("transformers")
class TransformersAudioEncoder(AudioEncoder):
    """The audio tower of a model of transformers.

    Whisper (Radford et al. 2022), AST (Gong et al. 2021) and CLAP (Wu et al. 2023) are tested.

    Its keys: `path`, a folder or hub id; `segment_seconds`, by default as long as the model takes; `num_segments` of a
    file, by default for some 16 seconds; `tokens_per_segment`.
    """

    @classmethod
    def read(cls, keys: dict[str, Any]) -> AudioEncoderConfig:
        """Return the configuration; rate, length and mel filters are those of the model's feature extractor."""
        given = take_keys(
            keys,
            "model.audio_encoder (transformers)",
            **{"path": ..., "segment_seconds": None, "num_segments": None, "tokens_per_segment": _TOKENS_PER_SEGMENT},
        )
        folder = Path(given["path"])
        with translate_foreign(CheckpointError, folder, "it needs the settings of a feature extractor"):
            extractor: Any = AutoFeatureExtractor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        longest = _longest_seconds(extractor)
        seconds = float(given["segment_seconds"] or longest)
        if seconds > longest:
            raise ConfigError(f"model.audio_encoder.segment_seconds is {seconds}, but {folder} takes {longest} at most")
        settings = extractor.to_dict()
        if "truncation" in settings:
            # CLAP's way of longer audio, which there is none of.
            settings["truncation"] = "rand_trunc"
        config = AudioEncoderConfig(
            name="transformers",
            sample_rate_hz=int(extractor.sampling_rate),
            segment_seconds=seconds,
            num_segments=int(given["num_segments"] or max(1, round(_SECONDS_OF_A_FILE / seconds))),
            extractor=settings,
            num_output_tokens=int(given["tokens_per_segment"]),
            settings={"config": read_tower_config(folder)},
        )
        return _measured(config, cls)

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights of the tower."""
        return {f"model.{name}": value for name, value in load_tower_weights(Path(keys["path"])).items()}

    @classmethod
    def build(cls, config: AudioEncoderConfig) -> nn.Module:
        """Build the tower."""
        return TransformersAudio(config)


def _longest_seconds(extractor: Any) -> float:
    """Return how long a segment can be for a feature extractor."""
    for name, unit in (("chunk_length", 1.0), ("max_length_s", 1.0), ("max_length", 0.01)):
        value = getattr(extractor, name, None)
        if value is not None:
            return float(value) * unit
    raise ConfigError(f"model.audio_encoder: {type(extractor).__name__} does not say how long a segment is")


def _measured(config: AudioEncoderConfig, entry: type[AudioEncoder]) -> AudioEncoderConfig:
    """Fill in the shapes of one segment's features and tokens.

    Raises:
        ConfigError: the encoder does not take what the extractor makes.
    """
    settings = LogMelSettings(
        sample_rate_hz=config.sample_rate_hz, segment_seconds=config.segment_seconds, extractor=config.extractor
    )
    silence = torch.zeros(round(config.segment_seconds * config.sample_rate_hz))
    config.input_size = list(extract_features(silence, settings).shape)
    where = f"model.audio_encoder, features of {config.input_size}"
    with translate_foreign(ConfigError, where, "choose another model.audio_encoder.segment_seconds"):
        shape = output_shape(lambda: entry.build(config), 1, 1, *config.input_size)
    config.output_size = shape[-1]
    return config
