"""What trains: the small parts of one branch, never the encoders or the language model."""

from __future__ import annotations

from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["freeze_for_training"]


def freeze_for_training(
    model: VideoLlamaForConditionalGeneration,
    *,
    video_branch: bool,
    audio_branch: bool,
    video_projection: bool = True,
) -> None:
    """Freeze everything but the trainable parts of the chosen branches (Zhang, Li and Bing 2023, section 2.3).

    Args:
        model: its parameters' `requires_grad` is set.
        video_branch: train the video Q-Former, its queries and the frame positions (`frozen_video_Qformer: False`).
        audio_branch: train the audio Q-Former, its queries, the segment positions and the audio projection
            (`frozen_audio_Qformer: False`).
        video_projection: train the video projection (`frozen_llama_proj: False`).

    Raises:
        ValueError: the audio branch should train, but the model has none.
    """
    model.requires_grad_(False)
    video = model.video_branch
    if video_branch:
        video.video_qformer.requires_grad_(True)
        video.frame_position_embedding.requires_grad_(True)
        video.video_query_tokens.requires_grad_(True)
    if video_projection:
        video.projection.requires_grad_(True)
    if audio_branch:
        if model.audio_branch is None:
            raise ValueError("the audio branch cannot train: the model was built without it")
        audio = model.audio_branch
        audio.audio_qformer.requires_grad_(True)
        audio.segment_position_embedding.requires_grad_(True)
        audio.audio_query_tokens.requires_grad_(True)
        audio.projection.requires_grad_(True)
