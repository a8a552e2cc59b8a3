"""Frames, times, orientation and audio of clips that tell on their own what is right, read off the model's inputs."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.media.barcode import CORNERS, ClipSpec, all_specs, corner_colours, draw_barcode, read_barcode, write_clip
from video_llama.media import audio, containers
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


def test_audio_behind_a_gap_of_an_avi_file_is_found_from_a_keyframe_within_the_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FFmpeg counts the gap twice where it begins to read at the keyframe at 2.0 s.
    if not hasattr(av.stream.Stream, "index_entries"):
        pytest.skip("PyAV before 17 does not tell of gaps")
    check_clip(tmp_path, ClipSpec("avi", fault="gap", frames_a_keyframe=20, gap_ends_seconds=2.2), monkeypatch)


def write_odd_clip(folder: Path, suffix: str, begins: float = 0.0) -> Path:
    """Six seconds of numbered frames, ten or 25 a second; a beep from 4.0 to 4.2 s; audio that may begin late."""
    path = folder / f"odd.{suffix}"
    video_codec, audio_codec, rate, size = "libx264", "aac", 10, 1024
    if suffix == "mpg":
        # MPEG-2 has no 10 frames a second.
        video_codec, audio_codec, rate, size = "mpeg2video", "mp2", 25, 1152
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=rate, options={"g": "12", "bf": "2"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream(audio_codec, rate=48_000, layout="mono")
        packets = []
        for number in range(6 * rate):
            packets += video.encode(av.VideoFrame.from_ndarray(draw_barcode(number), format="rgb24"))
        packets += video.encode(None)
        time = np.arange(6 * 48_000) / 48_000
        beep = np.where((time >= 4.0) & (time < 4.2), 0.5 * np.sin(2 * np.pi * 880 * time), 0.0).astype(np.float32)
        resampler = av.AudioResampler(format=sound.format, layout="mono", rate=48_000)
        for first in range(0, len(beep) // size * size, size):
            if first / 48_000 < begins:
                continue
            frame = av.AudioFrame.from_ndarray(beep[np.newaxis, first : first + size], format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, first, Fraction(1, 48_000)
            for converted in resampler.resample(frame):
                packets += sound.encode(converted)
        packets += sound.encode(None)
        packets.sort(key=lambda packet: float(packet.dts * packet.time_base))
        for packet in packets:
            container.mux(packet)
    return path


def find_beeps(path: Path) -> list[tuple[int, float]]:
    """(number of the window of one second, when the beep begins in the whole) for each window with a beep."""
    reader = ClipReader(PROCESSOR, num_frames=100, window_seconds=1.0)
    found, number = [], 0
    for first in count(step=8):
        total, windows = reader(path, first)
        for window in windows:
            assert isinstance(window, Window)
            if window.audio is not None and (heard := hear(window.audio)):
                found.append((number, number + heard[0]))
            number += 1
        if first + 8 >= total:
            return found


def test_windows_have_their_audio_where_seeking_leads_into_a_packet(tmp_path: Path) -> None:
    path = write_odd_clip(tmp_path, "mpg")
    assert find_beeps(path) == [(4, pytest.approx(4.0, abs=SLACK_SECONDS))]


def test_windows_of_recordings_that_were_put_together_have_their_audio(tmp_path: Path) -> None:
    path = write_odd_clip(tmp_path, "ts")
    path.write_bytes(path.read_bytes() * 2)
    beeps = [(4, pytest.approx(4.0, abs=SLACK_SECONDS)), (10, pytest.approx(10.0, abs=2 * SLACK_SECONDS))]
    assert find_beeps(path) == beeps
    alone, (_, together) = PROCESSOR.process_audio(path), PROCESSOR.process_video(path)
    assert together is not None
    assert torch.equal(alone.values, together.values)
    assert alone.duration_seconds == pytest.approx(12.0, abs=2 * SLACK_SECONDS)


def test_audio_that_begins_behind_what_ffmpeg_probes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_odd_clip(tmp_path, "ts", begins=3.0)
    # As if the frames before it were as large as those of a camera.
    monkeypatch.setitem(containers._OPEN_OPTIONS, "probesize", "2000")
    with av.open(str(path), container_options={"probesize": "2000"}) as container:
        assert container.streams.best("audio") is None
    assert find_beeps(path) == [(4, pytest.approx(4.0, abs=SLACK_SECONDS))]
