"""Load a whole model, from a path or from a configuration: both ways end in `_load`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from video_llama.checkpoints.adapters import base_of_adapter, is_adapter_folder, load_adapter, resolve_adapter
from video_llama.checkpoints.chosen_parts import chosen_part
from video_llama.checkpoints.hub import LANGUAGE_MODEL_PATTERNS, local_path, resolve_source
from video_llama.checkpoints.language_model import check_language_model, named_template
from video_llama.checkpoints.load import (
    build_processor,
    check_sizes,
    configured_config,
    load_model,
    original_config,
)
from video_llama.checkpoints.memory import build_skeleton, check_model_fits
from video_llama.checkpoints.original_layout import (
    OriginalFiles,
    configured_files,
    find_config,
    find_original_files,
    is_transformers_folder,
    is_whole_model,
    resolve_checkpoint,
)
from video_llama.checkpoints.quantization import quantization_config
from video_llama.checkpoints.saved_folder import read_saved_config, read_saved_processor
from video_llama.checkpoints.trained_run import TrainedRun, find_trained_run
from video_llama.checkpoints.weight_files import open_weights
from video_llama.config import ModelConfig
from video_llama.conversation import SeparatorStyle, conv_templates
from video_llama.errors import CheckpointError, ConfigError, translate_foreign
from video_llama.inference.cache import MAX_ITEMS
from video_llama.inference.engine import VideoLlama
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig
from video_llama.model.parts import trained_parts
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import end_token_ids
from video_llama.registry import MODELS, import_plugins
from video_llama.utils.devices import LESS_TO_LOAD, computing_on, resolve_device, resolve_dtype
from video_llama.utils.extras import require_extra

__all__ = ["build_model", "build_model_processor", "load_pretrained_model"]

logger = logging.getLogger(__name__)


@dataclass
class _Located:
    """What to load.

    Args:
        source: the files of the original layout, or a folder that `save_pretrained` wrote.
        config: of the model to build.
        template: the conversation template; None for the weights' own.
        trained: a checkpoint of a run that overrides weights of the folder.
        adapter: folder of a PEFT adapter.
    """

    source: OriginalFiles | Path
    config: VideoLlamaConfig
    template: str | None = None
    trained: Path | None = None
    adapter: Path | None = None


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
    merge_adapter: bool = False,
    allow_urls: bool = False,
) -> VideoLlama:
    """Load a model ready to answer.

    Args:
        model_path: a folder with the published files (or its `VL_*.pth`), a folder written by `save_pretrained`,
            a hub id of either, the output folder of a training run (or a checkpoint in it), or a folder of a PEFT
            adapter.
        model_base: the language model's folder or hub id, if it is not in the checkpoint's folder; for an adapter, the
            model that it was trained on (anything that `model_path` may be).
        model_name: name of a conversation template; with any other name the weights' own template is used.
        device: where to; by default a GPU if there is one.
        half: half precision where the device is good at it (see `resolve_dtype`); never float16 on a CPU.
        verbose: show progress bars and log what was loaded by part (logger `video_llama.checkpoints`, level INFO).
        audio: whether to build the audio branch; by default if the checkpoint has one.
        dtype: a precision by name, instead of `half`.
        load_in_8bit, load_in_4bit: quantize the language model with bitsandbytes; the branches stay as they are.
        device_map: how accelerate spreads the model over devices; `device` is then not used.
        attn_implementation: "eager", "sdpa" or "flash_attention_2" (of the language model; encoders use sdpa).
        merge_adapter: add an adapter to the weights, which then answer as fast as others.
        allow_urls: its processor downloads media that are http or https addresses.

    Raises:
        CheckpointError: a file is missing, damaged, unsafe, or does not fit; the message says which and what to do.
        ConfigError: settings that contradict each other, or weights larger than the device's memory.
        OutOfMemoryError: the device's memory was not enough after all.

    Example:
        >>> from video_llama import Chat, load_pretrained_model
        >>> chat = Chat(load_pretrained_model("checkpoints/Video-LLaMA-2-7B-Finetuned", device="cuda"))
    """
    target = resolve_device(device)
    options = _loading_options(load_in_8bit, load_in_4bit, device_map, attn_implementation, target)
    with computing_on(target, LESS_TO_LOAD), contextlib.nullcontext() if verbose else _quiet():
        if verbose and model_name is not None and model_name not in conv_templates:
            logger.info("model_name %r is no conversation template; the weights' own is used", model_name)
        located = _locate(model_path, model_base, audio)
        if model_name in conv_templates:
            located.template = model_name
        # ImageBind's vision trunk is for training on images only and would take memory here.
        located.config.imagebind_vision_config = None
        if merge_adapter and located.adapter is None:
            raise ConfigError(f"{model_path}: there is no adapter to merge")
        model = _load(located, (dtype, target, half), options)
        if located.adapter is not None:
            load_adapter(model.model, located.adapter, merge=merge_adapter)
            model.eval()
    model.media_cache.max_items = MAX_ITEMS
    model.origin = located.source if isinstance(located.source, Path) else model_path
    if allow_urls:
        model.processor.media_processor = replace(model.processor.media_processor, allow_urls=True)
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
        options: further arguments of `load_model`, e.g. `trainable_dtype`.

    Raises:
        CheckpointError, ConfigError, OutOfMemoryError: as `load_pretrained_model`.

    Example:
        >>> from video_llama import build_model, load_config
        >>> model = build_model(load_config("eval_configs/video_llama_eval_withaudio.yaml").model)
    """
    target = resolve_device(device)
    with computing_on(target, LESS_TO_LOAD):
        in_8bit = config.load_in_8bit or config.low_resource
        if for_training:
            options["trained"] = trained_parts(config)
        options |= _loading_options(in_8bit, config.load_in_4bit, config.device_map, config.attn_implementation, target)
        located = _locate_configured(config, for_training)
        # The vision trunk is built on request only. The original layout does not give its sizes, so they are set here.
        built = located.config
        if not audio_from_images:
            built.imagebind_vision_config = None
        elif built.imagebind_vision_config is None and isinstance(located.source, OriginalFiles):
            built.imagebind_vision_config = ImageBindTrunkConfig.vision_huge()
        model = _load(located, (config.dtype, target, True), options)
        if located.adapter is not None:
            load_adapter(model.model, located.adapter, is_trainable=for_training)
        return model


