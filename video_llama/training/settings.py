"""Find settings that make no sense or contradict each other, before anything loads; all are reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from video_llama.config import BuildInfo, Config, ProcessorConfig
from video_llama.data.mixture import mixture_weights
from video_llama.errors import ConfigError
from video_llama.media.video import check_video_reader
from video_llama.registry import DATASETS, SCHEDULES, Registry
from video_llama.training.processes import mixed_precision, training_device
from video_llama.utils.extras import how_to_install

__all__ = ["check_settings"]

_AT_LEAST_ONE = (
    *("run.max_epoch", "run.iters_per_epoch", "run.batch_size_train", "run.batch_size_eval", "run.accum_grad_iters"),
    *("run.log_freq", "run.keep_checkpoints", "run.max_valid_batches", "run.world_size", "model.max_txt_len"),
)
_NOT_NEGATIVE = (
    *("run.init_lr", "run.min_lr", "run.warmup_steps", "run.weight_decay", "run.lr_decay_rate", "run.num_workers"),
    *("run.save_freq", "run.num_generations", "run.seed"),
)
_MODEL_TYPES = ("pretrain_llama_v2", "pretrain_vicuna", "llama_v2", "vicuna")


def check_settings(config: Config) -> None:
    """Look for mistakes that the types of the settings allow.

    Raises:
        ConfigError: there are some; all are named.
    """
    mistakes = [*_of_numbers(config), *_of_model(config), *_of_device(config), *_of_run(config), *_of_datasets(config)]
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def _of_numbers(config: Config) -> Iterator[str]:
    for keys, lowest in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for key in keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            if not lowest <= value < math.inf:
                yield f"{key} must be at least {lowest}, but is {value}"


def _of_model(config: Config) -> Iterator[str]:
    if config.model.model_type not in _MODEL_TYPES:
        yield f"model.model_type must be one of {', '.join(_MODEL_TYPES)}, but is {config.model.model_type!r}"


def _of_device(config: Config) -> Iterator[str]:
    device = config.run.device
    if device is not None and ":" in device:
        yield f"run.device is a kind of device (cpu or cuda), not {device!r}: CUDA_VISIBLE_DEVICES chooses GPUs"
        return
    try:
        training_device(config.run)
    except ConfigError as error:
        yield f"run.device: {error}; without this key a run takes what there is"
        return
    try:
        mixed_precision(config.run, config.model.dtype)
    except ConfigError as error:
        yield f"model.dtype: {error}"


def _of_run(config: Config) -> Iterator[str]:
    run = config.run
    if run.accum_grad_iters > 0 and (
        run.iters_per_epoch % run.accum_grad_iters or run.save_freq % run.accum_grad_iters
    ):
        yield "run.iters_per_epoch and run.save_freq must be multiples of run.accum_grad_iters"
    if not 0 <= run.max_bad_samples <= 1:
        yield f"run.max_bad_samples is a share from 0 to 1, not {run.max_bad_samples}"
    if not 0 <= run.beta2 < 1:
        yield f"run.beta2 must be at least 0 and less than 1, but is {run.beta2}"
    if run.max_grad_norm is not None and not run.max_grad_norm > 0:
        yield f"run.max_grad_norm must be more than 0, or null for no clipping, but is {run.max_grad_norm}"
    if run.compile:
        model = config.model
        if model.low_resource or model.load_in_8bit or model.load_in_4bit:
            yield "run.compile takes no language model in 8 or 4 bit (model.load_in_8bit, load_in_4bit, low_resource)"
        if run.deterministic:
            yield "choose one of run.compile and run.deterministic: what is compiled depends on which length came first"
    yield from _unknown(SCHEDULES, run.lr_sched)
    for tracker in run.trackers:
        if tracker not in LoggerType.list():
            yield f"run.trackers names {tracker!r}; known: {', '.join(LoggerType.list())}"
        elif LoggerType(tracker) not in [LoggerType.ALL, *get_available_trackers()]:  # accelerate would leave it out
            yield f"run.trackers names {tracker!r}, which is not installed: {how_to_install(tracker)}"


def _of_datasets(config: Config) -> Iterator[str]:
    sections = config.datasets
    for name, section in sections.items():
        yield from _unknown(DATASETS, name.partition(":")[0])
        for split in ("train", "eval"):
            key = f"datasets.{name}.vis_processor.{split}"
            yield from _of_processor(getattr(section.vis_processor, split), key)
    if sections:
        try:
            ratios = [section.sample_ratio for section in sections.values()]
            mixture_weights([1] * len(sections), ratios, list(sections))
        except ConfigError as error:
            yield str(error)
    if config.run.evaluate and all(section.valid_build_info == BuildInfo() for section in sections.values()):
        yield "run.evaluate is True, but no dataset has a valid_build_info: there is nothing to measure"


def _of_processor(processor: ProcessorConfig, key: str) -> Iterator[str]:
    for name in ("n_frms", "image_size"):
        value = getattr(processor, name)
        if value is not None and value < 1:
            yield f"{key}.{name} must be at least 1, but is {value}"
    if processor.video_reader is not None:
        try:
            check_video_reader(processor.video_reader)
        except ConfigError as error:
            yield f"{key}.video_reader: {error}"


def _unknown(registry: Registry[Any], name: str) -> Iterator[str]:
    try:
        registry.get(name)
    except ConfigError as error:
        yield str(error)
