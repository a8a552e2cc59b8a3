"""What one request may change in how its media are read, by the names that transformers' processors use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor
from transformers.video_utils import VideoMetadata

from video_llama.errors import ConfigError
from video_llama.media.pixels import FramesInMemory
from video_llama.media.sources import is_file
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.tensor_like import as_segments
from video_llama.prompt_parts import Placeholder, PromptPart

__all__ = ["MediaRequest", "as_list", "flat_list", "split_keywords"]

# More frames than any video has: the samplers take all that there are.
_ALL_FRAMES = 2**31


@dataclass
class MediaRequest:
    """Reads media as one request wants them; stands for the processor's `MediaProcessor`.

    Args:
        media: the settings of the processor.
        num_frames: frames of each video, instead of the setting.
        fps: frames per second of each video, instead of a number.
        do_sample_frames: False takes all frames.
        video_metadata: of videos in memory, one for each video in order: `fps`, and `frames_indices` where the frames
            were sampled before. The text can then say when they were shown, and `fps` can be asked for.
        sampling_rate: in hertz, of audio arrays that are given without theirs.
        allow_urls: download media that are http or https addresses.
        return_metadata: return `video_metadata` of all videos beside the model's inputs.

    Raises:
        ConfigError: settings that contradict each other, or metadata for fewer or more videos than there are.
        MediaError: a file cannot be read.
    """

    media: MediaProcessor
    num_frames: int | None = None
    fps: float | None = None
    do_sample_frames: bool | None = None
    video_metadata: Any = None
    sampling_rate: int | None = None
    allow_urls: bool = False
    return_metadata: bool = False
    _given: list[Mapping[str, Any]] | None = field(init=False, default=None)
    _known: dict[int, tuple[VideoFrames, VideoMetadata]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ConfigError("give num_frames or fps, not both")
        if self.do_sample_frames is False and (self.num_frames is not None or self.fps is not None):
            raise ConfigError("do_sample_frames=False takes all frames: leave out num_frames and fps")
        if self.fps is not None and self.fps <= 0:
            raise ConfigError(f"fps must be above 0, not {self.fps}")
        if self.allow_urls:
            self.media = replace(self.media, allow_urls=True)
        if self.video_metadata is not None:
            self._given = list(_flat([self.video_metadata]))

    def process_video(self, source: Any, /, *, audio: bool = True) -> tuple[VideoFrames, AudioSegments | None]:
        """Sample a video's frames and its audio, as `MediaProcessor.process_video` does."""
        count = self.num_frames
        if self.do_sample_frames is False:
            count = _ALL_FRAMES
        if self.fps is None and self._given is None and not self.return_metadata:
            return self.media.process_video(source, num_frames=count, audio=audio)
        total, rate, indices = self._describe(source)
        if self.fps is not None:
            if not rate:
                raise ConfigError("fps needs the frame rate of frames in memory: give video_metadata=[{'fps': …}]")
            count = max(1, round(total / rate * self.fps))
        frames, segments = self.media.process_video(source, num_frames=count, audio=audio)
        if not frames.times_seconds and rate:
            taken = [indices[place] for place in frames.indices] if indices else frames.indices
            frames = replace(frames, indices=taken, times_seconds=[place / rate for place in taken])
        metadata = VideoMetadata(total_num_frames=total, fps=rate, frames_indices=list(frames.indices))
        self._known[id(frames)] = (frames, metadata)
        return frames, segments

    def process_image(self, image: Any, /) -> VideoFrames:
        """Read a still image, as `MediaProcessor.process_image` does."""
        return self.media.process_image(image)

    def process_audio(self, audio: Any, /) -> AudioSegments:
        """Read audio, as `MediaProcessor.process_audio` does."""
        if self.sampling_rate is not None and not isinstance(audio, (tuple, Mapping)) and not is_file(audio):
            audio = (audio, self.sampling_rate)
        return self.media.process_audio(audio)

    def read_frames(self, item: Any, is_image: bool) -> VideoFrames | Tensor:
        """Return frames as the model takes them; other tensors are pixels of uint8."""
        if isinstance(item, VideoFrames) or (isinstance(item, Tensor) and item.is_floating_point()):
            return item
        if is_image:
            return self.process_image(item)
        return self.process_video(item, audio=False)[0]

    def read_audio(self, item: Any) -> Tensor:
        """Return log-mel segments as the model takes them."""
        if isinstance(item, Tensor) and self.sampling_rate is None:
            return as_segments(item)
        if not isinstance(item, AudioSegments):
            item = self.process_audio(item)
        return self.media.adapt_audio(item).values

    def metadata_of(self, item: VideoFrames | Tensor) -> VideoMetadata:
        """Return how many frames a video had, how many a second, and which of them were taken, as far as is known."""
        if id(item) in self._known:
            return self._known[id(item)][1]
        indices = list(getattr(item, "indices", ())) or None
        return VideoMetadata(total_num_frames=len(item), frames_indices=indices)

    def check_used(self) -> None:
        """Check that every video has had its metadata, where any was given."""
        if self._given:
            raise ConfigError(f"video_metadata has {len(self._given)} more entries than there are videos to read")

    def _describe(self, source: Any) -> tuple[int, float | None, list[int] | None]:
        """Return how many frames a video has, how many a second, and where frames in memory were in it."""
        given: Mapping[str, Any] = {}
        if self._given is not None:
            if not self._given:
                raise ConfigError("video_metadata has fewer entries than there are videos to read")
            given = self._given.pop(0)
        if is_file(source):
            if given:
                raise ConfigError("video_metadata is for videos in memory: a file has its own frame rate")
            total, rate = self.media.decoder(False).length(source)
            return total, rate, None
        indices = given.get("frames_indices")
        total = len(FramesInMemory(source))
        if indices is not None and len(indices) != total:
            raise ConfigError(f"video_metadata has {len(indices)} frames_indices for a video of {total} frames")
        return total, given.get("fps"), None if indices is None else [int(index) for index in indices]


