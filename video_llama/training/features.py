"""Fill the feature cache: run the frozen encoders on what the data loader did not find there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from video_llama.config import FeaturesConfig
from video_llama.data.batches import BadSample, SampleReader, load_samples
from video_llama.data.build import EncodedDataset
from video_llama.data.features import Features, FeatureStore, decode_features, encode_features, fingerprint
from video_llama.data.sample_processor import InputName, MediaInput
from video_llama.errors import ConfigError
from video_llama.model.frozen import trains
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.logbook import Logbook
from video_llama.utils.devices import to_device
from video_llama.utils.files import make_folder

__all__ = ["EncodedMedia", "FeatureFiller", "fill_cache", "open_feature_store"]

FRAMES_TOGETHER = 64
"""Frames, or segments of audio, that wait for each other before they are encoded."""
FIXED_BATCH = {"cuda": 32}
"""Frames or segments of each pass through an encoder, by device. Elsewhere an item is encoded by itself: a CPU is no
faster with more."""


def open_feature_store(
    config: FeaturesConfig, model: VideoLlamaForConditionalGeneration, *, images_as_audio: bool
) -> FeatureStore | None:
    """The cache that a configuration asks for.

    Raises:
        ConfigError: there cannot be such a folder.
        ValueError: an encoder whose outputs would be kept is not frozen.
    """
    if config.dir is None:
        return None
    video, audio = model.video_branch, model.audio_branch
    encoders: dict[str, list[nn.Module]] = {"pixel_values": [video.vision_encoder, video.vision_norm, video.qformer]}
    weights = {"pixel_values": [video.query_tokens]}
    if audio is not None:
        encoders["audio_values"] = [audio.audio_encoder]
    if audio is not None and audio.vision_encoder is not None and images_as_audio:
        encoders["audio_pixel_values"] = [audio.vision_encoder]
    if any(trains(*modules) for modules in encoders.values()):
        raise ValueError("features can only be cached of frozen encoders")
    fingerprints = {
        name: fingerprint([*(w for module in modules for w in module.parameters()), *weights.get(name, [])])
        for name, modules in encoders.items()
    }
    folder = Path(config.dir).expanduser()
    make_folder(folder, "features.dir")
    return FeatureStore(folder, config.encoding, fingerprints)  # type: ignore[arg-type]


@dataclass(frozen=True)
class EncodedMedia:
    """Features on their way from the device.

    Args:
        items: what was encoded.
        values: (all frames, queries, width) or (all segments, joint_width), on the CPU.
        arrived: until then the values are not there; None if they are.
    """

    items: list[MediaInput]
    values: Tensor
    arrived: torch.cuda.Event | None


class FeatureFiller:
    """Turns media into features, and keeps them.

    Features should not depend on what was encoded with them, but how many rows a matrix product has decides how it is
    computed and rounded. So each item is encoded by itself on a CPU, which gives the same bits in any company. On a GPU
    frames of several items go through an encoder together, always as many, missing ones being zeros: the same kernels
    every time. They are used as they are stored: the first epoch and the later ones learn from the same numbers.

    Args:
        model: with its frozen encoders.
        store: where features are kept.
        device: of the model.
        is_sharded: the encoders' weights are shared out over processes, so that none of them can encode alone.
    """

    def __init__(
        self,
        model: VideoLlamaForConditionalGeneration,
        store: FeatureStore,
        device: torch.device,
        is_sharded: bool = False,
    ) -> None:
        self._model = model
        self.store = store
        self._device = device
        self._is_sharded = is_sharded

    def __call__(self, media: Iterable[MediaInput]) -> int:
        """Encode in place what is not encoded yet; how many items that were.

        Raises:
            ConfigError: something is left to encode and the encoders are sharded.
        """
        missing = [item for item in media if is_missing(item)]
        for encoded in self.encode(missing):
            self.keep(encoded)
        return len(missing)

    def encode(self, media: Sequence[MediaInput]) -> list[EncodedMedia]:
        """Features of items of any kind; a GPU is not waited for.

        Raises:
            ConfigError: there are items and the encoders are sharded.
        """
        if media and self._is_sharded:
            raise ConfigError(
                "the feature cache is not complete, and sharded encoders cannot fill it: first run "
                "train.py --cache-features without FSDP or DeepSpeed"
            )
        alike: dict[tuple[InputName, torch.Size], list[MediaInput]] = {}
        for item in media:
            alike.setdefault((item.name, item.values.shape[1:]), []).append(item)
        return [self._encode_together(name, items) for (name, _), items in alike.items()]

    def keep(self, encoded: EncodedMedia) -> None:
        """Store features and give each item its own, as they were stored."""
        if encoded.arrived is not None:
            encoded.arrived.synchronize()
        numbers = [len(item.values) for item in encoded.items]
        for item, values in zip(encoded.items, encoded.values.split(numbers), strict=True):
            assert item.key is not None
            self.store.save(item.key, Features(values, item.message))
            item.values = decode_features(encode_features(values, self.store.encoding))
            item.is_encoded = True

    @torch.no_grad()
    def _encode_together(self, name: InputName, items: list[MediaInput]) -> EncodedMedia:
        parts = [item.values for item in items]
        number = sum(map(len, parts))
        if fixed := FIXED_BATCH.get(self._device.type):
            padding = parts[0].new_zeros(-number % fixed, *parts[0].shape[1:])
            parts = list(torch.cat([*parts, padding]).split(fixed))
        features = torch.cat([self._encode(name, to_device(part, self._device)) for part in parts])
        features = features[:number].to(torch.bfloat16 if self.store.encoding == "bfloat16" else torch.float32)
        if features.device.type != "cuda":
            return EncodedMedia(items, features.cpu(), None)
        values = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        values.copy_(features, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(features.device))
        return EncodedMedia(items, values, arrived)

    def _encode(self, name: InputName, frames: Tensor) -> Tensor:
        """Features of frames, or of segments of audio, each by itself."""
        if name == "pixel_values":
            return self._model.video_branch.encode_frames(frames[None])[0]
        audio = self._model.audio_branch
        assert audio is not None, "the store has no fingerprint for sound without an audio branch"
        encode = audio.encode_images if name == "audio_pixel_values" else audio.encode_segments
        return encode(frames[None])[0]


def is_missing(item: MediaInput) -> bool:
    """Whether an item is for the cache and not there yet."""
    return item.key is not None and not item.is_encoded


def fill_cache(
    accelerator: Accelerator,
    filler: FeatureFiller,
    datasets: Iterable[EncodedDataset],
    logbook: Logbook,
    num_workers: int,
) -> tuple[int, int]:
    """Encode every media file of the datasets that is not in the cache, shared by all processes.

    Returns:
        (items encoded now, samples that cannot be used) of this process. What was there stays, so a run that was
        stopped goes on.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    num_encoded = num_bad = 0
    with _Writer(filler) as writer:
        for dataset in datasets:
            reader = SampleReader(dataset.examples, dataset.encoder)
            indices = range(rank, len(reader), world_size)
            samples = load_samples(reader, indices, num_workers)
            is_shown = accelerator.is_main_process
            for sample in tqdm(samples, dataset.name, len(indices), unit="file", disable=not is_shown):
                if isinstance(sample, BadSample):
                    logbook.quarantine([sample], 0)
                    num_bad += 1
                else:
                    num_encoded += writer.add(sample.media)
    accelerator.wait_for_everyone()
    return num_encoded, num_bad


class _Writer(contextlib.AbstractContextManager["_Writer"]):
    """Collects media for the encoders and writes what they gave, in a thread while they are at the next."""

    def __init__(self, filler: FeatureFiller) -> None:
        self._filler = filler
        self._waiting: dict[str, MediaInput] = {}
        self._pool = ThreadPoolExecutor(1, "features")
        self._written: Future[None] | None = None

    def add(self, media: Iterable[MediaInput]) -> int:
        """Take what is not in the cache yet; how many items that were that do not wait already."""
        new = {item.key: item for item in media if is_missing(item) and item.key and item.key not in self._waiting}
        self._waiting |= new
        if sum(len(item.values) for item in self._waiting.values()) >= FRAMES_TOGETHER:
            self._encode()
        return len(new)

    def _encode(self) -> None:
        encoded = self._filler.encode(list(self._waiting.values()))
        self._waiting = {}
        self._wait()
        self._written = self._pool.submit(self._keep, encoded)

    def _keep(self, encoded: Iterable[EncodedMedia]) -> None:
        for part in encoded:
            self._filler.keep(part)

    def _wait(self) -> None:
        """Until all that was handed over is written; what went wrong there goes wrong here."""
        if self._written is not None:
            self._written.result()

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                self._encode()
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
