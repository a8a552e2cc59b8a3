"""Files encoded anew under new names, so that nothing but their frames and their audio can be recognised."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from video_llama.constants import Modality

__all__ = ["reencode"]

_X264_OPTIONS = {"preset": "veryfast", "crf": "23"}
_AAC_BIT_RATE = 48_000
_JPEG_QUALITY = 85


def reencode(source: Path, modality: Modality, target: Path) -> Path:
    """Decode a file and encode it anew.

    Args:
        source: a video (becomes H.264 and AAC in mp4), an image (JPEG) or audio (AAC).
        modality: of the source.
        target: path without suffix.

    Returns:
        the new file.
    """
    if modality == "image":
        path = target.with_suffix(".jpg")
        with Image.open(source) as image:
            image.convert("RGB").save(path, quality=_JPEG_QUALITY)
        return path
    path = target.with_suffix(".mp4" if modality == "video" else ".m4a")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = _add_video(new, old.streams.video[0]) if old.streams.video else None
        audio = None
        if old.streams.audio:
            track = old.streams.audio[0]
            audio = new.add_stream("aac", rate=track.rate, layout="mono" if track.channels == 1 else "stereo")
            audio.bit_rate = _AAC_BIT_RATE
            # The format that the encoder takes.
            resampler = av.AudioResampler(format="fltp", layout=audio.layout, rate=audio.rate)
        for frame in old.decode(*old.streams.video, *old.streams.audio):
            if isinstance(frame, av.VideoFrame):
                assert video is not None
                # The encoder chooses, not the old file.
                frame.pict_type = 0
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
