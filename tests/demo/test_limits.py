"""What may be uploaded and asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from video_llama.demo.limits import Limits
from video_llama.errors import MediaError, VideoLlamaError


@pytest.mark.parametrize(("name", "kind"), [("clip.mp4", "video"), ("tone.wav", "audio"), ("still.png", "image")])
def test_a_file_within_the_limits_has_a_kind(
    name: str, kind: str, make_video: Callable[..., Path], make_audio: Callable[..., Path], image: Path
) -> None:
    path = {"clip.mp4": make_video, "tone.wav": make_audio}.get(name, lambda _: image)(name)
    assert Limits().check_file(path) == kind


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(upload_mb=0.0001), "0 MB is too large (at most 0.0001 MB)"),
        (Limits(seconds=1), "minutes are too long"),
        (Limits(pixels=64 * 48 - 1), "64x48 pixels are too many"),
    ],
)
def test_a_video_that_is_too_large_too_long_or_too_wide_is_refused(
    limits: Limits, message: str, make_video: Callable[..., Path]
) -> None:
    with pytest.raises(MediaError, match=re.escape(message)):
        limits.check_file(make_video(num_frames=20))


def test_a_length_is_measured_and_not_believed(make_video: Callable[..., Path]) -> None:
    path = make_video("clip.mp4", num_frames=300, fps=10)
    content = bytearray(path.read_bytes())
    for box in (b"mvhd", b"tkhd", b"mdhd"):  # let the headers tell of a tenth of a second
        start = content.index(box) + 4
        offset = start + (20 if box == b"tkhd" else 16)
        content[offset : offset + 4] = (100).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(MediaError, match="too long"):
        Limits(seconds=20).check_file(path)


def test_a_video_whose_frames_are_costly_to_reach_is_refused(make_video: Callable[..., Path]) -> None:
    sparse, dense = (
        make_video(f"{size}.mp4", num_frames=40, options={"g": str(size), "sc_threshold": "0"}) for size in (100, 5)
    )
    limits = Limits(pixels_between_keyframes=64 * 48 * 10)
    assert limits.check_file(dense) == "video"
    with pytest.raises(MediaError, match="too many frames between key frames"):
        limits.check_file(sparse)


def test_a_sound_track_longer_than_its_video_counts(make_video: Callable[..., Path]) -> None:
    path = make_video("clip.mkv", num_frames=5, audio=True, audio_seconds=12.0)
    assert Limits(seconds=15).check_file(path) == "video"
    with pytest.raises(MediaError, match="too long"):
        Limits(seconds=5).check_file(path)


def test_an_image_with_more_pixels_than_it_has_bytes_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(MediaError, match=r"20000x20000 pixels are too many|too many pixels"):
        Limits().check_file(path)
    assert path.stat().st_size < 200_000


def test_questions_are_trimmed_and_bounded() -> None:
    assert Limits().check_question("  Why? ") == "Why?"
    with pytest.raises(VideoLlamaError, match="type a question"):
        Limits().check_question(" \n")
    for wrong in (5, None, ["a"]):
        with pytest.raises(VideoLlamaError, match="the question must be text"):
            Limits().check_question(wrong)
    with pytest.raises(VideoLlamaError, match="has 11 characters; the limit is 10"):
        Limits(question_characters=10).check_question("a" * 11)
