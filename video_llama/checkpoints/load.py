"""From files to a model: one way for every layout and every option of transformers' `from_pretrained`.

The files are matched against the model by name and shape first (`matching.py`). Then transformers builds the
model without memory and asks for the tensors one by one; each is copied from its file straight to where it stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from video_llama.checkpoints.hub import resolve_source
from video_llama.checkpoints.language_model import guess_conv_template, read_language_config
from video_llama.checkpoints.matching import log_report, match_original, match_transformers
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.checkpoints.quantization import prepare_quantized_layers, skip_branch_quantization
from video_llama.checkpoints.report import POSITION_TABLE, Found, LoadReport, Source, match_weights
from video_llama.checkpoints.weight_files import open_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    LANGUAGE_MODEL,
    PROJECTION,
    VIDEO_BRANCH,
    part_of,
)
from video_llama.errors import CheckpointError, ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.eva_vit import interpolate_position_table
from video_llama.model.precision import kept_dtype
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.audio_features import LogMelSettings
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer

__all__ = [
    "build_processor",
    "load_original",
    "load_trainable",
    "load_transformers",
    "original_config",
]

TRAINABLE_PARTS = (VIDEO_BRANCH, PROJECTION, AUDIO_BRANCH)


def original_config(files: OriginalFiles, **changes: Any) -> VideoLlamaConfig:
    """Sizes of the model that the files hold: those of the `config.json` beside them, else the published ones.

    The language model's part always comes from its own folder. The model hears if there are files for it.

    Args:
        files: where everything is.
        changes: fields of `VideoLlamaConfig` that shall differ.

    Raises:
        CheckpointError: a configuration file is missing or damaged.
    """
    sizes = VideoLlamaConfig.get_config_dict(files.config)[0] if files.config else {}
    text_config = read_language_config(files.language_model)
    of_other_vocabulary = {"image_token_id": None, "audio_token_id": None}
    hears = {"use_audio": files.imagebind is not None}
    return VideoLlamaConfig(**{**sizes, **of_other_vocabulary, **hears, "text_config": text_config, **changes})


def load_original(
    files: OriginalFiles,
    *,
    config: VideoLlamaConfig | None = None,
    dtype: torch.dtype | None = None,
    trainable_dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoLlamaForConditionalGeneration:
    """Load a checkpoint in the original layout.

    Args:
        files: where everything is.
        config: the model to build; `original_config(files)` by default. Its image size may differ from the
            checkpoint's: the position table is interpolated.
        dtype: of all parameters; that of the language model's files by default.
        trainable_dtype: of the parts that train, if it shall differ; their weights are not rounded on the way.
        options: `device_map`, `attn_implementation`, `quantization_config` and whatever else transformers'
            `from_pretrained` takes. Quantisation leaves the branches alone.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
        ConfigError: the device map leaves weights on the disk, where these files cannot be read from piece by piece.
    """
    config = config or original_config(files)
    dtype = dtype or config.text_config.dtype or torch.float32
    report = match_original(files, config)
    with _without_second_report(), _disk_refused():
        model, info = VideoLlamaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=_stored_tensors(report.found, dtype, config),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported below, with the others
            output_loading_info=True,
            **skip_branch_quantization(options),
        )
    _check_language_model_is_whole(files.language_model, info)
    prepare_quantized_layers(model, for_training=trainable_dtype is not None)
    if trainable_dtype is not None:
        _reload_trainable(model, report, trainable_dtype)
    return model


def load_transformers(
    folder: Path,
    *,
    config: VideoLlamaConfig,
    dtype: torch.dtype,
    trainable_dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoLlamaForConditionalGeneration:
    """Load a folder that `save_pretrained` wrote, and be as strict about it as about the original's files.

    Args:
        folder: where `config.json` and the weights are.
        config: the model to build; it may leave out parts that the folder has.
        dtype: of all parameters.
        trainable_dtype, options: as for `load_original`.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the model.
    """
    is_quantised = getattr(config, "quantization_config", None) is not None  # such weights have names of their own
    report = LoadReport() if is_quantised else match_transformers(folder, config)
    source: Path | None = folder
    if options.get("quantization_config") is not None and not is_quantised:
        # transformers would keep all that it has read mapped until the end, four times what remains in 4 bit.
        found = report.found | _language_model_as_saved(folder, report)
        source, options["state_dict"] = None, _stored_tensors(found, dtype, config)
    model, info = VideoLlamaForConditionalGeneration.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are reported by name and part, before or below
        output_loading_info=True,
        **skip_branch_quantization(options),
    )
    _check_language_model_is_whole(folder, info)
    prepare_quantized_layers(model, for_training=trainable_dtype is not None)
    if is_quantised:
        for branch in (model.video_branch, model.audio_branch):
            if branch is not None:
                branch.to(dtype)  # beside quantised weights transformers keeps some others in float32
    if source is None and (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if trainable_dtype is not None:
        _reload_trainable(model, report, trainable_dtype)
    return model


def build_processor(
    config: VideoLlamaConfig, language_model: Path, conv_template: str | None = None
) -> VideoLlamaProcessor:
    """The processor of a model that has none saved with it.

    Args:
        config: the model's, for the sizes of pictures, sound and placeholders.
        language_model: folder with the tokenizer.
        conv_template: the conversation template; by default the one that belongs to the language model.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
        ConfigError: no such template, or a tokenizer with more ids than the language model.
    """
    mel_bins, mel_frames = config.audio_config.input_size
    log_mel = LogMelSettings(num_mel_bins=mel_bins, num_mel_frames=mel_frames)
    tokenizer = load_tokenizer(language_model)
    return VideoLlamaProcessor(
        tokenizer,
        config.image_token_id,
        config.audio_token_id,
        media_processor=MediaProcessor(image_size=config.vision_config.image_size, log_mel=log_mel),
        num_video_query_tokens=config.num_video_query_tokens,
        num_audio_query_tokens=config.num_audio_query_tokens,
        use_audio=config.use_audio,
        conv_template=conv_template or guess_conv_template(language_model, config.text_config, tokenizer),
    )


def load_trainable(model: VideoLlamaForConditionalGeneration, source: str | os.PathLike[str]) -> LoadReport:
    """Load a `VL_*.pth`, `AL_*.pth` or MiniGPT-4 projection into a model, in place.

    Args:
        model: keeps its dtype and device.
        source: path, address or hub id of the file.

    Returns:
        what was loaded, by part.

    Raises:
        CheckpointError: the file is damaged, has nothing for this model, has a part only in parts, or does not fit.
    """
    path = resolve_source(source, f"{VIDEO_BRANCH.file} or {AUDIO_BRANCH.file}")
    own = {name: tensor for name, tensor in model.state_dict().items() if part_of(name) in TRAINABLE_PARTS}
    report = match_weights(own, [Source(open_weights(path))])
    report.raise_for_problems(str(path))
    with torch.no_grad():
        for name, found in report.found.items():
            own[name].copy_(found.weights[found.name])
    log_report(report)
    return report


@dataclass(frozen=True)
class _StoredTensor:
    """A weight that is read when transformers slices it (`tensor[...]`), as it does with safetensors' own slices."""

    found: Found
    dtype: torch.dtype
    name: str
    num_patches: int

    def __getitem__(self, index: Any) -> Tensor:
        stored = self.found.weights.header(self.found.name).dtype
        dtype = kept_dtype(self.name, self.dtype) if stored.is_floating_point else stored
        tensor = self.found.weights.read(self.found.name, dtype)
        if self.name == POSITION_TABLE:
            tensor = interpolate_position_table(tensor, self.num_patches)
        return tensor[index]


