"""Build a reader of batches from the datasets section of a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_llama.config import BuildInfo, Config, DatasetConfig, ModelConfig, ProcessorConfig
from video_llama.data.batches import BatchReader
from video_llama.data.datasets import MODALITIES, build_examples, first_example
from video_llama.data.examples import ExampleTable
from video_llama.data.features import FeatureStore
from video_llama.data.hf_rows import RowTable, StreamTable
from video_llama.data.mixture import MixtureBatchSampler, mixture_weights
from video_llama.data.sample_processor import SampleProcessor, TextSettings
from video_llama.data.shards import Shard, find_shards, index_shard
from video_llama.data.templates import check_caption_end, choose_template
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.builders import load_processor
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.registry import PROCESSORS

__all__ = ["EncodedDataset", "build_batch_reader", "build_datasets", "holds_messages", "index_shards", "load_prompts"]

logger = logging.getLogger(__name__)

_RAW_CAPTIONS = ("cc_sbu_align",)
_SHARD_DATASETS = ("cc_sbu", "laion", "shards")
_ROW_DATASETS = ("table", "hf")
# Neighbouring examples that stay near each other, so that few shards are read at a time.
_SHARD_BLOCK = 1000
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
        name: in the configuration.
        examples: all of its split.
        encoder: processes them.
    """

    name: str
    examples: ExampleTable | RowTable
    encoder: SampleProcessor


def build_datasets(
    config: Config,
    processor: VideoLlamaProcessor,
    *,
    training: bool,
    images_as_audio: bool = False,
    features: FeatureStore | None = None,
) -> list[EncodedDataset]:
    """Return the datasets of a configuration, of their training or their validation split.

    Args:
        config: the whole configuration.
        processor: of the model.
        training: True takes the training split and its augmentation; False the validation split of those datasets
            that have one.
        images_as_audio: frames go to the audio branch.
        features: encoder outputs on disk; with them nothing is augmented.

    Raises:
        ConfigError, DatasetError: as `build_examples`; no datasets; settings that do not fit the model.
    """
    if not config.datasets:
        raise ConfigError("the section datasets names no dataset")
    tables: dict[str, ExampleTable | RowTable] = {}
    for name, section in config.datasets.items():
        info = section.build_info if training else section.valid_build_info
        # A dataset without a validation split is left out of the validation.
        if not training and info == BuildInfo():
            continue
        tables[name] = build_examples(name, section, info)
        logger.info("datasets.%s: %d examples", name, len(tables[name]))
    # Before anything is read or trained, and in this process: a worker would wrap the error.
    template = processor.conv_template
    if any("caption" not in table[0].text for table in tables.values()):
        template = choose_template(config, processor, warns=training)
    if training and any("caption" in table[0].text for table in tables.values()):
        check_caption_end(config.model.end_sym, processor)
    built = []
    for name, examples in tables.items():
        section = config.datasets[name]
        # Cached features are of frames without random crops.
        media = _media_processor(section, processor.media_processor, augment=training and features is None)
        if section.data_type == "audio" and not processor.use_audio:
            raise ConfigError(f"datasets.{name} is of audio, but the model is built without its audio branch")
        # Messages name their media one by one, so no frames stand in for audio there.
        as_audio = images_as_audio and section.data_type != "audio" and not holds_messages(name, section)
        kind = "audio" if as_audio or section.data_type == "audio" else "image"
        text = _text_settings(name, section, config.model, processor, kind, template)
        encoder = SampleProcessor(text, media, as_audio, features, section.skip_silent)
        built.append(EncodedDataset(name, examples, encoder))
    return built


