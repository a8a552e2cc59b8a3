"""Frames, times, orientation and audio of clips that tell on their own what is right, read off the model's inputs."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.media.barcode import CORNERS, ClipSpec, all_specs, corner_colours, read_barcode, write_clip
from video_llama.media import audio
from video_llama.media.frame_index import FrameIndex
from video_llama.processor.clips import ClipReader, Window
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames

SPECS = list(all_specs())
# One of each container.
DRAWN = [
    random.Random(number).choice([spec for spec in SPECS if spec.suffix == suffix])
    for number, suffix in enumerate(sorted({spec.suffix for spec in SPECS}))
]
PROCESSOR = MediaProcessor(image_size=96, num_frames=100, num_audio_segments=3)
# Of log-mel: what the beep is louder than, and the silence and the padding are not.
LOUD = 3.0
# Rounded times, and what encoders put in front of the audio.
SLACK_SECONDS = 0.06


def see(frames: VideoFrames) -> NDArray[np.uint8]:
    """(frames, height, width, 3): the pixels that the model gets."""
    pixels = frames.pixel_values
    if pixels.dtype != torch.uint8:
        mean, std = (torch.tensor(values)[:, None, None] for values in (PROCESSOR.mean, PROCESSOR.std))
        pixels = ((pixels * std + mean) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def hear(segments: AudioSegments) -> list[float]:
    """The seconds in which something is heard, a hundredth apart."""
    log_mel = segments.values[:, 0] * PROCESSOR.log_mel.std + PROCESSOR.log_mel.mean  # (segments, bins, frames)
    heard = set()
    for start, mel in zip(segments.start_seconds, log_mel, strict=True):
        for frame in torch.nonzero(mel.amax(dim=0) > LOUD).flatten().tolist():
            heard.add(round(start + frame / 100, 2))
    return sorted(heard)


def check_frames(frames: VideoFrames, numbers: list[int], times: list[float]) -> None:
    pixels = see(frames)
    assert [read_barcode(frame) for frame in pixels] == numbers
    assert {corner_colours(frame) for frame in pixels} == {CORNERS}
    assert frames.times_seconds == pytest.approx(times, abs=0.0011)


def check_beep(segments: AudioSegments, begins: float) -> None:
    heard = hear(segments)
    assert heard[0] == pytest.approx(begins, abs=SLACK_SECONDS)
    assert heard[-1] == pytest.approx(begins + 0.2, abs=SLACK_SECONDS)


def check_whole(path: Path, spec: ClipSpec) -> None:
    frames, segments = PROCESSOR.process_video(path)
    assert segments is not None
    check_frames(frames, list(range(len(spec.times_seconds))), spec.times_seconds)
    check_beep(segments, spec.beep_seconds)
    alone = PROCESSOR.process_audio(path)
    assert torch.equal(alone.values, segments.values)


def check_windows(path: Path, spec: ClipSpec) -> list[AudioSegments]:
    reader = ClipReader(PROCESSOR, num_frames=100, window_seconds=1.0)
    windows: list[Window] = []
    for first in count(step=8):
        total, read = reader(path, first)
        windows += [window for window in read if isinstance(window, Window)]
        if first + 8 >= total:
            break
    assert len(windows) == total == 6
    times = spec.times_seconds
    with_beep = []
    for number, window in enumerate(windows):
        assert window.frames is not None
        assert window.audio is not None
        numbers = [index for index, time in enumerate(times) if number <= time + 1e-9 < number + 1]
        on_screen = max(index for index, time in enumerate(times) if time <= number + 1e-9)
        if on_screen not in numbers:
            numbers = [on_screen, *numbers]
        check_frames(window.frames, numbers, [max(0.0, times[index] - number) for index in numbers])
        if hear(window.audio):
            with_beep.append(number)
    assert with_beep == [int(spec.beep_seconds)]
    heard = [window.audio for window in windows if window.audio is not None]
    check_beep(heard[with_beep[0]], spec.beep_seconds - with_beep[0])
    return heard


def check_clip(folder: Path, spec: ClipSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(folder, spec)
    check_whole(path, spec)
    sought = check_windows(path, spec)
    monkeypatch.setattr(audio, "_seek", lambda *args: False)
    monkeypatch.setattr(FrameIndex, "group_by_keyframe", lambda self, indices: {0: sorted(set(indices))})
    for window, decoded in zip(sought, check_windows(path, spec), strict=True):
        assert hear(window) == pytest.approx(hear(decoded), abs=0.011)


@pytest.mark.parametrize("spec", DRAWN, ids=str)
def test_frames_and_audio_of_a_drawn_clip_are_on_one_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ClipSpec
) -> None:
    check_clip(tmp_path, spec, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in DRAWN], ids=str)
def test_frames_and_audio_are_on_one_clock_in_whatever_a_container_can_express(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ClipSpec
) -> None:
    check_clip(tmp_path, spec, monkeypatch)
