"""Frames and waveforms as files: one encoder thread and no dates, so the same content gives the same bytes."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.tiny_world.world.sounds import SAMPLE_RATE_HZ

__all__ = ["encode_jpeg", "write_clip", "write_sound"]

# Without B-frames and lookahead: on images of up to 64 pixels those give other bytes from run to run.
_X264_OPTIONS = {"preset": "veryfast", "crf": "28", "bf": "0", "x264-params": "rc-lookahead=0:mbtree=0:scenecut=0"}
_AAC_BIT_RATE = 20_000
# Leaves out the library's version.
_BITEXACT = {"fflags": "+bitexact"}
_SAMPLES_PER_FRAME = 1024


def write_clip(path: Path, frames: NDArray[np.uint8], fps: int, samples: NDArray[np.float32] | None) -> None:
    """Write an mp4 file: H.264 and, unless `samples` is None, an AAC audio track.

    Args:
        frames: (frames, height, width, 3), uint8, RGB; even height and width.
        samples: (samples,), float32, at `SAMPLE_RATE_HZ`.
    """
    with av.open(str(path), "w", options=_BITEXACT) as container:
        video = container.add_stream("libx264", rate=fps, options=_X264_OPTIONS)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.codec_context.thread_count = 1
        audio = None if samples is None else _add_audio_track(container, "aac")
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        if audio is not None and samples is not None:
            _encode_audio(container, audio, samples)


def write_sound(path: Path, samples: NDArray[np.float32]) -> None:
    """Write an audio file: 16 bit PCM for `.wav`, AAC for `.m4a`; `samples` as for `write_clip`."""
    with av.open(str(path), "w", options=_BITEXACT) as container:
        audio = _add_audio_track(container, "pcm_s16le" if path.suffix == ".wav" else "aac")
        _encode_audio(container, audio, samples)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return an image, (height, width, 3), uint8, RGB, as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _add_audio_track(container: av.container.OutputContainer, codec: str) -> av.AudioStream:
    stream = container.add_stream(codec, rate=SAMPLE_RATE_HZ, layout="mono")
    assert isinstance(stream, av.AudioStream)
    if codec == "aac":
        stream.bit_rate = _AAC_BIT_RATE
    stream.codec_context.thread_count = 1
    return stream


def _encode_audio(
    container: av.container.OutputContainer, stream: av.AudioStream, samples: NDArray[np.float32]
) -> None:
    # "fltp" for AAC, "s16" for PCM.
    wanted = stream.codec_context.format.name
    values: NDArray[Any] = samples if wanted == "fltp" else np.round(samples * 32767).astype(np.int16)
    for start in range(0, len(values), _SAMPLES_PER_FRAME):
        block = np.ascontiguousarray(values[None, start : start + _SAMPLES_PER_FRAME])
        frame = av.AudioFrame.from_ndarray(block, format=wanted, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE_HZ, start, Fraction(1, SAMPLE_RATE_HZ)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
