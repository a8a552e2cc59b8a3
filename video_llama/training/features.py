"""Fill the feature cache: run the frozen encoders on what the data loader did not find there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from video_llama.config import FeaturesConfig
from video_llama.data.batches import BadSample, SampleReader, SilentSample, load_samples
from video_llama.data.build import EncodedDataset
from video_llama.data.features import Features, FeatureStore, decode_features, encode_features, fingerprint
from video_llama.data.sample_processor import InputName, MediaInput
from video_llama.errors import ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_configuration import AudioEncoderConfig, FrameEncoderConfig
from video_llama.model.frozen import trains
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.utils.devices import to_device
from video_llama.utils.files import make_folder

__all__ = ["FeatureFiller", "fill_cache", "open_feature_store"]

FRAMES_TOGETHER = 64
"""Frames, or segments of audio, that are collected before they are encoded."""
FIXED_BATCH = {"cuda": 32}
"""Frames or segments of each pass through an encoder, by device. Elsewhere an item is encoded by itself: a CPU is no
faster with more."""


def open_feature_store(
    config: FeaturesConfig, model: VideoLlamaForConditionalGeneration, *, images_as_audio: bool
) -> FeatureStore | None:
    """Return the cache that `features.dir` names, None if it names none.

    Raises:
        ConfigError: the folder cannot be made.
        ValueError: an encoder whose outputs would be kept is not frozen.
    """
    if config.dir is None:
        return None
    video, audio = model.video_branch, model.audio_branch
    encoders: dict[str, list[nn.Module]] = {"pixel_values": [*video.encoder_parts]}
    if audio is not None:
        encoders["audio_values"] = [audio.audio_encoder]
        if audio.vision_encoder is not None and images_as_audio:
            encoders["audio_pixel_values"] = [audio.vision_encoder]
    # The cache is keyed by the weights too, so features of other encoder weights are never used.
    fingerprints: dict[str, str] = {}
    for name, modules in encoders.items():
        if trains(*modules):
            raise ValueError("features can only be cached of frozen encoders")
        weights = [parameter for module in modules for parameter in module.parameters()]
        if name == "pixel_values":
            # Queries are a parameter of the branch itself and not of one of the modules.
            weights += [value for value in video.encoder_weights if isinstance(value, nn.Parameter)]
        fingerprints[name] = fingerprint(weights) + _settings_of(model.config, name)
    folder = Path(config.dir).expanduser()
    make_folder(folder, "features.dir")
    return FeatureStore(folder, config.encoding, fingerprints)  # type: ignore[arg-type]


def _settings_of(config: VideoLlamaConfig, name: str) -> str:
    """Return what features depend on beside weights, where parts are not the published ones; else nothing."""
    of_encoder = config.vision_config if name == "pixel_values" else config.audio_config
    settings: list[Any] = []
    if isinstance(of_encoder, (FrameEncoderConfig, AudioEncoderConfig)):
        settings.append(of_encoder.to_diff_dict())
    if name == "pixel_values" and config.connector is not None:
        settings.append(config.connector)
    return json.dumps(settings, sort_keys=True, default=str) if settings else ""


class FeatureFiller:
    """Encode media and keep their features.

    The number of rows of a matrix product decides which kernel computes it, and so its rounding. For features that do
    not depend on what was encoded with them, a CPU encodes each item by itself, and a GPU always the same number of
    frames, of one or several items, with zeros in place of missing ones. Features are used as they are stored, so that
    the first epoch learns from the same numbers as later ones.

    Args:
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
        """Encode in place, and keep, what is not encoded yet; return how many items that were.

        Raises:
            ConfigError: there are such items and the encoders are sharded, or the cache cannot be written.
        """
        # Items without a key are not for the cache.
        missing = [item for item in media if item.key is not None and not item.is_encoded]
        if missing and self._is_sharded:
            raise ConfigError(
                "the feature cache is not complete, and sharded encoders cannot fill it: first run "
                "train.py --cache-features without FSDP or DeepSpeed"
            )
        # Only frames of one size, or segments, go through an encoder together.
        alike: dict[tuple[InputName, torch.Size], list[MediaInput]] = {}
        for item in missing:
            alike.setdefault((item.name, item.values.shape[1:]), []).append(item)
        for (name, _), items in alike.items():
            features = self._encode_together(name, [item.values for item in items])
            for item, values in zip(items, features, strict=True):
                assert item.key is not None
                self.store.save(item.key, Features(values, item.message))
                # Through the stored form and back, so that the first epoch sees the same rounding as later ones.
                item.values = decode_features(encode_features(values, self.store.encoding))
                item.is_encoded = True
        return len(missing)

    @torch.no_grad()
    def _encode_together(self, name: InputName, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the features of each item, on the CPU: (frames, queries, width) or (segments, joint_width)."""
        lengths = [len(part) for part in parts]
        fixed = FIXED_BATCH.get(self._device.type)
        if fixed is not None:
            # Put the frames of all items in one row, pad it to a multiple of the fixed size, and cut it into passes.
            padding = parts[0].new_zeros(-sum(lengths) % fixed, *parts[0].shape[1:])
            parts = list(torch.cat([*parts, padding]).split(fixed))
        features = torch.cat([self._encode(name, to_device(part, self._device)) for part in parts])
        dtype = torch.float32
        if self.store.encoding == "bfloat16":
            dtype = torch.bfloat16
        return features[: sum(lengths)].to(dtype).cpu().split(lengths)

    def _encode(self, name: InputName, frames: Tensor) -> Tensor:
        """Return the features of frames, or of segments of audio, each by itself."""
        if name == "pixel_values":
            return self._model.video_branch.encode_frames(frames[None])[0]
        audio = self._model.audio_branch
        assert audio is not None, "without an audio branch the store has no fingerprint for audio"
        if name == "audio_pixel_values":
            return audio.encode_images(frames[None])[0]
        return audio.encode_segments(frames[None])[0]


def fill_cache(
    accelerator: Accelerator,
    filler: FeatureFiller,
    datasets: Iterable[EncodedDataset],
    note_bad: Callable[[Sequence[BadSample]], object],
    num_workers: int,
) -> tuple[int, int]:
    """Encode every media file of the datasets that is not in the cache, shared by all processes.

    What is there stays, so a run that was stopped goes on.

    Args:
        note_bad: called with this process's samples that cannot be used.

    Returns:
        (items encoded now, samples that cannot be used) of this process.
    """
    num_encoded = num_bad = 0
    # By key, since several samples may share a file.
    waiting: dict[str, MediaInput] = {}
    for dataset in datasets:
        reader = SampleReader(dataset.examples, dataset.encoder)
        # Of n processes each takes every n-th sample, so no sample is encoded twice.
        indices = range(accelerator.process_index, len(reader), accelerator.num_processes)
        samples = load_samples(reader, indices, num_workers)
        is_shown = accelerator.is_main_process
        for sample in tqdm(samples, dataset.name, len(indices), unit="file", disable=not is_shown):
            if isinstance(sample, SilentSample):
                continue
            if isinstance(sample, BadSample):
                note_bad([sample])
                num_bad += 1
                continue
            waiting.update({item.key: item for item in sample.media if item.key is not None and not item.is_encoded})
            if sum(len(item.values) for item in waiting.values()) >= FRAMES_TOGETHER:
                num_encoded += filler(waiting.values())
                waiting = {}
    num_encoded += filler(waiting.values())
    accelerator.wait_for_everyone()
    return num_encoded, num_bad
