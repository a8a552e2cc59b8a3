"""A generated corpus in all layouts, and what reads it: a small processor without any weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.tiny_world.world.corpus import CorpusSettings, make_corpus
from video_llama.data.examples import Example, MediaSource
from video_llama.data.sample_processor import SampleProcessor, TextSettings
from video_llama.processor.audio_features import LogMelSettings
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "data" / "reference" / "tokenizer"
NUM_CLIPS = 10  # in the training split

WriteText = Callable[..., Path]
MakeEncoder = Callable[..., SampleProcessor]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read: splits of 10, 3 and 2 clips."""
    folder = tmp_path_factory.mktemp("corpus") / "clipworld"
    make_corpus(folder, CorpusSettings(15, 1, 64, (NUM_CLIPS, 3, 2)))
    return folder


@pytest.fixture(scope="session")
def processor() -> VideoLlamaProcessor:
    """Of a model of 28 pixels and 2 frames, with 5 query tokens for what it sees and 3 for what it hears."""
    tokenizer = load_tokenizer(TOKENIZER)
    return VideoLlamaProcessor(
        tokenizer,
        len(tokenizer),
        len(tokenizer) + 1,
        media_processor=MediaProcessor(
            num_frames=2, image_size=28, log_mel=LogMelSettings(num_mel_bins=32, num_mel_frames=36)
        ),
        num_video_query_tokens=5,
        num_audio_query_tokens=3,
    )


@pytest.fixture
def make_encoder(processor: VideoLlamaProcessor) -> MakeEncoder:
    """An encoder; settings of the text are `TextSettings`', the others `SampleProcessor`'s."""

    def make(**settings: Any) -> SampleProcessor:
        of_text = {"max_txt_len": 64, "end_sym": "###", "template": "vicuna"}
        of_text |= {key: settings.pop(key) for key in list(settings) if key in TextSettings.__dataclass_fields__}
        text = TextSettings(
            processor.tokenizer,
            **{
                "placeholder_ids": processor.placeholder_ids,
                "placeholder_lengths": processor.placeholder_lengths,
                **of_text,
            },
        )
        return SampleProcessor(text, settings.pop("media", processor.media_processor), **settings)

    return make


@pytest.fixture
def write(tmp_path: Path) -> WriteText:
    """Write text, or anything else as JSON, to a file of a temporary folder."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A jpg of one colour."""
    return write_picture(tmp_path / "picture.jpg")


def write_picture(path: Path, colour: tuple[int, int, int] = (200, 40, 90), size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), colour, dtype=np.uint8)).save(path, quality=95)
    return path


def captioned(path: Path, caption: str = "a dog", kind: Any = "image", id_: str = "set/1") -> Example:
    return Example(id_, kind, MediaSource(str(path)), {"caption": caption})
