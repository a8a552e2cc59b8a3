"""From media files to the tensors that the model takes.

A `MediaProcessor` is settings and nothing else: it can be shared, pickled into data loader workers and saved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from html import escape
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from video_llama.constants import DEFAULT_IMAGE_SIZE, DEFAULT_NUM_FRAMES, IMAGE_MEAN, IMAGE_STD
from video_llama.errors import ConfigError, MediaError, NoAudioTrackError
from video_llama.media.audio import RawAudio, RawSegments, read_segments
from video_llama.media.decode import DEFAULT_VIDEO_READER, ClipDecoder, DecodedClip, SampleFrames
from video_llama.media.image import ImageInput, read_image, resize_image
from video_llama.media.samples import samples_of
from video_llama.media.sampling import (
    LogMelSettings,
    SegmentSettings,
    SegmentSpacing,
    frame_times_message,
    sample_headtail_indices,
    sample_uniform_indices,
    segment_ranges,
)
from video_llama.media.sources import is_file, open_source
from video_llama.processor.audio_features import finish_audio, log_mel_segments, to_mono
from video_llama.processor.audio_origin import AudioOrigin, decoded_for
from video_llama.processor.frame_strip import frame_strip
from video_llama.processor.tensor_like import TensorLike
from video_llama.processor.transforms import normalize_pixels, random_crop_frames, random_crop_image, random_source

__all__ = ["AudioInput", "AudioSegments", "MediaProcessor", "VideoFrames"]

logger = logging.getLogger(__name__)

# What stands for a file (`open_source`), or samples with their rate (`samples_of`).
AudioInput = Any


@dataclass(frozen=True, eq=False, repr=False)
class VideoFrames(TensorLike):
    """Frames of one video, or one still image; in scripts it can stand where `pixel_values` would.

    Attributes:
        pixel_values: (frames, 3, height, width), float32 unless moved to another type, normalised.
        kind: whether it was a video or a still image.
        times_seconds: when each frame is shown; empty for an image.
        indices: which frames of the file these are; empty for an image.
        source: the file, or "image" for one that was in memory.
        frames: (frames, height, width, 3), uint8, RGB: what the model sees, for people.
        mean, std: what the values were normalised with.
    """

    pixel_values: torch.Tensor
    kind: Literal["video", "image"]
    times_seconds: list[float]
    indices: list[int]
    source: str
    frames: NDArray[np.uint8]
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD

    @property
    def message(self) -> str:
        """Return the sentence that says when the frames were taken; "" for an image."""
        return frame_times_message(self.times_seconds)

    @property
    def tensor(self) -> torch.Tensor:
        return self.pixel_values

    def with_tensor(self, tensor: torch.Tensor) -> VideoFrames:
        return replace(self, pixel_values=tensor)

    def take(self, places: Sequence[int]) -> VideoFrames:
        """Return some of the frames, with their times."""
        times = [self.times_seconds[place] for place in places] if self.times_seconds else []
        indices = [self.indices[place] for place in places] if self.indices else []
        taken = self.pixel_values[places], self.kind, times, indices, self.source, self.frames[places]
        return VideoFrames(*taken, self.mean, self.std)

    def __repr__(self) -> str:
        times = f" from {self.times_seconds[0]:.1f} to {self.times_seconds[-1]:.1f} s" if self.times_seconds else ""
        what = f"{self.kind} {self.source!r}: {len(self)} of {self.shape[-2]}x{self.shape[-1]}{times}"
        return f"VideoFrames({what}, {self.dtype} on {self.device})"

    def _repr_html_(self) -> str:
        """Return the strip of frames with their times, as notebooks show it."""
        return f"<div><b>{escape(self.source)}</b>{frame_strip(self.frames, self.times_seconds)}</div>"


@dataclass(frozen=True, eq=False, repr=False)
class AudioSegments(TensorLike):
    """Audio of one file as segments of equal length; in scripts it can stand where `values` would.

    Attributes:
        values: (segments, 1, mel_bins, mel_frames), float32 unless moved to another type, normalised log-mel.
        start_seconds: where each segment begins.
        duration_seconds: length of the whole sound.
        source: the file, or "sound" for one that was in memory.
        origin: what they were made of, for `MediaProcessor.adapt_audio`. `dataclasses.replace` leaves it out, so that
            values that were changed are never made anew without the change.
    """

    values: torch.Tensor
    start_seconds: list[float]
    duration_seconds: float
    source: str
    origin: AudioOrigin | None = field(default=None, init=False)

    @property
    def tensor(self) -> torch.Tensor:
        return self.values

    def with_tensor(self, tensor: torch.Tensor) -> AudioSegments:
        return replace(self, values=tensor)._made_of(self.origin)

    def take(self, places: Sequence[int]) -> AudioSegments:
        """Return some of the segments, with their times."""
        origin = self.origin
        if origin is not None:
            kept = places if origin.places is None else [origin.places[place] for place in places]
            origin = replace(origin, places=kept)
        starts = [self.start_seconds[place] for place in places]
        return replace(self, values=self.values[places], start_seconds=starts)._made_of(origin)

    def _made_of(self, origin: AudioOrigin | None) -> AudioSegments:
        object.__setattr__(self, "origin", origin)
        return self

    def __repr__(self) -> str:
        bins, frames = self.shape[-2:]
        what = f"{self.source!r}: {len(self)} of {bins}x{frames} log-mel over {self.duration_seconds:.1f} s"
        return f"AudioSegments({what}, {self.dtype} on {self.device})"


@dataclass(frozen=True)
class MediaProcessor:
    """Read videos, images and audio as one model takes them.

    Attributes:
        image_size: height and width of frames and images.
        num_frames: frames to sample from a video.
        mean, std: per channel, for RGB values from 0 to 1.
        sampling: frames at equal steps, or at random from each half of the video (for training).
        crop_scale: for training, the smallest and largest share of an image to keep at random; images are
            then also mirrored at random. None keeps images whole.
        num_audio_segments: segments to take from audio.
        segment_spacing: whether the segments reach to the end of the sound ("main") or stop short of it as
            with pytorchvideo 0.1.5 ("pv015").
        log_mel: what becomes of a segment.
        video_reader: name in the registry `VIDEO_READERS`.
        allow_urls: download inputs that are http or https addresses; never saved with a model, nor read from one.

    Raises:
        ConfigError: a setting that makes no sense.
    """

    image_size: int = DEFAULT_IMAGE_SIZE
    num_frames: int = DEFAULT_NUM_FRAMES
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    sampling: Literal["uniform", "headtail"] = "uniform"
    crop_scale: tuple[float, float] | None = None
    num_audio_segments: int = 8
    segment_spacing: SegmentSpacing = "main"
    log_mel: LogMelSettings = field(default_factory=LogMelSettings)
    video_reader: str = DEFAULT_VIDEO_READER
    allow_urls: bool = False

    def __post_init__(self) -> None:
        # Configs and JSON hold lists and mappings.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if self.crop_scale is not None:
            object.__setattr__(self, "crop_scale", tuple(float(value) for value in self.crop_scale))
        if isinstance(self.log_mel, Mapping):
            try:
                object.__setattr__(self, "log_mel", LogMelSettings(**self.log_mel))
            except TypeError as error:
                raise ConfigError(f"log_mel: {error}") from error
        self._check()

    def _check(self) -> None:
        for name in ("image_size", "num_frames", "num_audio_segments"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean and std need three values, std above 0: not {self.mean} and {self.std}")
        if self.sampling not in ("uniform", "headtail"):
            raise ConfigError(f"sampling must be 'uniform' or 'headtail', not {self.sampling!r}")
        if self.segment_spacing not in ("main", "pv015"):
            raise ConfigError(f"segment_spacing must be 'main' or 'pv015', not {self.segment_spacing!r}")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"the scale of crops must rise within 0 to 1, not {self.crop_scale}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that results depend on, in types of JSON."""
        values = {name: value for name, value in asdict(self).items() if name != "allow_urls"}
        if self.log_mel.extractor is None:
            del values["log_mel"]["extractor"]
        return values

    def process_video(
        self, path: Any, *, num_frames: int | None = None, audio: bool = True
    ) -> tuple[VideoFrames, AudioSegments | None]:
        """Sample a video's frames and its audio.

        Args:
            path: what stands for a file (`open_source`), or frames in memory (`FramesInMemory`), without times.
            num_frames: instead of the processor's setting. A shorter video gives as many frames as it has.
            audio: False leaves the sound unread.

        Returns:
            the frames, and the sound or None if the file has no sound track (or `audio` is False).

        Raises:
            MediaError: the video or its sound track cannot be decoded.
        """
        clip = self.decoder(audio, num_frames).video(path)
        segments = clip.audio
        if isinstance(segments, NoAudioTrackError):
            logger.info("%s", segments)
            segments = None
        if isinstance(segments, MediaError):
            raise MediaError(segments.path, segments.reason, "audio=False ignores the sound") from segments
        frames = self.finish_frames(clip)
        if segments is None:
            return frames, None
        return frames, self.finish_segments(segments)

    def decoder(self, audio: bool, num_frames: int | None = None, window_seconds: float | None = None) -> ClipDecoder:
        """Return the first half of reading a clip, which works without torch and in any process.

        Args:
            audio: read the audio of videos, and accept audio files.
            num_frames: instead of the processor's setting.
            window_seconds: cut videos into windows of this length.
        """
        sample: SampleFrames = sample_uniform_indices
        if self.sampling == "headtail":
            sample = partial(sample_headtail_indices, rng=random_source())
        if num_frames is None:
            num_frames = self.num_frames
        size, reader, segments = self.image_size, self.video_reader, self.segment_settings
        return ClipDecoder(size, num_frames, reader, segments, audio, window_seconds, sample, self.allow_urls)

    def finish_frames(self, clip: DecodedClip, as_bytes: bool = False) -> VideoFrames:
        """Crop and normalise the frames of a decoded clip.

        Args:
            clip: with frames.
            as_bytes: leave the values uint8 for the model to normalise, a quarter of the size on their way to a GPU.
                Values that are normalised otherwise than the model does are never left.
        """
        frames = clip.frames
        assert frames is not None
        if self.crop_scale is not None and clip.kind == "video":
            frames = random_crop_frames(frames, self.image_size, self.crop_scale)
        pixels = torch.tensor(frames).permute(0, 3, 1, 2)
        if not as_bytes or (self.mean, self.std) != (IMAGE_MEAN, IMAGE_STD):
            pixels = normalize_pixels(pixels, self.mean, self.std)
        of_clip = clip.kind, clip.times_seconds, clip.indices, clip.source
        return VideoFrames(pixels.contiguous(), *of_clip, frames, self.mean, self.std)

    def process_image(self, image: ImageInput) -> VideoFrames:
        """Read a still image as a video of one frame.

        Args:
            image: what stands for a file (`open_source`), a PIL image, or an array (`image_of_array`).

        Raises:
            MediaError: the file is no image or is damaged; an array that is no image.
        """
        source, loaded = read_image(image, self.allow_urls)
        if self.crop_scale is not None:
            pixels = random_crop_image(loaded, self.image_size, self.crop_scale)
        else:
            pixels = resize_image(loaded, self.image_size)
        return self.finish_frames(DecodedClip(source, pixels[np.newaxis], "image", [], [], None))

    def process_audio(self, sound: AudioInput) -> AudioSegments:
        """Read a sound file, the sound track of a video, or samples: what `read_segments` decodes.

        Args:
            sound: what stands for a file (`open_source`), or samples with their rate (`samples_of`).

        Raises:
            NoAudioTrackError: the file has no sound.
            MediaError: the sound cannot be decoded or is empty.
        """
        if is_file(sound):
            with open_source(sound, self.allow_urls) as file:
                return self.finish_segments(read_segments(file.path, self.segment_settings).of(file.name))
        samples, rate = samples_of(sound)
        mono = to_mono(samples, rate, rate).samples.numpy()
        return self.finish_segments(RawSegments("sound", [RawAudio("sound", [mono], rate)]))

    @cached_property
    def segment_settings(self) -> SegmentSettings:
        """Return the settings that the decoding of audio depends on."""
        return SegmentSettings(self.num_audio_segments, self.segment_spacing, self.log_mel)

    def finish_segments(self, raw: RawSegments) -> AudioSegments:
        """Resample decoded audio, and make log-mel segments of it.

        Raises:
            NoAudioTrackError: there is not a single sample.
            MediaError: samples that are not finite numbers.
        """
        settings = self.segment_settings
        rate_hz = settings.log_mel.sample_rate_hz
        waveforms, cut = [], []
        end = 0
        for audio in raw.audio:
            waveforms.append(finish_audio(audio, rate_hz).samples[0])
            cut.append((end, end + len(waveforms[-1])))
            end += len(waveforms[-1])
        samples = torch.cat(waveforms)
        num_samples = raw.num_samples or len(samples)
        ranges = segment_ranges(num_samples, settings.num_segments, settings.spacing, settings.log_mel)
        if raw.num_samples is None:
            # All of the audio is there, not only its segments.
            cut = ranges
        values = log_mel_segments(samples, cut, settings.log_mel)
        starts = [start / rate_hz for start, _ in ranges]
        segments = AudioSegments(values, starts, num_samples / rate_hz, raw.source)
        is_window = raw.num_samples is None and raw.audio[0].is_part
        if not is_window:
            # A window was cut for one rate, so it cannot serve for other settings.
            object.__setattr__(segments, "origin", AudioOrigin(raw, settings))
        return segments

    def adapt_audio(self, audio: AudioSegments) -> AudioSegments:
        """Return audio as this processor reads it, whichever processor has read it.

        What it was made of is kept, so the log-mel is the very one that this processor would have given. The number of
        segments and their spacing become this processor's, too, unless the other's were set to something else than
        the defaults, or some of the segments were picked. Of a file longer than `LONG_AUDIO_SECONDS` other stretches
        are decoded anew.

        Returns:
            the sound on its device and in its type; as it is, if nothing differs or what it was made of is not known.

        Raises:
            MediaError: the file has to be decoded anew, and is no longer there.
        """
        origin = audio.origin
        if origin is None:
            return audio
        processor = replace(self, **_chosen_spread(origin))
        settings = processor.segment_settings
        if settings == origin.settings:
            return audio
        adapted = processor.finish_segments(decoded_for(settings, origin))
        if origin.places is not None:
            adapted = adapted.take(origin.places)
        return adapted.to(audio.device, audio.dtype)


def _chosen_spread(origin: AudioOrigin) -> dict[str, Any]:
    """Return number and spacing of segments where they were chosen: not the defaults, or parts of one choice."""
    taken, default = origin.settings, MediaProcessor()
    chosen: dict[str, Any] = {}
    if origin.places is not None or taken.num_segments != default.num_audio_segments:
        chosen["num_audio_segments"] = taken.num_segments
    if origin.places is not None or taken.spacing != default.segment_spacing:
        chosen["segment_spacing"] = taken.spacing
    return chosen
