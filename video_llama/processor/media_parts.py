"""The processors of single modalities that transformers' programs expect in a processor, and in its folder.

Each is the settings that a `MediaProcessor` has for its modality, and reads media with a `MediaProcessor`: alone, it
gives what `VideoLlamaProcessor` gives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import BatchFeature, FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from video_llama.errors import ConfigError
from video_llama.processor.batch import BatchOptions, convert_batch, pad_media
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.request import MediaRequest, as_list, flat_list, split_keywords
from video_llama.utils.remote_code import auto_map, write_remote_code

__all__ = [
    "PARTS",
    "MediaPart",
    "PartSettings",
    "VideoLlamaFeatureExtractor",
    "VideoLlamaImageProcessor",
    "VideoLlamaVideoProcessor",
    "change_settings",
    "join_parts",
]

_OF_IMAGES = ("image_size", "mean", "std", "crop_scale")


class _MediaPart:
    """What the three have in common; before a class of transformers in the order of bases.

    Args:
        settings: fields of `MediaProcessor`, of those that the part has; by default as there.

    Raises:
        ConfigError: other settings, or values that make no sense.
    """

    fields: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[str]
    type_key: ClassVar[str]

    # The classes of transformers would set the attributes of their own ways of processing, of which none is used.
    def __init__(self, **settings: Any) -> None:
        own = {name: value for name, value in settings.items() if name in self.fields}
        unknown = settings.keys() - own.keys() - {"auto_map", "processor_class", self.type_key}
        if unknown:
            raise ConfigError(
                f"{type(self).__name__} has no {', '.join(sorted(unknown))}; it has {', '.join(self.fields)}"
            )
        self.media_processor = MediaProcessor(**own)

    @classmethod
    def of(cls, media: MediaProcessor) -> _MediaPart:
        """Return the part of a `MediaProcessor`; unlike a saved one, it downloads addresses where that does."""
        part = cls()
        part.media_processor = media
        return part

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the part, by the fields of `MediaProcessor`."""
        return {name: getattr(self.media_processor, name) for name in self.fields}

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved, in types of JSON."""
        saved = {name: value for name, value in self.media_processor.to_dict().items() if name in self.fields}
        return {**saved, self.type_key: type(self).__name__, "auto_map": auto_map(self.auto_class)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any], **kwargs: Any) -> Any:
        """Build the part from what `to_dict` returned; keywords that are settings replace those."""
        is_asked_for_unused = kwargs.pop("return_unused_kwargs", False)
        changed = {name: kwargs.pop(name) for name in cls.fields if name in kwargs}
        part = cls(**{**settings, **changed})
        return (part, kwargs) if is_asked_for_unused else part

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Write the settings, and the module in which `trust_remote_code=True` finds this class."""
        files = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        write_remote_code(Path(save_directory))
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Do nothing, as `VideoLlamaProcessor.register_for_auto_class`."""

    def _split(self, kwargs: dict[str, Any]) -> tuple[MediaRequest, BatchOptions]:
        """Return how this call reads media, and `return_tensors`."""
        options = BatchOptions(return_tensors=kwargs.pop("return_tensors", "pt"))
        [of_media] = split_keywords(kwargs, MediaRequest)
        return MediaRequest(self.media_processor, **of_media), options


class VideoLlamaImageProcessor(_MediaPart, BaseImageProcessor):
    """Images to the model's frames: `image_size`, `mean`, `std` and, for training, `crop_scale`."""

    fields = _OF_IMAGES
    auto_class = "AutoImageProcessor"
    type_key = "image_processor_type"
    model_input_names: ClassVar[list[str]] = ["pixel_values", "frame_mask"]

    @property
    def size(self) -> dict[str, int]:
        """Return height and width of what the model takes."""
        return {"height": self.media_processor.image_size, "width": self.media_processor.image_size}

    @property
    def image_mean(self) -> list[float]:
        """Return the mean of each channel, for values from 0 to 1."""
        return list(self.media_processor.mean)

    @property
    def image_std(self) -> list[float]:
        """Return the standard deviation of each channel, for values from 0 to 1."""
        return list(self.media_processor.std)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Return `pixel_values` (images, 1, 3, height, width), as `VideoLlamaProcessor.__call__` does.

        Raises:
            TypeError: a keyword that is neither a field of `MediaRequest` nor `return_tensors`.
            MediaError: an image cannot be read.
        """
        request, options = self._split(kwargs)
        frames = [request.read_frames(item, is_image=True) for item in flat_list(images)]
        return convert_batch(BatchFeature(pad_media(frames, [])), options)


class VideoLlamaVideoProcessor(_MediaPart, BaseVideoProcessor):
    """Videos to the model's frames: the settings of images, `num_frames`, `sampling` and `video_reader`."""

    fields = (*_OF_IMAGES, "num_frames", "sampling", "video_reader")
    auto_class = "AutoVideoProcessor"
    type_key = "video_processor_type"
    model_input_names: ClassVar[list[str]] = ["pixel_values", "frame_mask"]

    size = VideoLlamaImageProcessor.size
    image_mean = VideoLlamaImageProcessor.image_mean
    image_std = VideoLlamaImageProcessor.image_std

    @property
    def num_frames(self) -> int:
        """Return the number of frames sampled from a video, unless a call wants another one."""
        return self.media_processor.num_frames

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Return `pixel_values` (videos, frames, 3, height, width) and what goes with them.

        The same as `VideoLlamaProcessor.__call__`: `frame_mask`, `video_metadata`.

        Raises:
            TypeError, ConfigError: keywords as for `MediaRequest`.
            MediaError: a video cannot be read.
        """
        request, options = self._split(kwargs)
        frames = [request.read_frames(item, is_image=False) for item in as_list(videos)]
        request.check_used()
        batch = BatchFeature(pad_media(frames, []))
        if request.return_metadata:
            batch["video_metadata"] = [request.metadata_of(item) for item in frames]
        return convert_batch(batch, options)


class VideoLlamaFeatureExtractor(_MediaPart, FeatureExtractionMixin):
    """Audio to log-mel segments: `num_audio_segments`, `segment_spacing` and `log_mel`."""

    fields = ("num_audio_segments", "segment_spacing", "log_mel")
    auto_class = "AutoFeatureExtractor"
    type_key = "feature_extractor_type"
    model_input_names: ClassVar[list[str]] = ["audio_values", "segment_mask"]

    @property
    def sampling_rate(self) -> int:
        """Return the rate in hertz to which all audio is resampled."""
        return self.media_processor.log_mel.sample_rate_hz

    @property
    def feature_size(self) -> int:
        """Return the number of mel bins."""
        return self.media_processor.log_mel.num_mel_bins

    def __call__(self, audio: Any, **kwargs: Any) -> BatchFeature:
        """Return `audio_values` (audios, segments, 1, bins, frames) as `VideoLlamaProcessor.__call__` does.

        Raises:
            TypeError: a keyword that is neither a field of `MediaRequest` nor `return_tensors`.
            MediaError: audio cannot be read.
        """
        request, options = self._split(kwargs)
        segments = [request.read_audio(item) for item in as_list(audio)]
        return convert_batch(BatchFeature(pad_media([], segments)), options)

    def fetch_audio(self, audio: Any) -> Any:
        """Return audio as it is: pipelines call this first, and files are read later, with their rates."""
        return audio


# A part, or what its `to_dict` returned.
PartSettings = _MediaPart | Mapping[str, Any]

PARTS: dict[str, type[_MediaPart]] = {
    "image_processor": VideoLlamaImageProcessor,
    "video_processor": VideoLlamaVideoProcessor,
    "feature_extractor": VideoLlamaFeatureExtractor,
}


def join_parts(media: MediaProcessor, parts: Mapping[str, PartSettings | None]) -> MediaProcessor:
    """Return a `MediaProcessor` with the settings of parts, or of what `to_dict` returned of them.

    Args:
        media: has the settings of parts that are not given.
        parts: by the names of `PARTS`.

    Raises:
        ConfigError: settings that make no sense, or differ for images and frames, which the model takes alike.
        TypeError: something else than a part.
    """
    joined: dict[str, Any] = {}
    for name, given in parts.items():
        if given is None:
            continue
        for key, value in _as_part(name, given).settings.items():
            if joined.setdefault(key, value) != value:
                raise ConfigError(f"images and videos have one {key}, not {joined[key]} and {value}")
    return replace(media, **joined)


def change_settings(media: MediaProcessor, keywords: Mapping[str, Any]) -> MediaProcessor:
    """Return a `MediaProcessor` changed by keywords that are settings of a part; others count for nothing here."""
    names = [name for part in PARTS.values() for name in part.fields if name in keywords]
    return replace(media, **{name: keywords[name] for name in names})


def _as_part(name: str, given: PartSettings) -> _MediaPart:
    if isinstance(given, Mapping):
        return PARTS[name](**given)
    if not isinstance(given, PARTS[name]):
        raise TypeError(f"{name} must be a {PARTS[name].__name__}, not {given!r}")
    return given


class MediaPart:
    """An attribute of a processor: one of `PARTS`, by its name, always with the settings of its `media_processor`.

    Another part can be assigned, and changes that.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, processor: Any, owner: type) -> Any:
        return self if processor is None else PARTS[self.name].of(processor.media_processor)

    def __set__(self, processor: Any, part: _MediaPart) -> None:
        processor.media_processor = join_parts(processor.media_processor, {self.name: part})
