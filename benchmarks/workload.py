"""Floating-point operations to caption a clip, or to learn from one, on the formulas of the training's log."""

from __future__ import annotations

from dataclasses import dataclass

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.training.flops import (
    audio_branch_flops,
    frame_flops,
    language_model_flops,
    trunk_flops,
    video_branch_flops,
)

__all__ = ["ClipFlops", "Workload", "branch_flops", "caption_flops", "encoder_flops", "training_flops"]


@dataclass(frozen=True)
class Workload:
    """What is done to one clip.

    Args:
        num_frames: that are encoded.
        num_segments: of audio that are encoded; 0 for none.
        num_text_tokens: of the prompt besides the media.
        num_answer_tokens: generated, or learned from.
    """

    num_frames: int = 8
    num_segments: int = 8
    num_text_tokens: int = 100
    num_answer_tokens: int = 64

    def prompt_tokens(self, config: VideoLlamaConfig) -> int:
        """Text and media together."""
        audio = config.num_audio_query_tokens if self.num_segments else 0
        return self.num_text_tokens + config.num_video_query_tokens + audio


@dataclass(frozen=True)
class ClipFlops:
    """Operations for one clip.

    Args:
        encoders: ViT, BLIP-2's Q-Former and ImageBind's trunk: what a feature cache saves.
        branches: the two small Q-Formers and the projections.
        prompt: the language model reads the prompt (in training: the whole sample).
        answer: it writes the answer token by token.
        backward: in training.
    """

    encoders: float
    branches: float
    prompt: float
    answer: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.encoders + self.branches + self.prompt + self.answer + self.backward


def caption_flops(config: VideoLlamaConfig, work: Workload) -> ClipFlops:
    """To caption a clip: everything forward; each token of the answer attends to all before it."""
    text, prompt = config.get_text_config(), work.prompt_tokens(config)
    read = language_model_flops(text, prompt, prompt, num_logits=1)
    written = sum(
        language_model_flops(text, 1, prompt + number, num_logits=1) for number in range(1, work.num_answer_tokens)
    )
    return ClipFlops(encoder_flops(config, work), branch_flops(config, work), read, written)


def training_flops(config: VideoLlamaConfig, work: Workload, is_cached: bool = False) -> ClipFlops:
    """To learn from a clip, as `video_llama.training.flops.batch_flops` counts a batch."""
    text = config.get_text_config()
    tokens = work.prompt_tokens(config) + work.num_answer_tokens
    read = language_model_flops(text, tokens, tokens, num_logits=work.num_answer_tokens)
    branches = branch_flops(config, work)
    attention = read - language_model_flops(text, tokens, 0, num_logits=work.num_answer_tokens)
    encoders = 0.0 if is_cached else encoder_flops(config, work)
    return ClipFlops(encoders, branches, read, 0.0, read + attention + 2 * branches)


def encoder_flops(config: VideoLlamaConfig, work: Workload) -> float:
    """What depends on the file alone."""
    return work.num_frames * frame_flops(config) + work.num_segments * trunk_flops(config.audio_config)


def branch_flops(config: VideoLlamaConfig, work: Workload) -> float:
    """What trains: Q-Formers over all frames and all segments, projections."""
    flops = video_branch_flops(config, work.num_frames)
    if work.num_segments:
        flops += audio_branch_flops(config, work.num_segments)
    return flops
