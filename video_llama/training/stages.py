"""What trains: the small parts of one branch, never the encoders or the language model."""

from __future__ import annotations

from dataclasses import dataclass

from video_llama.config import ModelConfig
from video_llama.errors import ConfigError
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["TrainedParts", "freeze_for_training", "trained_branches"]


@dataclass(frozen=True)
class TrainedParts:
    """Which small parts train.

    Args:
        video: the video Q-Former, its queries and the frame positions (`frozen_video_Qformer: False`).
        projection: the video projection (`frozen_llama_proj: False`).
        audio: the audio Q-Former, its queries, the segment positions and the audio projection
            (`frozen_audio_Qformer: False`).
    """

    video: bool
    projection: bool
    audio: bool


def trained_branches(config: ModelConfig) -> TrainedParts:
    """The parts that a configuration trains.

    Raises:
        ConfigError: none of them; encoders, which never train here; or an audio branch that is not built.
    """
    if not config.freeze_vit or not config.freeze_qformer:
        raise ConfigError("model.freeze_vit and model.freeze_qformer must be True: the encoders do not train")
    parts = TrainedParts(not config.frozen_video_Qformer, not config.frozen_llama_proj, not config.frozen_audio_Qformer)
    if not (parts.video or parts.projection or parts.audio):
        raise ConfigError(
            "everything is frozen: set model.frozen_video_Qformer and frozen_llama_proj, or frozen_audio_Qformer, "
            "to False"
        )
    if parts.audio and not config.equip_audio_branch:
        raise ConfigError("model.frozen_audio_Qformer is False, but equip_audio_branch is False, too")
    return parts


def freeze_for_training(model: VideoLlamaForConditionalGeneration, parts: TrainedParts) -> None:
    """Freeze everything but the parts that train (Zhang, Li and Bing 2023, section 2.3).

    Args:
        model: its parameters' `requires_grad` is set.
        parts: what trains.

    Raises:
        ConfigError: the audio branch should train, but the model has none.
    """
    model.requires_grad_(False)
    video = model.video_branch
    if parts.video:
        video.video_qformer.requires_grad_(True)
        video.frame_position_embedding.requires_grad_(True)
        video.video_query_tokens.requires_grad_(True)
    if parts.projection:
        video.projection.requires_grad_(True)
    if parts.audio:
        if model.audio_branch is None:
            raise ConfigError("the audio branch cannot train: the model was built without it")
        audio = model.audio_branch
        audio.audio_qformer.requires_grad_(True)
        audio.segment_position_embedding.requires_grad_(True)
        audio.audio_query_tokens.requires_grad_(True)
        audio.projection.requires_grad_(True)
