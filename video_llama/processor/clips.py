"""Read what is to be captioned, whole or window by window: decode it, then make of it what the model takes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from video_llama.errors import MediaError, VideoLlamaError
from video_llama.media.decode import ClipDecoder, DecodedClip, OpensAsFile, describe_source, why_no_audio
from video_llama.media.image import resize_image
from video_llama.media.sampling import sample_uniform_indices
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.tensor_like import as_frames

__all__ = ["ClipReader", "ClipSource", "Window", "is_file"]

ClipSource = Any
"""A file (video, image or audio), an `OpensAsFile`, frames (frames, height, width, 3) of uint8, an image
(height, width, 3) or of PIL, a tensor as the model takes it, `VideoFrames`, `AudioSegments`, or a pair of frames
and audio."""


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


def is_file(source: ClipSource) -> bool:
    """Whether a clip is to be decoded; the others are in memory."""
    # Has a method `open`, too.
    if isinstance(source, Image.Image):
        return False
    return isinstance(source, (str, os.PathLike, OpensAsFile))


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
            return 1, [MediaError(describe_source(source), f"cannot be read: {str(error) or type(error).__name__}")]

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
        seen, heard = source if isinstance(source, tuple) else (source, None)
        # Audio may be given alone, without a pair: a tensor with one channel is log-mel, with three it is frames.
        if isinstance(seen, AudioSegments) or (isinstance(seen, torch.Tensor) and seen.shape[-3:-2] == (1,)):
            seen, heard = None, seen
        if isinstance(seen, np.ndarray) and seen.ndim == 4:
            seen = self._process_frames(seen)
        elif isinstance(seen, torch.Tensor):
            seen = as_frames(seen)
        elif isinstance(seen, (np.ndarray, Image.Image)):
            seen = self.media.process_image(seen)
        if isinstance(heard, tuple):
            heard = self.media.process_audio(heard)
        # Without audio a pair still has its frames, but audio alone leaves nothing to caption.
        if heard is not None and not self.audio:
            heard = None
            if seen is None:
                raise MediaError("sound", "sound only, no video", "the model does not listen")
        return Window(seen, heard, "no sound" if heard is None else "heard")

    def _process_frames(self, frames: NDArray[np.uint8]) -> VideoFrames:
        """Sample frames (frames, height, width, 3) in memory at equal steps and resize them, without times."""
        if frames.dtype != np.uint8 or frames.shape[-1] != 3 or not frames.size:
            reason = f"no video has shape {frames.shape} and type {frames.dtype}"
            raise MediaError("array", reason, "give (frames, height, width, 3) of uint8")
        num_frames = self.media.num_frames if self.num_frames is None else self.num_frames
        indices = sample_uniform_indices(len(frames), num_frames)
        resized = np.stack([resize_image(Image.fromarray(frames[index]), self.media.image_size) for index in indices])
        clip = DecodedClip("array", resized, "video", [], indices, None)
        return self._whole_media.finish_frames(clip, as_bytes=True)