def _flat(items: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return metadata of lists in lists, one for each conversation, in order."""
    flat: list[Mapping[str, Any]] = []
    for item in items:
        if isinstance(item, (list, tuple)):
            flat += _flat(item)
        else:
            flat.append(item or {})
    return flat


def split_keywords(kwargs: dict[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """Return the keywords of a call by the dataclasses whose fields they are.

    Raises:
        TypeError: a keyword that is no such field.
    """
    kwargs = dict(kwargs)
    known: list[dict[str, Any]] = []
    for kind in kinds:
        names = {each.name for each in fields(kind) if each.init} - {"media"}
        known.append({name: kwargs.pop(name) for name in names if name in kwargs})
    if kwargs:
        raise TypeError(
            f"unknown keyword(s) of the processor: {', '.join(sorted(kwargs))}. Known are the fields of "
            f"{' and '.join(kind.__name__ for kind in kinds)}; batches with labels are made by VideoLlamaDataCollator"
        )
    return known


def as_list(items: Any) -> list[Any]:
    """Return what a caller gave for one item or a list of them as a list."""
    if items is None:
        return []
    return list(items) if isinstance(items, list) else [items]


def videos_of_prompts(videos: Any, prompts: Sequence[Sequence[PromptPart]]) -> list[Any]:
    """Return videos as one list, also of lists of videos for each prompt; a list of frames is one video."""
    videos = as_list(videos)
    counts = [sum(part == Placeholder("image") for part in prompt) for prompt in prompts]
    nested = [item for item in videos if isinstance(item, (list, tuple))]
    # The frames of a video are not as many as the videos of a prompt, or are no videos themselves.
    is_nested = [len(item) for item in nested] == counts and len(nested) == len(videos)
    if is_nested and all(map(_is_video, (video for item in nested for video in item))):
        return [video for item in nested for video in item]
    return videos


def _is_video(item: Any) -> bool:
    """Whether this can be a video by itself, not an image."""
    return is_file(item) or isinstance(item, (list, tuple, VideoFrames)) or getattr(item, "ndim", 0) > 3


def flat_list(images: Any) -> list[Any]:
    """Return images as one list, also of lists of images for each prompt."""
    flat: list[Any] = []
    for item in as_list(images):
        flat += as_list(item)
    return flat
