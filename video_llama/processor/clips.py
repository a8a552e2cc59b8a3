"""Read what is to be captioned, whole or window by window: decode it, then make of it what the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from video_llama.errors import MediaError, VideoLlamaError
from video_llama.media.decode import ClipDecoder, DecodedClip, why_no_audio
from video_llama.media.pixels import is_array
from video_llama.media.reasons import describe_error
from video_llama.media.sources import describe_source, is_file
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.tensor_like import as_frames

__all__ = ["ClipReader", "ClipSource", "Window"]

ClipSource = Any
"""What stands for a file (`open_source`), frames (`FramesInMemory`), an image (`image_of_array`, or of PIL), samples
with their rate (`samples_of`), a floating point tensor as the model takes it, `VideoFrames`, `AudioSegments`, or a pair
of frames and audio."""


@dataclass(frozen=True, eq=False)
class Window:
    """A clip, or one part of a long one, as the model takes it.

    Args:
        frames: frames of a video or an image; None for audio alone.
        audio: segments of the audio, or None.
        sound: one phrase for people: "heard", "no sound track", "not listened to", or why it cannot be decoded.
        start_seconds, end_seconds: which part of the file this is; None for a whole one.
    """

    frames: VideoFrames | torch.Tensor | None
    audio: AudioSegments | torch.Tensor | None
    sound: str
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class ClipReader:
    """Read clips as one model takes them.

    Args:
        media: how files are read; frames are sampled at equal steps, and images are kept whole.
        audio: use the audio of videos, and accept audio files.
        num_frames: instead of the setting of `media`.
        window_seconds: cut videos into windows of this length; the frames' times begin at 0 in each, as if it had
            been cut out.

    Raises:
        ValueError: `window_seconds` is not above 0.
    """

    media: MediaProcessor
    audio: bool = True
    num_frames: int | None = None
    window_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.window_seconds is not None and self.window_seconds <= 0:
            raise ValueError(f"windows must be longer than {self.window_seconds} seconds")

    @property
    def decoder(self) -> ClipDecoder:
        """Return the part that works without torch, for a process that only decodes."""
        return self._whole_media.decoder(self.audio, self.num_frames, self.window_seconds)

    @cached_property
    def _whole_media(self) -> MediaProcessor:
        """Return the processor for captions: frames at equal steps and whole, however it reads them for training."""
        return replace(self.media, sampling="uniform", crop_scale=None)

    def __call__(self, source: ClipSource, first: int = 0) -> tuple[int, list[Window | VideoLlamaError]]:
        """Read a clip; of a long one some windows.

        Args:
            source: what to read.
            first: number of the first window to read.

        Returns:
            how many windows the clip has, and those that were read; one that cannot be read is its error.
        """
        if is_file(source):
            total, decoded = self.decoder(source, first)
            return total, [self.finish(window, source) for window in decoded]
        try:
            return 1, [self._read_memory(source)]
        except VideoLlamaError as error:
            return 1, [error]
        except (OSError, MemoryError) as error:
            return 1, [MediaError(describe_source(source), f"cannot be read: {describe_error(error)}")]

    def finish(self, decoded: DecodedClip | VideoLlamaError, source: ClipSource) -> Window | VideoLlamaError:
        """Return what the model takes of a decoded clip or window, or the error of one that cannot be used.

        Args:
            decoded: from `decoder`.
            source: what it was decoded from, for the error.
        """
        if isinstance(decoded, VideoLlamaError):
            return decoded
        # Audio that fails costs a video only its audio. A clip that is audio alone fails with it.
        audio, phrase = None, "not listened to"
        if decoded.kind == "image":
            phrase = "an image has no sound"
        failure: MediaError | None = None
        if isinstance(decoded.audio, MediaError):
            failure = decoded.audio
        elif decoded.audio is not None:
            try:
                audio, phrase = self.media.finish_segments(decoded.audio), "heard"
            except MediaError as error:
                failure = error
        if failure is not None:
            if decoded.frames is None:
                return MediaError(describe_source(source), failure.reason, failure.hint)
            phrase = why_no_audio(failure)
        frames = None
        if decoded.frames is not None:
            frames = self._whole_media.finish_frames(decoded, as_bytes=True)
        return Window(frames, audio, phrase, decoded.start_seconds, decoded.end_seconds)

    def _read_memory(self, source: ClipSource) -> Window:
        seen, heard = source, None
        if _is_sound(source):
            seen, heard = None, source
        elif isinstance(source, tuple) and len(source) == 2:
            seen, heard = source
        if isinstance(seen, torch.Tensor) and seen.is_floating_point():
            seen = as_frames(seen)
        elif isinstance(seen, (list, tuple)) or (is_array(seen) and seen.ndim > 3 and not _is_read(seen)):
            seen = self._whole_media.finish_frames(self.decoder.video(seen), as_bytes=True)
        elif seen is not None and not _is_read(seen):
            seen = self.media.process_image(seen)
        if heard is not None and not _is_read(heard):
            heard = self.media.process_audio(heard)
        # Without audio a pair still has its frames, but audio alone leaves nothing to caption.
        if heard is not None and not self.audio:
            heard = None
            if seen is None:
                raise MediaError("sound", "sound only, no video", "the model does not listen")
        return Window(seen, heard, "no sound" if heard is None else "heard")


def _is_read(item: Any) -> bool:
    """Whether this is as the model takes it: floating point tensors are normalised frames, or log-mel."""
    if isinstance(item, torch.Tensor):
        return item.is_floating_point()
    return isinstance(item, (VideoFrames, AudioSegments))


def _is_sound(source: ClipSource) -> bool:
    """Whether this is audio alone: a tensor with one channel is log-mel, a number beside an array is a rate."""
    if isinstance(source, (AudioSegments, Mapping)):
        return True
    if isinstance(source, torch.Tensor):
        return source.is_floating_point() and source.shape[-3:-2] == (1,)
    return isinstance(source, tuple) and any(isinstance(item, (int, float, np.number)) for item in source)
