"""The sizes that a model section sets, and those that a config.json beside the weights has: they must agree."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

from video_llama.checkpoints.load import original_config
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.config import ModelConfig
from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig

__all__ = ["check_sizes", "configured_sizes", "sizes_to_set"]

# Keys of the model section, and where their value is in the model's own configuration.
_PLACES = {
    "image_size": "vision_config.image_size",
    "fusion_head_layers": "video_qformer_config.num_hidden_layers",
    "num_query_token": "num_query_tokens",
    "num_video_query_token": "num_video_query_tokens",
    "num_audio_query_token": "num_audio_query_tokens",
    "max_frame_pos": "max_frame_positions",
}


def sizes_to_set(config: ModelConfig, files: OriginalFiles) -> dict[str, Any]:
    """The sizes of a model section as fields of `VideoLlamaConfig`; none where a config.json has all of them.

    Raises:
        ConfigError: the section contradicts the config.json.
        CheckpointError: a configuration file is missing or damaged.
    """
    if files.config is not None:
        check_sizes(config, original_config(files), files.config)
        return {}
    return configured_sizes(config)


def configured_sizes(config: ModelConfig) -> dict[str, Any]:
    """The sizes that a model section sets; all others are those of the published model."""
    head = {"num_hidden_layers": config.fusion_head_layers, "cross_attention_frequency": 1}
    return {
        "vision_config": {"image_size": config.image_size, "drop_path_rate": config.drop_path_rate},
        "video_qformer_config": head,
        "audio_qformer_config": head,
        "num_query_tokens": config.num_query_token,
        "num_video_query_tokens": config.num_video_query_token,
        "num_audio_query_tokens": config.num_audio_query_token,
        "max_frame_positions": config.max_frame_pos,
    }


def check_sizes(config: ModelConfig, built: VideoLlamaConfig, file: Path) -> None:
    """Compare a model section with the model that a config.json describes.

    The published sizes, which are the section's defaults, are as good as not set.

    Args:
        config: the section.
        built: what the file describes.
        file: named in the message.

    Raises:
        ConfigError: they differ; all keys are named.
    """
    published = ModelConfig()
    differences = [
        f"model.{key} is {getattr(config, key)}, but there it is {attrgetter(place)(built)}"
        for key, place in _PLACES.items()
        if getattr(config, key) not in (getattr(published, key), attrgetter(place)(built))
    ]
    if differences:
        raise ConfigError(
            f"{file} has the sizes of the weights beside it: {'; '.join(differences)}. Leave out what it says, or name "
            "the files of another model"
        )
