"""From the datasets section of a configuration to what reads batches."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.config import BuildInfo, Config, DatasetConfig, ModelConfig, ProcessorConfig
from video_llama.data.batches import BatchReader
from video_llama.data.datasets import MEDIA_KINDS, build_examples
from video_llama.data.examples import ExampleTable
from video_llama.data.features import FeatureStore
from video_llama.data.mixture import MixtureBatchSampler, mixture_weights
from video_llama.data.sample_processor import SampleProcessor, TextSettings
from video_llama.data.shards import find_shards, index_shard
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.builders import load_processor
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.registry import PROCESSORS

__all__ = ["EncodedDataset", "build_batch_reader", "build_datasets", "holds_messages", "index_shards", "load_prompts"]

logger = logging.getLogger(__name__)

_SHARD_DATASETS = ("cc_sbu", "laion", "shards")
_SHARD_BLOCK = 1000  # neighbouring examples that stay near each other, so that reads of a shard do
_PROCESSOR_NAMES = {
    ("video", True): "alpro_video_train",
    ("video", False): "alpro_video_eval",
    ("images", True): "blip2_image_train",
    ("images", False): "blip2_image_eval",
    ("audio", True): "alpro_video_eval",
    ("audio", False): "alpro_video_eval",
}


@dataclass(frozen=True)
class EncodedDataset:
    """One dataset of a run.

    Args:
        name: as the configuration has it.
        examples: all of its split.
        encoder: makes samples of them.
    """

    name: str
    examples: ExampleTable
    encoder: SampleProcessor


def build_datasets(
    config: Config,
    processor: VideoLlamaProcessor,
    *,
    training: bool,
    images_as_audio: bool = False,
    features: FeatureStore | None = None,
) -> list[EncodedDataset]:
    """The datasets of a configuration, of their training or their validation split.

    Args:
        config: the whole configuration.
        processor: of the model.
        training: True takes the training split and its augmentation; False the validation split of those datasets
            that have one.
        images_as_audio: pictures go to the audio branch.
        features: encoder outputs kept on disk; with them nothing is augmented.

    Raises:
        ConfigError, DatasetError: as `build_examples`; no datasets at all; settings that do not fit the model.
    """
    if not config.datasets:
        raise ConfigError("the section datasets names no dataset")
    built = []
    for name, section in config.datasets.items():
        info = section.build_info if training else section.valid_build_info
        if not training and info == BuildInfo():
            continue
        examples = build_examples(name, section, info)
        logger.info("datasets.%s: %d examples", name, len(examples))
        media = _media_processor(section, processor.media_processor, augment=training and features is None)
        if section.data_type == "audio" and not processor.use_audio:
            raise ConfigError(f"datasets.{name} is of sounds, but the model is built without its audio branch")
        # Messages name their media one by one, so nothing has to stand in for sound there.
        as_sound = images_as_audio and section.data_type != "audio" and not holds_messages(name, section)
        text = _text_settings(name, section, config.model, processor, hears=as_sound or section.data_type == "audio")
        built.append(EncodedDataset(name, examples, SampleProcessor(text, media, as_sound, features)))
    return built


def index_shards(config: Config, rank: int, world_size: int) -> None:
    """Index this process's share of the shards that a configuration names, so that each is read through only once.

    Without it every process would read all shards at its first start. What is wrong with them, `build_datasets` tells
    all processes alike.
    """
    for name, section in config.datasets.items():
        if name.partition(":")[0] in _SHARD_DATASETS:
            for info in (section.build_info, section.valid_build_info):
                with contextlib.suppress(DatasetError):
                    shards = [] if info.storage is None else find_shards(str(Path(info.storage).expanduser()))
                    for path in shards[rank::world_size]:
                        index_shard(path, MEDIA_KINDS[section.data_type])


def holds_messages(name: str, section: DatasetConfig) -> bool:
    """Whether a dataset's samples are messages: `messages` itself, or shards that such samples were packed into.

    What is wrong with shards, `build_datasets` tells.
    """
    kind = name.partition(":")[0]
    if kind not in _SHARD_DATASETS:
        return kind == "messages"
    storages = [info.storage for info in (section.build_info, section.valid_build_info) if info.storage is not None]
    rows: list[Any] = []
    for storage in storages:
        with contextlib.suppress(DatasetError):
            rows += index_shard(find_shards(str(Path(storage).expanduser()))[0], MEDIA_KINDS[section.data_type])
    return bool(rows) and all(source is None for _, source, _ in rows)  # messages name their media in their text


def build_batch_reader(
    config: Config,
    datasets: Sequence[EncodedDataset],
    processor: VideoLlamaProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchReader:
    """All batches of a run, for one of its processes.

    Raises:
        ConfigError: sample ratios that make no sense.
    """
    names = [dataset.name for dataset in datasets]
    sizes = [len(dataset.examples) for dataset in datasets]
    run = config.run
    plan = MixtureBatchSampler(
        sizes,
        mixture_weights(sizes, [config.datasets[name].sample_ratio for name in names], names),
        batch_size=run.batch_size_train,
        num_batches=run.max_epoch * run.iters_per_epoch,
        seed=run.seed,
        rank=rank,
        world_size=world_size,
        block_sizes=[_SHARD_BLOCK if name.partition(":")[0] in _SHARD_DATASETS else 0 for name in names],
    )
    tables = [dataset.examples for dataset in datasets]
    return BatchReader(tables, [dataset.encoder for dataset in datasets], plan, processor.tokenizer.pad_token_id)


def load_prompts(config: ModelConfig) -> list[str]:
    """The prompts of stage 1: the lines of `prompt_path` that hold `<ImageHere>`, in `prompt_template`.

    Raises:
        ConfigError: the file is absent, has no such line or one with several, or the template does not hold `{}`.
    """
    if not config.prompt_path:
        return []
    path = Path(config.prompt_path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.prompt_path: {path} cannot be read ({error})") from error
    prompts = [line for line in lines if "<ImageHere>" in line]
    if not prompts:
        raise ConfigError(f"model.prompt_path: no line of {path} holds <ImageHere>, the place of the media")
    template = config.prompt_template or "{}"
    if "{}" not in template:
        raise ConfigError(f"model.prompt_template: {template!r} does not hold {{}}, the place of the prompt")
    whole = [template.replace("{}", prompt) for prompt in prompts]
    for prompt in whole:
        if prompt.count("<ImageHere>") != 1:
            raise ConfigError(f"model.prompt_path: {prompt!r} must hold <ImageHere> once, for there is one media file")
    return whole


def _media_processor(section: DatasetConfig, model_media: MediaProcessor, augment: bool) -> MediaProcessor:
    """The dataset's processor, with the model's settings wherever the section says nothing.

    Raises:
        ConfigError: an image size that is not the model's.
    """
    split = section.vis_processor.train if augment else section.vis_processor.eval
    name = split.name if split.name is not None else _PROCESSOR_NAMES[section.data_type, augment]
    sized = section.vis_processor.train if split == ProcessorConfig() else split  # of the clip: no matter of the split
    settings: dict[str, Any] = {
        "image_size": sized.image_size or model_media.image_size,
        "mean": sized.mean or model_media.mean,
        "std": sized.std or model_media.std,
    }
    if section.data_type == "video":
        settings["n_frms"] = sized.n_frms or model_media.num_frames
    if augment and section.data_type != "audio":
        scales = {"min_scale": split.min_scale, "max_scale": split.max_scale}
        settings |= {key: value for key, value in scales.items() if value is not None}
    media = load_processor(name, **settings)
    if media.image_size != model_media.image_size:
        raise ConfigError(
            f"vis_processor image_size is {media.image_size}, but the model's is {model_media.image_size} "
            f"(model.image_size)"
        )
    return dataclasses.replace(
        media,
        log_mel=model_media.log_mel,
        num_audio_segments=model_media.num_audio_segments,
        segment_spacing=model_media.segment_spacing,
        video_reader=sized.video_reader or model_media.video_reader,
    )


def _text_settings(
    name: str, section: DatasetConfig, model: ModelConfig, processor: VideoLlamaProcessor, hears: bool
) -> TextSettings:
    lengths = processor.placeholder_lengths
    length = lengths["audio" if hears else "image"]
    if section.num_video_query_token not in (None, length):
        raise ConfigError(
            f"datasets.{name}.num_video_query_token is {section.num_video_query_token}, but the branch that trains "
            f"has {length} query tokens"
        )
    caption = section.text_processor.train
    cleaner = PROCESSORS.build(
        caption.name or "blip_caption",
        **{key: getattr(caption, key) for key in ("prompt", "max_words") if getattr(caption, key) is not None},
    )
    family = "vicuna" if "vicuna" in model.model_type else "llama_v2"
    kinds = processor.placeholder_ids
    return TextSettings(
        processor.tokenizer,
        kinds if processor.use_audio else {"image": kinds["image"]},
        lengths,
        max_txt_len=model.max_txt_len,
        end_sym=model.end_sym,
        prompts=load_prompts(model),
        template=section.model_type or family,
        caption_processor=cleaner,
    )
