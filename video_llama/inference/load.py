"""Load a whole model, from a path or from a configuration: both ways end in the same loader."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from video_llama.checkpoints.fitting import check_model_fits
from video_llama.checkpoints.hub import LANGUAGE_MODEL_PATTERNS, resolve_source
from video_llama.checkpoints.language_model import check_language_model
from video_llama.checkpoints.load import build_processor, load_original, load_transformers, original_config
from video_llama.checkpoints.original_layout import (
    OriginalFiles,
    configured_files,
    find_config,
    find_original_files,
    is_transformers_folder,
    resolve_checkpoint,
)
from video_llama.checkpoints.quantization import quantization_config
from video_llama.checkpoints.sizes import check_sizes, sizes_to_set
from video_llama.checkpoints.trained_run import find_trained_run
from video_llama.checkpoints.weight_files import open_weights
from video_llama.config import ModelConfig
from video_llama.conversation import conv_templates
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.cache import MAX_ITEMS
from video_llama.inference.engine import VideoLlama
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.registry import MODELS
from video_llama.utils.devices import LESS_TO_LOAD, computing_on
from video_llama.utils.utils import resolve_device, resolve_dtype

__all__ = ["build_model", "build_model_processor", "load_pretrained_model"]

logger = logging.getLogger(__name__)

_Precision = Callable[..., torch.dtype]
"""`resolve_dtype`, all but the width of the model, which its files tell."""


def load_pretrained_model(
    model_path: str | os.PathLike[str],
    model_base: str | os.PathLike[str] | None = None,
    model_name: str | None = None,
    device: str | torch.device | None = None,
    half: bool = True,
    verbose: bool = True,
    *,
    audio: bool | None = None,
    dtype: str | torch.dtype = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> VideoLlama:
    """Load a model ready to answer.

    Args:
        model_path: a folder with the published files (or its `VL_*.pth`), a folder written by `save_pretrained`,
            a hub id of either, or the output folder of a training run (or a checkpoint in it).
        model_base: the language model's folder or hub id, if it is not in the checkpoint's folder.
        model_name: name of a conversation template; with any other name (scripts for the original pass the
            model's), the one that belongs to the weights.
        device: where to; by default a GPU if there is one.
        half: half precision where the device is good at it (see `resolve_dtype`); never float16 on a CPU.
        verbose: show progress bars and log what was loaded, by part (logger `video_llama.checkpoints`, level INFO).
        audio: whether to build the audio branch; by default if the checkpoint has one.
        dtype: a precision by name, stronger than `half`.
        load_in_8bit, load_in_4bit: quantise the language model with bitsandbytes; branches stay as they are.
        device_map: how accelerate spreads the model over devices; `device` is then not used.
        attn_implementation: "eager", "sdpa" or "flash_attention_2" (the language model's; encoders use sdpa).

    Raises:
        CheckpointError: a file is missing, damaged, unsafe, or does not fit; the message says which and what to do.
        ConfigError: settings that contradict each other, or weights larger than the device's memory.
        OutOfMemoryError: the device's memory was not enough after all.
    """
    target = resolve_device(device)
    options = _loading_options(load_in_8bit, load_in_4bit, device_map, attn_implementation, target)
    precision = partial(resolve_dtype, dtype, target, half)
    template = model_name if model_name in conv_templates else None
    with computing_on(target, LESS_TO_LOAD), contextlib.nullcontext() if verbose else _quiet():
        if model_name is not None and template is None:
            logger.info("model_name %r is no conversation template; the weights' own is used", model_name)
        model = _load_found(model_path, model_base, template, precision, audio, options)
    model.media_cache.max_items = MAX_ITEMS
    return model


@MODELS.register("video_llama")
def build_model(
    config: ModelConfig,
    *,
    device: str | torch.device | None = None,
    for_training: bool = False,
    audio_from_images: bool = False,
    **options: Any,
) -> VideoLlama:
    """Build the model of a configuration's model section.

    Args:
        config: the section.
        device: where to; by default a GPU if there is one.
        for_training: branches that no checkpoint is named for start untrained; otherwise that is an error.
        audio_from_images: build ImageBind's vision trunk too, to train the audio branch on images.
        options: further arguments of `load_original`, e.g. `trainable_dtype`.

    Raises:
        CheckpointError, ConfigError, OutOfMemoryError: as `load_pretrained_model`.
    """
    target = resolve_device(device)
    with computing_on(target, LESS_TO_LOAD):
        return _build_configured(config, target, for_training, audio_from_images, options)


def _build_configured(
    config: ModelConfig,
    target: torch.device,
    for_training: bool,
    audio_from_images: bool,
    options: dict[str, Any],
) -> VideoLlama:
    """The model of a model section, as its files have it."""
    precision = partial(resolve_dtype, config.dtype, target)
    in_8bit = config.load_in_8bit or config.low_resource
    options |= _loading_options(in_8bit, config.load_in_4bit, config.device_map, config.attn_implementation, target)
    hears, wanted = config.equip_audio_branch, "the checkpoint of the vision branch (model.ckpt)"
    path = None if config.ckpt is None else resolve_checkpoint(config.ckpt, hears, wanted)
    if path is not None and is_transformers_folder(path):
        check_sizes(config, VideoLlamaConfig.from_pretrained(path), path / "config.json")
        return _load_transformers(path, None, precision, hears, options, audio_from_images)
    if not for_training:
        _check_is_trained(config)
    files = configured_files(config)
    sizes = sizes_to_set(config, files)
    template = _template_name(config.model_type)
    return _load_original(files, template, precision, options, sizes, audio_from_images)


def build_model_processor(config: ModelConfig) -> VideoLlamaProcessor:
    """The processor of the model that `build_model` would build, without any file of weights.

    Raises:
        CheckpointError, ConfigError: there is no tokenizer, or settings contradict each other.
    """
    hears = config.equip_audio_branch
    sources = [Path(source).expanduser() for source in (config.ckpt, config.ckpt_2, config.vit_ckpt) if source]
    folders = [path if path.is_dir() else path.parent for path in sources]
    if config.ckpt is not None and is_transformers_folder(folders[0]):
        check_sizes(config, VideoLlamaConfig.from_pretrained(folders[0]), folders[0] / "config.json")
        return VideoLlamaProcessor.from_pretrained(folders[0], use_audio=hears)
    if config.llama_model is None:
        raise ConfigError("model.llama_model must name the language model's folder or hub id: its tokenizer is needed")
    no_weights = [pattern for pattern in LANGUAGE_MODEL_PATTERNS if pattern != "*.safetensors"]
    language_model = resolve_source(config.llama_model, "the language model (model.llama_model)", no_weights)
    sizes = find_config(folders)
    unread = Path()
    files = OriginalFiles(language_model, unread, unread, imagebind=unread if hears else None, config=sizes)
    whole = original_config(files, **sizes_to_set(config, files))
    return build_processor(whole, language_model, _template_name(config.model_type))


def _load_found(
    model_path: str | os.PathLike[str],
    model_base: str | os.PathLike[str] | None,
    template: str | None,
    precision: _Precision,
    audio: bool | None,
    options: dict[str, Any],
) -> VideoLlama:
    """Whatever lies at a path, hub id or address."""
    trained = find_trained_run(model_path)
    if trained is not None:
        return _load_trained_run(trained, model_base, template, precision, audio, options)
    path = resolve_checkpoint(model_path, audio)
    folder = path.parent if path.suffix in (".safetensors", ".json") else path
    if is_transformers_folder(folder):
        return _load_transformers(folder, template, precision, audio, options)
    files = find_original_files(path, audio=audio, language_model=model_base)
    return _load_original(files, template, precision, options)


def _load_trained_run(
    config: ModelConfig,
    model_base: str | os.PathLike[str] | None,
    template: str | None,
    precision: _Precision,
    audio: bool | None,
    options: dict[str, Any],
) -> VideoLlama:
    """What a training run wrote, with the other files that its configuration names."""
    if audio is not None:
        config.equip_audio_branch = audio
    if model_base is not None:
        config.llama_model = os.fspath(model_base)
    _check_is_trained(config)
    files = configured_files(config)
    sizes = sizes_to_set(config, files)
    return _load_original(files, template or _template_name(config.model_type), precision, options, sizes)


def _load_transformers(
    folder: Path,
    template: str | None,
    precision: _Precision,
    audio: bool | None,
    options: dict[str, Any],
    audio_from_images: bool = False,
) -> VideoLlama:
    config = VideoLlamaConfig.from_pretrained(folder)
    if audio and not config.use_audio:
        raise CheckpointError(f"{folder}: the model was saved without its audio branch, so it cannot hear")
    config.use_audio = config.use_audio if audio is None else audio
    if not audio_from_images:
        config.imagebind_vision_config = None
    overrides: dict[str, Any] = {"use_audio": config.use_audio}
    if template is not None:
        overrides["conv_template"] = template
    processor = VideoLlamaProcessor.from_pretrained(folder, **overrides)
    dtype = precision(width=_width(config))
    _check_fits(config, dtype, options)
    return VideoLlama(load_transformers(folder, config=config, dtype=dtype, **options), processor)


def _load_original(
    files: OriginalFiles,
    template: str | None,
    precision: _Precision,
    options: dict[str, Any],
    sizes: dict[str, Any] | None = None,
    audio_from_images: bool = False,
) -> VideoLlama:
    config = original_config(files, **(sizes or {}))
    if not audio_from_images:
        config.imagebind_vision_config = None
    elif config.imagebind_vision_config is None:
        config.imagebind_vision_config = ImageBindTrunkConfig.vision_huge()
    # First, because a tokenizer that does not fit the weights fails with less to say about why.
    check_language_model(open_weights(files.language_model), config.text_config)
    processor = build_processor(config, files.language_model, template)
    dtype = precision(width=_width(config))
    _check_fits(config, dtype, options)
    return VideoLlama(load_original(files, config=config, dtype=dtype, **options), processor)


def _width(config: VideoLlamaConfig) -> int:
    """The width of the widest part."""
    return max(config.vision_config.hidden_size, config.get_text_config().hidden_size)


def _check_fits(config: VideoLlamaConfig, dtype: torch.dtype, options: dict[str, Any]) -> None:
    quantization = options.get("quantization_config")
    check_model_fits(config, dtype, device_map=options.get("device_map"), quantization_config=quantization)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors, no progress bars."""
    package_logger = logging.getLogger("video_llama.checkpoints")
    level, had_bars = package_logger.level, transformers_logging.is_progress_bar_enabled()
    package_logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        package_logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _check_is_trained(config: ModelConfig) -> None:
    """A branch that no file is named for would answer at random."""
    if config.ckpt is None:
        raise ConfigError("model.ckpt must name the checkpoint of the vision branch (VL_*.pth) or a converted folder")
    if config.equip_audio_branch and config.ckpt_2 is None:
        raise ConfigError(
            "model.ckpt_2 must name the checkpoint of the audio branch (AL_*.pth), or set equip_audio_branch: False"
        )


def _template_name(model_type: str) -> str | None:
    """The template a `model_type` of the original asks for; None leaves it to the language model."""
    return {"pretrain_vicuna": "v1", "vicuna": "v1", "pretrain_llama_v2": "llama_2", "llama_v2": "llama_2"}.get(
        model_type
    )


def _loading_options(
    load_in_8bit: bool, load_in_4bit: bool, device_map: Any, attn_implementation: str | None, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of transformers' `from_pretrained`."""
    options: dict[str, Any] = {"device_map": device_map if device_map is not None else {"": device}}
    if load_in_8bit or load_in_4bit:
        options["quantization_config"] = quantization_config(load_in_8bit, load_in_4bit, device)
    if attn_implementation is not None:
        # Flash attention has no padding masks as the Q-Formers use them: it is the language model's alone.
        is_flash = attn_implementation.startswith("flash")
        options["attn_implementation"] = {"text_config": attn_implementation} if is_flash else attn_implementation
    return options
