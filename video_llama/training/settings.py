"""Find settings that make no sense or contradict each other, before anything loads; all are reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from video_llama.config import BuildInfo, Config, ProcessorConfig, find_out_of_range
from video_llama.data.mixture import mixture_weights
from video_llama.errors import ConfigError
from video_llama.media.decode import check_video_reader
from video_llama.model.parts import ADAPTERS, adapted_parts, trained_parts
from video_llama.registry import DATASETS, SCHEDULES, Registry
from video_llama.schema import FREEZING_KEYS
from video_llama.training.processes import mixed_precision, training_device
from video_llama.utils.extras import how_to_install, is_installed

__all__ = ["check_settings"]


def check_settings(config: Config) -> None:
    """Look for mistakes that the types of the settings allow.

    Raises:
        ConfigError: there are some; all are named.
    """
    mistakes = [*find_out_of_range(config), *_of_device(config), *_of_run(config)]
    mistakes += [*_of_parts(config), *_of_datasets(config)]
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def _of_device(config: Config) -> Iterator[str]:
    device = config.run.device
    if device is not None and ":" in device:
        yield f"run.device is a kind of device (cpu or cuda), not {device!r}: CUDA_VISIBLE_DEVICES chooses GPUs"
        return
    try:
        training_device(config.run)
    except ConfigError as error:
        yield f"run.device: {error}; without this key a run uses a GPU if there is one"
        return
    try:
        mixed_precision(config.run, config.model.dtype)
    except ConfigError as error:
        yield f"model.dtype: {error}"


def _of_run(config: Config) -> Iterator[str]:
    run = config.run
    # The number of batches of one pass over the data (null) is no multiple in general: its last step is smaller.
    if run.accum_grad_iters > 0 and (
        (run.iters_per_epoch or 0) % run.accum_grad_iters or run.save_freq % run.accum_grad_iters
    ):
        yield "run.iters_per_epoch and run.save_freq must be multiples of run.accum_grad_iters"
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
        elif LoggerType(tracker) not in [LoggerType.ALL, *get_available_trackers()]:
            # An error here, because accelerate would leave the tracker out silently.
            yield f"run.trackers names {tracker!r}, which is not installed: {how_to_install(tracker)}"


def _of_parts(config: Config) -> Iterator[str]:
    """Yield what is wrong with the choice of what trains."""
    run, section = config.run, config.model
    try:
        whole, adapted = trained_parts(section), adapted_parts(config.lora, section)
    except ConfigError as error:
        yield str(error)
        return
    has_adapters = bool(adapted) or section.adapter is not None
    if has_adapters and not is_installed("peft"):
        yield f"lora: peft is not installed: {how_to_install('peft')}"
    if adapted and section.adapter is not None:
        yield "choose one of lora.target, which begins new adapters, and model.adapter, which goes on with those there"
    for part, rate in run.part_lr.items():
        if not (rate >= 0 and math.isfinite(rate)):
            yield f"run.part_lr.{part} must be at least 0, but is {rate}"
        if part not in (*FREEZING_KEYS, ADAPTERS):
            yield f"run.part_lr names {part!r}; known: {', '.join((*FREEZING_KEYS, ADAPTERS))}"
        elif part not in whole and not (part == ADAPTERS and has_adapters):
            yield f"run.part_lr names {part}, which does not train (model.unfreeze, lora.target)"
    if run.part_lr and run.init_lr == 0:
        yield "run.init_lr must be more than 0 where run.part_lr is set: the rates of the parts go with its schedule"
    changing = sorted((whole | adapted) & {"frame_encoder", "frame_qformer"})
    if changing and config.features.dir is not None:
        yield f"features.dir keeps what frozen encoders return, but the {' and the '.join(changing)} would train"


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
    yield from _of_streams(config)
    if config.run.iters_per_epoch is None:
        for name, section in sections.items():
            if section.sample_ratio not in (None, 0, 1):
                yield (
                    f"datasets.{name}.sample_ratio is {section.sample_ratio}, but with run.iters_per_epoch: null every "
                    f"epoch takes each sample once: it may be 1, or 0 to leave the dataset out"
                )
    if all(section.valid_build_info == BuildInfo() for section in sections.values()):
        run = config.run
        keys = ("evaluate", "valid_freq", "early_stopping_patience", "load_best_model_at_end")
        for key in keys:
            if getattr(run, key):
                yield (
                    f"run.{key} is {getattr(run, key)}, but no dataset has a valid_build_info: there is nothing to "
                    f"measure"
                )


def _of_streams(config: Config) -> Iterator[str]:
    """Yield what a dataset of unknown length, read from its start on, cannot do."""
    for name, section in config.datasets.items():
        key = f"datasets.{name}.valid_build_info.streaming"
        if section.valid_build_info.streaming:
            yield f"{key}: samples of a validation split are drawn, which a stream cannot do; leave it out"
        if not section.build_info.streaming:
            continue
        key = f"datasets.{name}.build_info.streaming"
        if name.partition(":")[0] != "hf":
            yield f"{key}: only the dataset hf can be streamed"
        if config.run.iters_per_epoch is None:
            yield f"{key}: run.iters_per_epoch must be set, since the length of a stream is not known"
        if section.sample_ratio is None and len(config.datasets) > 1:
            yield f"{key}: sample_ratio must be set, since the length of a stream is not known"
        if config.features.dir is not None:
            yield f"{key}: features.dir caches files that are read again and again; leave one of them out"


def _of_processor(processor: ProcessorConfig, key: str) -> Iterator[str]:
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
