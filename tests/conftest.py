"""Fixtures shared by all tests: small media files, drawn on the spot, and small checkpoints with random weights."""

from __future__ import annotations

import math
import os
import shutil
import struct
import sysconfig
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.tiny_model import make_tiny_config
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

MakeVideo = Callable[..., Path]
MakeAudio = Callable[..., Path]

needs_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile needs a C++ compiler and Python.h on a CPU (on Debian: apt-get install g++ python3-dev)",
)


def draw_frame(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """A frame whose grey tells its index (8 levels a frame) and whose red top left quarter tells which way is up."""
    frame = np.full((height, width, 3), 16 + 8 * (index % 24), dtype=np.uint8)
    frame[: height // 2, : width // 2] = (230, 20, 20)
    return frame


def frame_number(frame: NDArray[np.uint8]) -> int:
    """The index that `draw_frame` drew, read from the bottom right quarter."""
    height, width = frame.shape[:2]
    return round((float(frame[height * 3 // 4 :, width * 3 // 4 :].mean()) - 16) / 8)


def draw_tone(seconds: float, rate_hz: int, channels: int, frequency_hz: float = 440.0) -> NDArray[np.float32]:
    """(channels, samples): a tone, quieter in each further channel."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = 0.5 * np.sin(2 * math.pi * frequency_hz * time)
    return np.stack([tone / (channel + 1) for channel in range(channels)]).astype(np.float32)


def add_video_stream(
    container: av.container.OutputContainer,
    size: tuple[int, int],
    fps: int | Fraction,
    codec: str,
    options: dict[str, str] | None = None,
) -> av.VideoStream:
    """Add a video stream."""
    stream = container.add_stream(codec, rate=fps, options=options or {})
    stream.width, stream.height = size
    stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    return stream


def rotate_mp4(path: Path, quarter_turns: int) -> None:
    """Tell players to turn the frames of an MP4 file's only track counter-clockwise (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns % 4]
    matrix = struct.pack(">9i", cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    start = content.index(b"tkhd") + 44
    content[start : start + len(matrix)] = matrix
    path.write_bytes(content)


def encode_video(
    container: av.container.OutputContainer, stream: av.VideoStream, frames: list[NDArray[np.uint8]]
) -> None:
    """Write all frames to a stream of the container."""
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())


def add_audio_stream(
    container: av.container.OutputContainer, channels: int, rate_hz: int, codec: str
) -> av.AudioStream:
    """Add a sound track. All streams must be there before the first packet is written."""
    return container.add_stream(codec, rate=rate_hz, layout={1: "mono", 2: "stereo"}[channels])


def encode_audio(container: av.container.OutputContainer, stream: av.AudioStream, samples: NDArray[np.float32]) -> None:
    """Write (channels, samples) to a stream of the container."""
    rate_hz = stream.rate
    resampler = av.AudioResampler(format=stream.format, layout=stream.layout, rate=rate_hz, frame_size=1024)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=stream.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
    for converted in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(converted))
    container.mux(stream.encode())


def join_videos(path: Path, *parts: Path) -> Path:
    """One stream out of several, whose later frames may have another size than the header says."""
    number = 0
    with av.open(str(path), "w") as output:
        stream: av.VideoStream | None = None
        for part in parts:
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                stream = stream or output.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.size:
                        packet.stream, packet.time_base = stream, Fraction(1, 10)
                        packet.pts = packet.dts = number
                        packet.duration = 1
                        output.mux(packet)
                        number += 1
    return path


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """Write a video of `draw_frame`'s frames, with a tone of the same length if `audio` is true or names a codec."""

    def make(
        name: str = "clip.mp4",
        *,
        num_frames: int = 12,
        size: tuple[int, int] = (64, 48),
        fps: int | Fraction = 10,
        codec: str = "libx264",
        options: dict[str, str] | None = None,
        audio: bool | str = False,
        audio_seconds: float | None = None,
        container_options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        # The index goes to the front, so that a file cut short can still be opened.
        muxer_options = container_options or ({"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {})
        with av.open(str(path), "w", options=muxer_options) as container:
            stream = add_video_stream(container, size, fps, codec, options)
            if audio:
                audio_stream = add_audio_stream(container, 1, 16_000, audio if isinstance(audio, str) else "aac")
            encode_video(container, stream, [draw_frame(index, *size) for index in range(num_frames)])
            if audio:
                seconds = float(num_frames / fps) if audio_seconds is None else audio_seconds
                encode_audio(container, audio_stream, draw_tone(seconds, 16_000, 1))
        return path

    return make


@pytest.fixture
def make_audio(tmp_path: Path) -> MakeAudio:
    """Write a sound file: a tone, or given samples (channels, samples)."""

    def make(
        name: str = "tone.wav",
        *,
        seconds: float = 1.0,
        rate_hz: int = 16_000,
        channels: int = 1,
        codec: str = "pcm_s16le",
        samples: NDArray[np.float32] | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            drawn = draw_tone(seconds, rate_hz, channels) if samples is None else samples
            encode_audio(container, add_audio_stream(container, len(drawn), rate_hz, codec), drawn)
        return path

    return make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights in both layouts, "original" and "hf"; only to be read."""
    from examples.random_checkpoint import make_checkpoint  # it imports the whole model

    folder = tmp_path_factory.mktemp("checkpoints")
    for layout in ("original", "hf"):
        make_checkpoint("tiny", layout, folder / layout)
    return {layout: folder / layout for layout in ("original", "hf")}


@pytest.fixture
def original_folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint in the original layout, to be broken."""
    return shutil.copytree(checkpoints["original"], tmp_path / "original")


@pytest.fixture
def hf_folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that `save_pretrained` could have written, to be broken."""
    return shutil.copytree(checkpoints["hf"], tmp_path / "hf")


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoints: dict[str, Path]) -> Path:
    """A folder that `save_pretrained` could have written; only to be read."""
    return checkpoints["hf"]


@pytest.fixture
def tiny_config() -> VideoLlamaConfig:
    return make_tiny_config()


@pytest.fixture
def tiny_model(tiny_config: VideoLlamaConfig) -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(0)
    return VideoLlamaForConditionalGeneration(tiny_config).eval()