def index_shards(config: Config, rank: int, world_size: int) -> None:
    """Index this process's share of the shards of a configuration, so that each is read only once."""
    # Errors in shards are left to `build_datasets`, which raises them in all processes alike.
    for name, section in config.datasets.items():
        if _is_sharded(name):
            for info in (section.build_info, section.valid_build_info):
                with contextlib.suppress(DatasetError):
                    # Each process indexes every `world_size`-th shard. The index is on disk, so all processes read it.
                    for path in _find_shards(info)[rank::world_size]:
                        index_shard(path, MODALITIES[section.data_type])


def holds_messages(name: str, section: DatasetConfig) -> bool:
    """Return whether a dataset's samples are messages: `messages` itself, or rows or shards of such samples."""
    if name.partition(":")[0] in _ROW_DATASETS:
        return first_example(name, section).source is None
    if not _is_sharded(name):
        return name.partition(":")[0] == "messages"
    rows: list[Any] = []
    for info in (section.build_info, section.valid_build_info):
        with contextlib.suppress(DatasetError):
            for path in _find_shards(info)[:1]:
                rows += index_shard(path, MODALITIES[section.data_type])
    # Messages name their media in their text, so they have no source.
    return bool(rows) and all(source is None for _, source, _ in rows)


def _is_sharded(name: str) -> bool:
    return name.partition(":")[0] in _SHARD_DATASETS


def _find_shards(info: BuildInfo) -> list[Shard]:
    if info.storage is None:
        return []
    return find_shards(str(info.storage))