def _stored_tensors(found: Mapping[str, Found], dtype: torch.dtype, config: VideoLlamaConfig) -> dict[str, Any]:
    """A `state_dict` of weights that are still on disk."""
    num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {name: _StoredTensor(weight, dtype, name, num_patches) for name, weight in found.items()}


def _language_model_as_saved(folder: Path, report: LoadReport) -> dict[str, Found]:
    """The weights that transformers renames and merges itself, which the report leaves to it."""
    weights = open_weights(folder)
    names = (name for name in weights if part_of(name) is LANGUAGE_MODEL and name not in report.found)
    return {name: Found(weights, name) for name in names}


@contextlib.contextmanager
def _without_second_report() -> Iterator[None]:
    """Ours has said what is untrained; transformers' warning lists the same by single parameters."""
    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(_drop)  # not by its level: with one set there, transformers says more
    try:
        yield
    finally:
        theirs.removeFilter(_drop)


@contextlib.contextmanager
def _disk_refused() -> Iterator[None]:
    """Say what to do where transformers would leave weights of the original's files on the disk."""
    try:
        yield
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise ConfigError(
            "device_map leaves weights on the disk, as only a folder in transformers' layout allows: convert the "
            "checkpoint first (scripts/convert_checkpoint.py), or let more of it lie on the CPU"
        ) from error


def _drop(record: logging.LogRecord) -> bool:
    return False


def _check_language_model_is_whole(folder: Path, info: Mapping[str, Any]) -> None:
    """What transformers could not place or fill, for the models it renames the weights of."""
    prefix = "language_model."
    missing = sorted(name.removeprefix(prefix) for name in info["missing_keys"] if name.startswith(prefix))
    misfits = sorted(str(entry[0]).removeprefix(prefix) for entry in info["mismatched_keys"])
    if missing or misfits:
        lacks = f"{len(missing)} weights are missing" if missing else f"{len(misfits)} weights have another shape"
        first = ", ".join((missing or misfits)[:3])
        raise CheckpointError(
            f"{folder}: {lacks} ({first}, …); config.json and weights may be of different models. "
            f"If transformers alone can load this folder, save it anew with its save_pretrained"
        )


def _reload_trainable(model: VideoLlamaForConditionalGeneration, report: LoadReport, dtype: torch.dtype) -> None:
    """Give the parts that train their own dtype, with values read anew so that none was rounded."""
    for name, parameter in model.named_parameters():
        if part_of(name) in TRAINABLE_PARTS:
            found = report.found.get(name)
            value = parameter.data if found is None else found.weights[found.name]
            parameter.data = value.to(device=parameter.device, dtype=dtype)