def build_model_processor(config: ModelConfig) -> VideoLlamaProcessor:
    """Build the processor of the model that `build_model` would build, without any file of weights.

    Raises:
        CheckpointError, ConfigError: there is no tokenizer, or settings contradict each other.
    """
    use_audio = config.equip_audio_branch
    import_plugins(config.plugins, "model.plugins")
    frame_encoder, audio_encoder = chosen_part(config, "frame_encoder"), None
    if use_audio:
        audio_encoder = chosen_part(config, "audio_encoder")
    vit_ckpt = None if frame_encoder is not None else config.vit_ckpt
    sources = [local_path(source) for source in (config.ckpt, config.ckpt_2, vit_ckpt) if source]
    folders = [path if path.is_dir() else path.parent for path in sources]
    if config.ckpt is not None and is_transformers_folder(folders[0]):
        saved = read_saved_config(folders[0])
        check_sizes(config, saved, folders[0] / "config.json")
        return read_saved_processor(folders[0], saved, use_audio=use_audio)
    if config.llama_model is None:
        raise ConfigError("model.llama_model must name the language model's folder or hub id: its tokenizer is needed")
    no_weights = [pattern for pattern in LANGUAGE_MODEL_PATTERNS if pattern != "*.safetensors"]
    language_model = resolve_source(config.llama_model, "the language model (model.llama_model)", no_weights)
    # Only the sizes and the tokenizer are read.
    unread = Path()
    files = OriginalFiles(
        language_model,
        unread,
        unread,
        config=find_config(folders),
        frame_encoder=frame_encoder,
        audio_encoder=audio_encoder,
    )
    whole = configured_config(config, files)
    whole.use_audio = use_audio
    return build_processor(whole, language_model, named_template(config.model_type))


def _locate(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None, audio: bool | None
) -> _Located:
    """Find what is at a path, hub id or address."""
    run = find_trained_run(model_path)
    if run is not None and not (model_base is not None and is_adapter_folder(Path(model_path).expanduser())):
        return _locate_run(run, model_base, audio)
    path = resolve_checkpoint(model_path, audio)
    if is_adapter_folder(path):
        return _locate_adapter(path, model_base, audio, run)
    folder = path.parent if path.suffix in (".safetensors", ".json") else path
    if is_transformers_folder(folder):
        return _Located(folder, _saved_config(folder, audio))
    files = find_original_files(path, audio=audio, language_model=model_base)
    return _Located(files, original_config(files))


def _locate_run(run: TrainedRun, model_base: str | os.PathLike[str] | None, audio: bool | None) -> _Located:
    """Find what a training run and the files that its configuration names hold."""
    section = run.section
    starts_from_folder = run.base is not None and is_whole_model(run.base)
    if audio is not None:
        section.equip_audio_branch = audio
    elif section.ckpt_2 is None and section.equip_audio_branch and not starts_from_folder:
        logger.info("%s: the run had no weights of the audio branch; the model is built without it", run.checkpoint)
        section.equip_audio_branch = False
    if model_base is not None:
        section.llama_model = os.fspath(model_base)
    if not starts_from_folder:
        return _locate_configured(section)
    # The folder has everything; what trained replaces parts of it.
    is_replaced = str(run.checkpoint) in (section.ckpt, section.ckpt_2)
    section.ckpt, section.ckpt_2 = run.base, None
    located = _locate_configured(section)
    located.template = named_template(section.model_type)
    if is_replaced:
        located.trained = run.checkpoint
    return located