def build_batch_reader(
    config: Config,
    datasets: Sequence[EncodedDataset],
    processor: VideoLlamaProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchReader:
    """Return the reader of a run's batches, for one of its processes.

    Raises:
        ConfigError: invalid sample ratios.
    """
    names = [dataset.name for dataset in datasets]
    sizes = [len(dataset.examples) for dataset in datasets]
    run = config.run
    # Without a number of iterations every epoch is one pass over the data.
    is_whole = run.iters_per_epoch is None
    sampler = MixtureBatchSampler(
        sizes,
        mixture_weights(sizes, [config.datasets[name].sample_ratio for name in names], names),
        batch_size=run.batch_size_train,
        num_batches=run.max_epoch * (run.iters_per_epoch or 0),
        num_passes=run.max_epoch * is_whole,
        seed=run.seed,
        rank=rank,
        world_size=world_size,
        block_sizes=[_SHARD_BLOCK * _is_sharded(name) for name in names],
        lengths=[_lengths(dataset, run.group_by_length) for dataset in datasets],
    )
    tables = [dataset.examples for dataset in datasets]
    streams = {
        number: table.stream([run.seed, number], rank, world_size)
        for number, table in enumerate(tables)
        if isinstance(table, StreamTable)
    }
    processors = [dataset.encoder for dataset in datasets]
    return BatchReader(tables, processors, sampler, processor.tokenizer.pad_token_id, streams)


def _lengths(dataset: EncodedDataset, is_grouped: bool) -> NDArray[np.int64] | None:
    """Return how long the examples of a dataset are, where its batches must be grouped by that."""
    if not is_grouped:
        return None
    # Shards are read in order, and rows of tables that lie elsewhere would all have to be read first.
    if _is_sharded(dataset.name) or not isinstance(dataset.examples, ExampleTable):
        logger.warning("datasets.%s: run.group_by_length has no effect on shards, tables and streams", dataset.name)
        return None
    return dataset.examples.row_sizes


def load_prompts(config: ModelConfig) -> list[str]:
    """Return the prompts of stage 1: the lines of `prompt_path` that hold `<ImageHere>`, in `prompt_template`.

    Raises:
        ConfigError: the file is absent, has no such line or one with several, or the template does not hold `{}` or
            has no prompts.
    """
    if not config.prompt_path:
        if config.prompt_template:
            raise ConfigError(
                "model.prompt_template is set and model.prompt_path is not, so captions would be learnt without any "
                "instruction; name a file of prompts (prompts/alignment_image.txt) or set model.prompt_template to ''"
            )
        return []
    path = Path(config.prompt_path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.prompt_path: {path} cannot be read ({error})") from error
    prompts = [line for line in lines if "<ImageHere>" in line]
    if not prompts:
        raise ConfigError(f"model.prompt_path: no line of {path} holds <ImageHere>, the position of the media")
    template = config.prompt_template or "{}"
    if "{}" not in template:
        raise ConfigError(f"model.prompt_template: {template!r} does not hold {{}}, the position of the prompt")
    prompts = [template.replace("{}", prompt) for prompt in prompts]
    for prompt in prompts:
        if prompt.count("<ImageHere>") != 1:
            raise ConfigError(f"model.prompt_path: {prompt!r} must hold <ImageHere> once, for there is one media file")
    return prompts


def _media_processor(section: DatasetConfig, model_media: MediaProcessor, augment: bool) -> MediaProcessor:
    """Return the dataset's processor, with the model's settings where the section has none.

    Raises:
        ConfigError: an image size that is not the model's.
    """
    split = section.vis_processor.train if augment else section.vis_processor.eval
    name = split.name or _PROCESSOR_NAMES[section.data_type, augment]
    # Sizes describe the clips of the dataset, so an empty `eval` section takes those of `train`.
    sized = section.vis_processor.train if split == ProcessorConfig() else split
    settings: dict[str, Any] = {
        "image_size": sized.image_size or model_media.image_size,
        "mean": sized.mean or model_media.mean,
        "std": sized.std or model_media.std,
    }
    if section.data_type == "video":
        settings["n_frms"] = sized.n_frms or model_media.num_frames
    # The scales are limits of the random crop, which only the training processors of frames and images have.
    if augment and section.data_type != "audio":
        scales = {"min_scale": split.min_scale, "max_scale": split.max_scale}
        settings |= {key: value for key, value in scales.items() if value is not None}
    media = load_processor(name, **settings)
    if media.image_size != model_media.image_size:
        raise ConfigError(
            f"vis_processor image_size is {media.image_size}, but the model's is {model_media.image_size} "
            f"(model.image_size)"
        )
    # A section has no keys for audio, so segments and spectrograms are always those of the model.
    return dataclasses.replace(
        media,
        log_mel=model_media.log_mel,
        num_audio_segments=model_media.num_audio_segments,
        segment_spacing=model_media.segment_spacing,
        video_reader=sized.video_reader or model_media.video_reader,
    )


def _text_settings(
    name: str, section: DatasetConfig, model: ModelConfig, processor: VideoLlamaProcessor, kind: str, template: str
) -> TextSettings:
    lengths = processor.placeholder_lengths
    length = lengths[kind]
    if section.num_video_query_token not in (None, length):
        raise ConfigError(
            f"datasets.{name}.num_video_query_token is {section.num_video_query_token}, but the branch that trains "
            f"has {length} query tokens"
        )
    caption = section.text_processor.train
    # The original takes detailed captions as they are, whatever its configurations say of a text processor.
    is_cleaned = section.clean_captions
    if is_cleaned is None:
        is_cleaned = name.partition(":")[0] not in _RAW_CAPTIONS
        if not is_cleaned and caption != ProcessorConfig():
            logger.warning(
                "datasets.%s.text_processor has no effect: captions are taken as they are; clean_captions: True cleans "
                "them, clean_captions: False ends this warning",
                name,
            )
    options = {"prompt": caption.prompt, "max_words": caption.max_words}
    cleaner = PROCESSORS.build(
        caption.name or "blip_caption", **{key: value for key, value in options.items() if value is not None}
    )
    ids = dict(processor.placeholder_ids)
    if not processor.use_audio:
        del ids["audio"]
    return TextSettings(
        processor.tokenizer,
        ids,
        lengths,
        max_txt_len=model.max_txt_len,
        end_sym=model.end_sym,
        prompts=load_prompts(model),
        template=template,
        caption_processor=cleaner if is_cleaned else None,
    )
