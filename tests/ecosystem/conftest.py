"""The model of the package, small enough to train for a few steps, and rows of media that it knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from video_llama import Chat, VideoLlama, VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMALL_MODEL = PACKAGED_MODELS / "video-llama-tiny"
SAMPLES = Path(__file__).parents[2] / "video_llama/demo/samples"
IMAGE, VIDEO, AUDIO = SAMPLES / "cross.jpg", SAMPLES / "stars.mp4", SAMPLES / "tone.m4a"
ABOUT_VIDEO, ABOUT_IMAGE = "What happens in the video?", "What is in the picture?"


def ask(kind: str, path: Path, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "path": str(path)}, {"type": "text", "text": question}]}]


def rows() -> list[dict[str, Any]]:
    """One row of each kind of media, with an answer that the model does not give yet."""
    # Tables of `datasets` want one form of content.
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Three small blue rings."}]}]
    kinds = (("video", VIDEO, ABOUT_VIDEO), ("image", IMAGE, ABOUT_IMAGE), ("audio", AUDIO, "What do you hear?"))
    return [{"messages": [*ask(*kind), *answer]} for kind in kinds]


@pytest.fixture
def model() -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(0)
    return VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32)


@pytest.fixture(scope="session")
def processor() -> VideoLlamaProcessor:
    return VideoLlamaProcessor.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="session")
def chat_answer(processor: VideoLlamaProcessor) -> str:
    """What `Chat` says about the video."""
    whole = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    chat = Chat(VideoLlama(whole, processor))
    chat.upload_video_without_audio(str(VIDEO))
    chat.ask(ABOUT_VIDEO)
    return chat.answer(temperature=0)
