"""Files of a conversation: what was read of them, and what the model gets of them, in words and as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from video_llama.inference.loaded_model import EncodedMedia
from video_llama.processor.frame_strip import frame_strip
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.prompt_parts import media_prefix

__all__ = ["Decoded", "Turn", "Upload"]

# Steps between frames that differ by less are called equal: a video's frames are shown at whole multiples of its rate.
_STEP_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Decoded:
    """A file that was read.

    Args:
        source: the file.
        frames: of a video or an image; None for an audio file.
        audio: segments of its audio; None if there are none.
        sound: one phrase about the audio: "heard", "no sound track", "not listened to", or why it cannot be decoded.
        segment_seconds: length of an audio segment.
    """

    source: str
    frames: VideoFrames | None
    audio: AudioSegments | None
    sound: str
    segment_seconds: float = field(default=2.0, kw_only=True)

    @property
    def summary(self) -> str:
        """Return how much of the file the model gets: "8 frames, one every 5.0 s; audio: 8 × 2 s of 40 s"."""
        if self.frames is None:
            return f"audio: {self._audio_share()}"
        if self.frames.kind == "image":
            return "an image"
        audio = self.sound
        if self.audio is not None:
            audio = self._audio_share()
        return f"{_frame_steps(self.frames.times_seconds)}; audio: {audio}"

    @property
    def has_all_audio(self) -> bool:
        """Whether the segments leave nothing out of the audio."""
        if self.audio is None:
            return False
        length, starts = self.audio.duration_seconds, self.audio.start_seconds
        return _covered_seconds(starts, self.segment_seconds, length) > length - _STEP_TOLERANCE

    def _audio_share(self) -> str:
        if self.audio is None:
            return self.sound
        if self.has_all_audio:
            return f"all of its {_length(self.audio.duration_seconds)}"
        segments = len(self.audio.start_seconds)
        return f"{segments} × {self.segment_seconds:g} s of {_length(self.audio.duration_seconds)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}: {self.summary})"

    def _repr_html_(self) -> str:
        """Return the strip of frames with their times, as notebooks show it."""
        strip = ""
        if self.frames is not None:
            strip = frame_strip(self.frames.frames, self.frames.times_seconds)
        return f"<div><b>{escape(self.source)}</b> {escape(self.summary)}{strip}</div>"


@dataclass(frozen=True, eq=False, repr=False)
class Upload(Decoded):
    """A file of a conversation, with its features in the order of the placeholders of `introduction`."""

    encoded: tuple[EncodedMedia, ...]

    @property
    def introduction(self) -> list[Any]:
        """Return the text and placeholders that introduce the file in a prompt."""
        frames = []
        if self.frames is not None:
            frames.append(self.frames)
        return media_prefix(frames, self.audio)


@dataclass
class Turn:
    """One question with the files uploaded before it, and its answer once there is one."""

    uploads: list[Upload] = field(default_factory=list)
    question: str | None = None
    answer: str | None = None


def _length(seconds: float) -> str:
    # FFmpeg's versions differ in whether they count the padding at the end of a track, a tenth of a second.
    if seconds < 3:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s"


def _frame_steps(times: list[float]) -> str:
    """Return how many frames there are, and how far apart."""
    if len(times) == 1:
        return f"1 frame, at {times[0]:.1f} s"
    steps = [after - before for before, after in pairwise(times)]
    mean = (times[-1] - times[0]) / len(steps)
    if max(steps) > 1.5 * mean + _STEP_TOLERANCE:
        return f"{len(times)} frames, from {times[0]:.1f} s to {times[-1]:.1f} s"
    return f"{len(times)} frames, one every {mean:.1f} s"


def _covered_seconds(starts: list[float], length: float, end: float) -> float:
    """Return how many seconds segments of one length cover up to `end`, where they overlap counted once."""
    covered, reached = 0.0, 0.0
    for start in sorted(starts):
        stop = min(start + length, end)
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered
