"""Whole files of every kind, small, to be broken."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.conftest import add_audio_stream, add_video_stream, draw_frame, draw_tone, encode_audio, encode_video

_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
# Name: codec of the frames, of the audio, options of the container.
_VIDEOS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "aac", {"movflags": "faststart"}),
    "hevc.mp4": ("libx265", "aac", {}),
    "av1.mp4": ("libsvtav1", "aac", {}),
    "fragments.mp4": ("libx264", "aac", _FRAGMENTS),
    "vp9.webm": ("libvpx-vp9", "libopus", {}),
    "h264.mkv": ("libx264", "aac", {}),
    "mpeg4.avi": ("mpeg4", "libmp3lame", {}),
    "h264.mov": ("libx264", "aac", {}),
    "mpeg2.ts": ("mpeg2video", "mp2", {}),
    "mpeg2.mpg": ("mpeg2video", "mp2", {}),
}
_AUDIO = {
    "tone.wav": "pcm_s16le",
    "tone.mp3": "libmp3lame",
    "tone.flac": "flac",
    "tone.m4a": "aac",
    "tone.ogg": "libopus",
}
_IMAGES = ("still.jpg", "still.png", "still.webp", "still.bmp", "still.tiff")
_ANIMATIONS = ("moving.gif", "moving.png", "moving.webp")
_NUM_FRAMES = 12


def make_bases(folder: Path) -> list[Path]:
    """Write the files into a folder and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, audio, options) in _VIDEOS.items():
        _write_video(folder / name, codec, audio, options)
    for name, codec in _AUDIO.items():
        with av.open(str(folder / name), "w") as container:
            rate_hz = 48_000 if codec == "libopus" else 16_000
            stream = add_audio_stream(container, 1, rate_hz, codec)
            encode_audio(container, stream, draw_tone(2.5, rate_hz, 1))
    noise = np.random.default_rng(0).integers(0, 255, (6, 24, 32, 3), dtype=np.uint8)
    frames = [Image.fromarray(pixels) for pixels in noise]
    for name in _IMAGES:
        frames[0].save(folder / name)
    for name in _ANIMATIONS:
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=100)
    return sorted(folder.iterdir())


def _write_video(path: Path, codec: str, audio: str, options: dict[str, str]) -> None:
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = add_video_stream(container, (64, 64), Fraction(10), codec, quiet)
        rate_hz = 48_000 if audio == "libopus" else 16_000
        sound = add_audio_stream(container, 1, rate_hz, audio)
        encode_video(container, stream, [draw_frame(index, 64, 64) for index in range(_NUM_FRAMES)])
        encode_audio(container, sound, draw_tone(_NUM_FRAMES / 10, rate_hz, 1))
