"""Open the audio track of a file, on the clock of its frames, and decode it with the times that the file states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from av import AudioResampler, FFmpegError
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.containers import demux_packets, open_container, select_stream, translate_errors
from video_llama.media.frame_index import clock_jumps, first_frame_seconds
from video_llama.media.samples import PLAUSIBLE_RATES_HZ
from video_llama.media.sampling import CLOCK_TOLERANCE_SECONDS

__all__ = ["AudioTrack", "OpenedFile", "Path", "Samples", "decode_timed_frames", "open_audio_track"]

Path = str | os.PathLike[str]
Samples = NDArray[np.float32]
"""(channels, samples), full scale from -1 to 1."""

# In any time base.
_BEFORE_ALL = -(2**40)
# Seeking to the start of these gives the very packets that opening them does, encoder delay included.
_REWINDABLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2"}
# FFmpeg keeps what it reads while it looks for the first packets of a track.
_MUCH_TO_PROBE = 200_000_000
# Chunks of such audio are numbered: a step of more than one is a gap.
_FORMATS_OF_NUMBERED_CHUNKS = {"avi"}


@runtime_checkable
class OpenedFile(Protocol):
    """An open file; its first frame, if it has any, is shown at `start_seconds` of the container's clock.

    That clock jumps back where recordings were put together: then no time says where to seek to.
    """

    container: InputContainer
    start_seconds: float | None
    clock_jumps: bool


@dataclass(eq=False)
class AudioTrack:
    """An open audio track; an `OpenedFile`.

    Attributes:
        path: the file.
        container, stream: the file, opened, and its track.
        start_seconds: when the first frame is shown, on the container's clock; None without video.
        clock_jumps: whether that clock jumps back, or FFmpeg tells wrong times of it behind a seek.
        begin_seconds: when the track begins, on it.
        zero_seconds: what that clock shows at t = 0: `start_seconds`, or `begin_seconds` where there is no video or it
            begins at the same time, give or take `CLOCK_TOLERANCE_SECONDS`.
        end_seconds: where the track ends, or else its file, as stated there, from t = 0 on; 0 if nothing is stated.
    """

    path: Path
    container: InputContainer
    stream: AudioStream
    start_seconds: float | None
    clock_jumps: bool
    begin_seconds: float
    zero_seconds: float
    end_seconds: float


@contextmanager
def open_audio_track(path: Path, opened: OpenedFile | None = None) -> Iterator[AudioTrack]:
    """Open the audio track that a player would choose; the container stands at the track's first packet.

    Args:
        path: the file.
        opened: the same file, if it is open already: it is used where going back to its start is exact.

    Raises:
        NoAudioTrackError: there is none.
        MediaError: the file cannot be read, or the track's header is damaged.
    """
    jumps: bool | None
    with ExitStack() as files:
        if opened is None:
            container = files.enter_context(_open_with_audio(path))
            stream = cast(AudioStream, select_stream(container, path, "audio"))
            start = first_frame_seconds(path, container)
            jumps = clock_jumps(path, container, stream)
        else:
            container, start, jumps = opened.container, opened.start_seconds, opened.clock_jumps
            stream = cast(AudioStream, container.streams.best("audio"))
        # What is there already has moved on. A file in fragments does not count its frames in the header.
        if container.format.name in _REWINDABLE_FORMATS and stream is not None and stream.frames:
            with translate_errors(path, "the sound track is damaged"):
                container.seek(_BEFORE_ALL, stream=stream)
        elif opened is not None or start is not None or jumps is not None:
            container = files.enter_context(_open_with_audio(path))
            stream = cast(AudioStream, select_stream(container, path, "audio"))
        if stream.rate not in PLAUSIBLE_RATES_HZ:
            raise MediaError(path, f"a sound track of {stream.rate} samples per second: damaged")
        tick = float(stream.time_base or 0)
        begin = zero = (stream.start_time or 0) * tick
        if start is not None and abs(begin - start) >= CLOCK_TOLERANCE_SECONDS:
            zero = start
        end = zero
        if stream.duration is not None:
            end = begin + stream.duration * tick
        elif container.duration is not None:
            end = ((container.start_time or 0) + container.duration) / 1_000_000
        jumps = jumps or _has_empty_chunks(container, stream)
        yield AudioTrack(path, container, stream, start, bool(jumps), begin, zero, end - zero)


def _has_empty_chunks(container: InputContainer, stream: AudioStream) -> bool:
    """Return whether an AVI file leaves a gap in its audio, by chunks without content. FFmpeg's index passes over them
    and its demuxer counts them, so behind a seek it may count them twice. (PyAV before 17 does not tell.)"""
    if container.format.name not in _FORMATS_OF_NUMBERED_CHUNKS:
        return False
    entries: Any = getattr(stream, "index_entries", ())
    steps = np.diff([entry.timestamp for entry in entries])
    # Where the samples of a chunk are counted, not the chunks, each step is the size of one.
    return bool(len(steps)) and int(steps.min()) == 1 < int(steps.max())


@contextmanager
def _open_with_audio(path: Path) -> Iterator[InputContainer]:
    """Open a file, and read on in it until it is known what an audio track is like that begins late."""
    with open_container(path) as container:
        is_unknown = any(stream.codec_context is not None and not stream.rate for stream in container.streams.audio)
        if container.streams.best("audio") is not None or not is_unknown:
            yield container
            return
    with open_container(path, _MUCH_TO_PROBE) as container:
        yield container


def decode_timed_frames(track: AudioTrack, is_after_seek: bool = False) -> Iterator[tuple[float | None, Samples]]:
    """Decode a track from the current position on, in the rate and with the channels of its start.

    Args:
        track: the track.
        is_after_seek: the position may be within a packet, of which the decoder makes nothing.

    Yields:
        when the frame is played, in seconds of the container's clock, or None if the file does not say; and its
        samples, (channels, samples), float32.
    """
    # PyAV's stream follows the changes that a broadcast may have midway; what is yielded does not.
    stream = track.stream
    rate_hz, layout = stream.rate, None
    converter, converts_from = None, None
    failure: FFmpegError | None = None
    for packet in demux_packets(track.container, stream, track.path):
        with translate_errors(track.path, "the sound track is damaged"):
            try:
                frames = packet.decode()
            except FFmpegError as error:
                if not is_after_seek or converter is not None:
                    raise
                failure = error
                continue
            for frame in frames:
                assert isinstance(frame, AudioFrame)
                layout = layout or stream.layout
                frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
                if converter is None or frame_format != converts_from:
                    # "flt" interleaves the channels: PyAV crashes on planes from the eighth channel on.
                    converter = AudioResampler(format="flt", layout=layout, rate=rate_hz)
                    converts_from = frame_format
                for converted in converter.resample(frame):
                    interleaved = converted.to_ndarray()  # (1, samples * channels)
                    yield frame.time, interleaved.reshape(-1, layout.nb_channels).T
    if failure is not None and converter is None:
        with translate_errors(track.path, "the sound track is damaged"):
            raise failure