def _locate_adapter(
    folder: Path, model_base: str | os.PathLike[str] | None, audio: bool | None, run: TrainedRun | None
) -> _Located:
    """Find the model that an adapter belongs to.

    Raises:
        ConfigError: neither `model_base` nor the adapter's folder names it.
    """
    base = model_base or base_of_adapter(folder)
    if base is None:
        raise ConfigError(f"{folder}: a PEFT adapter; name the model that it was trained on by model_base")
    if run is not None and str(run.checkpoint) in (run.section.ckpt, run.section.ckpt_2):
        logger.warning(
            "%s: only the adapter is loaded. What trained beside it is in %s: load that, or %s, to have both",
            *(folder, run.checkpoint, folder.parent),
        )
    located = _locate(base, None, audio)
    located.adapter = folder
    return located


def _locate_configured(section: ModelConfig, for_training: bool = False) -> _Located:
    """Find what a model section names."""
    adapter = None
    import_plugins(section.plugins, "model.plugins")
    if section.adapter is not None:
        adapter = resolve_adapter(section.adapter)
    if section.ckpt is not None:
        wanted = "the checkpoint of the vision branch (model.ckpt)"
        path = resolve_checkpoint(section.ckpt, section.equip_audio_branch, wanted)
        if is_transformers_folder(path):
            config = _saved_config(path, section.equip_audio_branch)
            check_sizes(section, config, path / "config.json")
            return _Located(path, config, adapter=adapter)
    if section.ckpt is None and not for_training:
        raise ConfigError("model.ckpt must name the checkpoint of the vision branch (VL_*.pth) or a converted folder")
    if section.equip_audio_branch and section.ckpt_2 is None and not for_training:
        raise ConfigError(
            "model.ckpt_2 must name the checkpoint of the audio branch (AL_*.pth), or set equip_audio_branch: False"
        )
    files = configured_files(section)
    config = configured_config(section, files)
    return _Located(files, config, named_template(section.model_type), adapter=adapter)


def _saved_config(folder: Path, audio: bool | None) -> VideoLlamaConfig:
    config = read_saved_config(folder)
    if audio and not config.use_audio:
        raise CheckpointError(f"{folder}: the model was saved without its audio branch; load it with audio=False")
    if audio is not None:
        config.use_audio = audio
    return config


def _load(
    located: _Located, precision: tuple[str | torch.dtype, torch.device, bool], options: dict[str, Any]
) -> VideoLlama:
    """Load what was located but for its adapter; `precision` is what `resolve_dtype` takes before the model's width."""
    source, config, template = located.source, located.config, located.template
    if located.adapter is not None:
        require_extra("peft", "adapters")
    if isinstance(source, Path):
        overrides: dict[str, Any] = {"use_audio": config.use_audio}
        if template is not None:
            overrides["conv_template"] = template
        processor = read_saved_processor(source, config, **overrides)
    else:
        # Before the tokenizer, because one that does not fit the weights fails with less to say about why.
        check_language_model(open_weights(source.language_model), config.text_config)
        processor = build_processor(config, source.language_model, template)
    width = max(config.vision_config.hidden_size, config.get_text_config().hidden_size)
    dtype = resolve_dtype(*precision, width=width)
    # A model of shapes alone: it shows whether the weights will fit before any of them is read.
    where = f"the configuration of {getattr(source, 'language_model', source)}"
    with translate_foreign(CheckpointError, where, "it must be the one that was saved with the weights"):
        skeleton = build_skeleton(config)
    check_model_fits(
        config,
        dtype,
        device_map=options.get("device_map"),
        quantization_config=options.get("quantization_config"),
        skeleton=skeleton,
    )
    model = load_model(source, config, dtype, skeleton=skeleton, override=located.trained, **options)
    _end_at_template(model, processor)
    return VideoLlama(model, processor)


def _end_at_template(model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor) -> None:
    """End answers at what ends them in the tokenizer's chat template, too: some models have another token for EOS."""
    template = conv_templates[processor.conv_template]
    if template.sep_style is not SeparatorStyle.CHAT_TEMPLATE:
        return
    ends = end_token_ids(template, processor.tokenizer)
    known = model.generation_config.eos_token_id
    if known is not None:
        ends = [*([known] if isinstance(known, int) else known), *ends]
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log errors only and show no progress bars within a block."""
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


def _loading_options(
    load_in_8bit: bool, load_in_4bit: bool, device_map: Any, attn_implementation: str | None, device: torch.device
) -> dict[str, Any]:
    """Return keyword arguments of transformers' `from_pretrained`."""
    options: dict[str, Any] = {"device_map": {"": device} if device_map is None else device_map}
    if load_in_8bit or load_in_4bit:
        options["quantization_config"] = quantization_config(load_in_8bit, load_in_4bit, device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
        if attn_implementation.startswith("flash"):
            # It has no padding masks as the Q-Formers use them: it is the language model's alone.
            options["attn_implementation"] = {"text_config": attn_implementation}
    return options
