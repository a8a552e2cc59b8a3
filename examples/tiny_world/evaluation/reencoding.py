"""Files encoded once more under new names, so that nothing but their pixels and their sound can be recognised."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

__all__ = ["reencode"]

_X264_OPTIONS = {"preset": "veryfast", "crf": "23"}
_AAC_BIT_RATE = 48_000
_JPEG_QUALITY = 85


def reencode(source: Path, kind: str, target: Path) -> Path:
    """Decode a file and encode it anew.

    Args:
        source: a clip (becomes H.264 and AAC in mp4), an image (JPEG) or a sound (AAC).
        kind: "clip", "image" or "sound".
        target: path without suffix.

    Returns:
        the new file.
    """
    if kind == "image":
        path = target.with_suffix(".jpg")
        with Image.open(source) as image:
            image.convert("RGB").save(path, quality=_JPEG_QUALITY)
        return path
    path = target.with_suffix(".mp4" if kind == "clip" else ".m4a")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = _add_video(new, old.streams.video[0]) if old.streams.video else None
        audio = None
        if old.streams.audio:
            heard = old.streams.audio[0]
            audio = new.add_stream("aac", rate=heard.rate, layout="mono" if heard.channels == 1 else "stereo")
            audio.bit_rate = _AAC_BIT_RATE
            resampler = av.AudioResampler(
                format="fltp", layout=audio.layout, rate=audio.rate
            )  # as the encoder wants it
        for frame in old.decode(*old.streams.video, *old.streams.audio):
            if isinstance(frame, av.VideoFrame):
                assert video is not None
                frame.pict_type = 0  # the encoder's choice, not the old file's
                new.mux(video.encode(frame))
            elif isinstance(frame, av.AudioFrame):
                assert audio is not None
                for block in resampler.resample(frame):
                    new.mux(audio.encode(block))
        for stream in (video, audio):
            if stream is not None:
                new.mux(stream.encode())
    return path


def _add_video(container: av.container.OutputContainer, old: Any) -> Any:
    stream = container.add_stream("libx264", rate=Fraction(old.average_rate), options=_X264_OPTIONS)
    stream.width, stream.height, stream.pix_fmt = old.width, old.height, "yuv420p"
    return stream
