"""Clips that tell on their own what a reader made of them: PyAV and numpy are all that is needed to write them.

Each frame carries its number as a barcode and a colour in each corner; the audio is silent but for one beep at a known
second. Frames and audio may begin late or have a gap, the rate may vary, and the file may say that its frames are to be
turned or mirrored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

__all__ = ["CORNERS", "ClipSpec", "all_specs", "corner_colours", "draw_barcode", "read_barcode", "write_clip"]

Orientation = Literal["upright", "rotated", "mirrored"]
Fault = Literal["none", "late audio", "late video", "gap"]

WIDTH, HEIGHT, NUM_BITS = 96, 64, 8
SECONDS, BEEP_HZ, RATE_HZ = 6.0, 880.0, 48_000
# Where a late track begins, and a gap.
LATE_SECONDS = 1.5
CORNERS = ("red", "green", "blue", "yellow")
_COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "yellow": (220, 220, 40)}

# Video codec, audio codec; where the orientation is stated: by an MP4 file's track, by a Matroska file's projection,
# which FFmpeg copies from an MP4 file, or by the codec's own messages.
_CODECS = {
    "mp4": ("libx264", "aac", "container"),
    "mov": ("libx264", "aac", "container"),
    "mkv": ("libx264", "libopus", "codec"),
    "webm": ("libvpx-vp9", "libopus", "projection"),
    "ts": ("libx264", "aac", "codec"),
    "avi": ("libx264", "pcm_s16le", "codec"),
}
# The display matrix of the container; H.264's message (Rec. ITU-T H.264, D.1.27), which holds until the next keyframe.
_MATRICES = {"rotated": (0, 1, -1, 0), "mirrored": (-1, 0, 0, 1)}
_MESSAGES = {"rotated": b"\x06\x2f\x03\x18\x00\x09\x80", "mirrored": b"\x06\x2f\x03\x40\x00\x09\x80"}


@dataclass(frozen=True)
class ClipSpec:
    """What a clip is like.

    Attributes:
        suffix: of the container.
        orientation: what the file says is to be done to show its frames upright.
        is_variable: whether the time between frames varies.
        fault: which track begins late, or has a gap.
        beep_seconds: when the beep begins, counted from the first frame.
        frames_a_keyframe: from one keyframe to the next.
        gap_ends_seconds: where a gap ends that begins where a late track does.
    """

    suffix: str
    orientation: Orientation = "upright"
    is_variable: bool = False
    fault: Fault = "none"
    beep_seconds: float = 4.3
    frames_a_keyframe: int = 8
    gap_ends_seconds: float = 3.0

    @property
    def rate(self) -> int:
        """Return the frames per second that the header states."""
        if self.is_variable:
            return 20
        return 10

    @property
    def times_seconds(self) -> list[float]:
        """Return when each frame is shown, counted from the first one."""
        if not self.is_variable:
            return [index / 10 for index in range(round(SECONDS * 10))]
        # 20 a second, then fewer and fewer.
        ticks = [*range(30), *range(32, 60, 4), *range(61, 100, 9), 110]
        return [tick / 20 for tick in ticks]

    @property
    def start_seconds(self) -> float:
        """Return when the first frame is shown, on the clock of the file."""
        if self.fault == "late video":
            return LATE_SECONDS
        return 0.0

    def __str__(self) -> str:
        rate = "variable" if self.is_variable else "constant"
        return "-".join((self.suffix, self.orientation, rate, self.fault.replace(" ", "_")))


def all_specs() -> Iterator[ClipSpec]:
    """Every combination of container, orientation, rate and fault."""
    orientations: tuple[Orientation, ...] = ("rotated", "mirrored")
    faults: tuple[Fault, ...] = ("late audio", "late video", "gap")
    for suffix, orientation, is_variable, fault in product(_CODECS, orientations, (False, True), faults):
        yield ClipSpec(suffix, orientation, is_variable, fault)


def draw_barcode(number: int) -> NDArray[np.uint8]:
    """Draw an upright frame: (HEIGHT, WIDTH, 3), the number in white and black columns above their inverse."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    half_height, half_width = HEIGHT // 2, WIDTH // 2
    for corner, name in enumerate(CORNERS):
        rows, columns = divmod(corner, 2)
        top, left = rows * half_height, columns * half_width
        frame[top : top + half_height, left : left + half_width] = _COLOURS[name]
    column = WIDTH // NUM_BITS
    for bit in range(NUM_BITS):
        value = 255 * (number >> (NUM_BITS - 1 - bit) & 1)
        frame[HEIGHT // 4 : half_height, bit * column : (bit + 1) * column] = value
        frame[half_height : HEIGHT * 3 // 4, bit * column : (bit + 1) * column] = 255 - value
    return frame


def read_barcode(frame: NDArray[np.uint8]) -> int:
    """Return the number in an upright frame of any size; -1 where it cannot be read."""
    height, width = frame.shape[:2]
    grey = frame.mean(axis=-1)
    number = 0
    for bit in range(NUM_BITS):
        column = round((bit + 0.5) * width / NUM_BITS)
        difference = float(grey[round(height * 0.375), column] - grey[round(height * 0.625), column])
        if abs(difference) < 100:
            return -1
        number = 2 * number + int(difference > 0)
    return number


def corner_colours(frame: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the names of the colours top left, top right, bottom left and bottom right."""
    height, width = frame.shape[:2]
    names = []
    for row, column in product((height // 8, height * 7 // 8), (width // 8, width * 7 // 8)):
        pixel = frame[row, column].astype(int)
        names.append(min(_COLOURS, key=lambda name: np.abs(pixel - _COLOURS[name]).sum()))
    return tuple(names)


def write_clip(folder: Path, spec: ClipSpec) -> Path:
    """Write a clip and return its path."""
    path = folder / f"{spec}.{spec.suffix}"
    states_it = _CODECS[spec.suffix][2]
    if spec.orientation == "upright" or states_it == "codec":
        _write_container(path, spec)
        return path
    boxes = path.with_suffix(".mp4")
    if states_it == "container":
        boxes = path
    _write_container(boxes, spec)
    _write_matrix(boxes, _MATRICES[spec.orientation])
    if boxes != path:
        _copy_streams(boxes, path)
    return path


def _write_container(path: Path, spec: ClipSpec) -> None:
    video_codec, audio_codec, _ = _CODECS[spec.suffix]
    if (spec.suffix, spec.fault) == ("avi", "gap"):
        # Chunks have no times. Empty ones are a gap where chunks are counted, not samples.
        audio_codec = "flac"
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=spec.rate, options=_video_options(spec))
        stored = _store(draw_barcode(0), spec.orientation)
        video.height, video.width = stored.shape[:2]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream(audio_codec, rate=RATE_HZ, layout="mono")
        # FLAC ends with a packet that holds nothing but its header anew.
        packets = [packet for packet in (*_encode_video(video, spec), *_encode_audio(audio, spec)) if packet.size]
        # Packets without times are the last ones to be flushed.
        packets.sort(key=lambda packet: float(packet.dts * packet.time_base))
        for packet in packets:
            container.mux(packet)
    if spec.suffix == "avi" and spec.fault in ("late audio", "late video"):
        _write_avi_times(path, spec)


def _write_avi_times(path: Path, spec: ClipSpec) -> None:
    """Let a track of an AVI file begin late: its header states the number of its first frame or sample (`dwStart`)."""
    kind, number = {
        "late audio": (b"auds", _first_late_sample(1024)),
        "late video": (b"vids", round(LATE_SECONDS * spec.rate)),
    }[spec.fault]
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(kind) + 28, number)
    path.write_bytes(content)


def _first_late_sample(frame_size: int) -> int:
    return math.ceil(LATE_SECONDS * RATE_HZ / frame_size) * frame_size


def _copy_streams(source: Path, path: Path) -> None:
    """Put the streams of a file into another container, with what is said of them."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        copies = {stream.index: output.add_stream_from_template(stream) for stream in container.streams}
        for packet in container.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)


def _video_options(spec: ClipSpec) -> dict[str, str]:
    """Several keyframes, so that there is something to seek to; frames that are not shown in the order of decoding.

    AVI has times of decoding only, so there both orders are the same.
    """
    every = str(spec.frames_a_keyframe)
    if spec.suffix == "webm":
        return {"g": every, "crf": "6", "b": "2M"}
    b_frames = "2"
    if spec.suffix == "avi":
        b_frames = "0"
    return {"g": every, "bf": b_frames, "x264-params": "scenecut=0:repeat-headers=1:aud=1", "crf": "12"}


def _store(frame: NDArray[np.uint8], orientation: Orientation) -> NDArray[np.uint8]:
    """Turn an upright frame the other way, so that it is upright once it is shown as the file says."""
    if orientation == "rotated":
        frame = np.rot90(frame)
    elif orientation == "mirrored":
        frame = frame[:, ::-1]
    return np.ascontiguousarray(frame)


def _encode_video(stream: av.VideoStream, spec: ClipSpec) -> Iterator[av.Packet]:
    stream.codec_context.time_base = Fraction(1, spec.rate)
    states_itself = spec.orientation != "upright" and _CODECS[spec.suffix][2] == "codec"
    for number, seconds in enumerate([*spec.times_seconds, None]):
        frame = None
        if seconds is not None:
            frame = av.VideoFrame.from_ndarray(_store(draw_barcode(number), spec.orientation), format="rgb24")
            # In AVI the header says so.
            start_seconds = spec.start_seconds * (spec.suffix != "avi")
            frame.pts = round((seconds + start_seconds) * spec.rate)
            frame.time_base = Fraction(1, spec.rate)
        for packet in stream.encode(frame):
            if states_itself and packet.is_keyframe:
                packet = _add_message(packet, _MESSAGES[spec.orientation])
            yield packet


def _add_message(packet: av.Packet, message: bytes) -> av.Packet:
    """Put a message in front of the slice of a keyframe."""
    start_code = b"\0\0\1"
    content = bytes(packet).replace(start_code + b"\x65", start_code + message + start_code + b"\x65", 1)
    changed = av.Packet(content)
    changed.stream, changed.time_base = packet.stream, packet.time_base
    changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
    changed.is_keyframe = True
    return changed


def _encode_audio(stream: av.AudioStream, spec: ClipSpec) -> Iterator[av.Packet]:
    size = stream.codec_context.frame_size or 1024
    start = spec.start_seconds
    time = np.arange(round((SECONDS + start) * RATE_HZ) // size * size) / RATE_HZ
    is_beep = (time >= start + spec.beep_seconds) & (time < start + spec.beep_seconds + 0.2)
    samples = np.where(is_beep, 0.5 * np.sin(2 * np.pi * BEEP_HZ * time), 0.0).astype(np.float32)
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=RATE_HZ)
    for first in range(0, len(samples), size):
        seconds = first / RATE_HZ
        if spec.fault == "late audio" and seconds < LATE_SECONDS:
            continue
        if spec.fault == "gap" and LATE_SECONDS <= seconds < spec.gap_ends_seconds:
            continue
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis, first : first + size], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, first, Fraction(1, RATE_HZ)
        if spec.suffix == "avi" and spec.fault == "late audio":
            frame.pts = first - _first_late_sample(size)
        for converted in resampler.resample(frame):
            yield from stream.encode(converted)
    yield from stream.encode(None)


def _write_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write the display matrix of an MP4 file's first track (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
