"""A Video-LLaMA small enough to build in every test."""

from __future__ import annotations

import torch
from torch import Tensor

from video_llama.model.configuration import VideoLlamaConfig


def make_tiny_config(**changes: object) -> VideoLlamaConfig:
    qformer = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return VideoLlamaConfig(
        **{
            "vision_config": {
                "image_size": 28,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            },
            "qformer_config": {**qformer, "num_hidden_layers": 2},
            "video_qformer_config": qformer,
            "audio_qformer_config": qformer,
            "audio_config": {
                "input_size": (32, 36),
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "output_size": 24,
            },
            "text_config": {
                "model_type": "llama",
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "num_query_tokens": 6,
            "num_video_query_tokens": 5,
            "num_audio_query_tokens": 3,
            "max_frame_positions": 8,
            "max_segment_positions": 4,
            **changes,
        }
    )


def prompt_ids(config: VideoLlamaConfig, *parts: int | str) -> list[int]:
    """Token ids with a run of placeholder ids for every "video" and "sound"."""
    runs = {
        "video": [config.image_token_id] * config.num_video_query_tokens,
        "sound": [config.audio_token_id] * config.num_audio_query_tokens,
    }
    return [token for part in parts for token in (runs[part] if isinstance(part, str) else [part])]


def frames(videos: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(videos, count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def sound(sounds: int, segments: int, seed: int = 0) -> Tensor:
    return torch.randn(sounds, segments, 1, 32, 36, generator=torch.Generator().manual_seed(seed))
