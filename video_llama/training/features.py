"""Fill the feature cache: run the frozen encoders on what the data loader did not find there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from video_llama.config import FeaturesConfig
from video_llama.data.batches import Failure, SampleReader, load_samples
from video_llama.data.build import EncodedDataset
from video_llama.data.encoding import MediaInput
from video_llama.data.features import Features, FeatureStore, decode_features, encode_features, fingerprint
from video_llama.errors import ConfigError
from video_llama.model.qformer import trains
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.logbook import Logbook
from video_llama.utils.files import make_folder

__all__ = ["FeatureFiller", "fill_cache", "open_feature_store"]


def open_feature_store(
    config: FeaturesConfig, model: VideoLlamaForConditionalGeneration, *, images_as_sound: bool
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
    if audio is not None and audio.vision_encoder is not None and images_as_sound:
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


class FeatureFiller:
    """Turns the media of a batch into features, and keeps them.

    Each item is encoded by itself, so that its features do not depend on what stood beside it, and is used as
    it is stored: the first epoch and the later ones learn from the same numbers.

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
        num_encoded = 0
        for item in media:
            if item.key is None or item.is_encoded:
                continue
            if self._is_sharded:
                raise ConfigError(
                    "the feature cache is not complete, and sharded encoders cannot fill it: first run "
                    "train.py --cache-features without FSDP or DeepSpeed"
                )
            values = self._encode(item).float().cpu()
            self.store.save(item.key, Features(values, item.message))
            item.values = decode_features(encode_features(values, self.store.encoding))
            item.is_encoded = True
            num_encoded += 1
        return num_encoded

    @torch.no_grad()
    def _encode(self, item: MediaInput) -> Tensor:
        values = item.values[None].to(self._device)
        if item.name == "pixel_values":
            return self._model.video_branch.encode_frames(values)[0]
        audio = self._model.audio_branch
        assert audio is not None, "the store has no fingerprint for sound without an audio branch"
        return (audio.encode_images(values) if item.name == "audio_pixel_values" else audio.encode_segments(values))[0]


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
    for dataset in datasets:
        reader = SampleReader(dataset.examples, dataset.encoder)
        indices = range(rank, len(reader), world_size)
        samples = load_samples(reader, indices, num_workers)
        for sample in tqdm(samples, dataset.name, len(indices), unit="file", disable=not accelerator.is_main_process):
            if isinstance(sample, Failure):
                logbook.quarantine([sample], 0)
                num_bad += 1
            else:
                num_encoded += filler(sample.media)
    accelerator.wait_for_everyone()
    return num_encoded, num_bad
