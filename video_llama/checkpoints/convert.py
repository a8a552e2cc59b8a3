"""Turn a checkpoint of one layout into the other, without ever holding it in memory."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from video_llama.checkpoints.matching import match_original
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.checkpoints.saving import (
    LANGUAGE_MODEL_FOLDER,
    FoundWeights,
    write_original_weights,
    write_shards,
)
from video_llama.checkpoints.weight_files import Weights, open_weights
from video_llama.checkpoints.weight_mapping import part_of
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer

__all__ = [
    "language_model_files",
    "open_original",
    "open_transformers_folder",
    "write_original_folder",
    "write_transformers_folder",
]

_WEIGHT_SUFFIXES = {".bin", ".safetensors", ".pth", ".pt", ".gguf", ".h5", ".msgpack"}


def open_original(files: OriginalFiles, config: VideoLlamaConfig) -> Weights:
    """A checkpoint in the original layout as one set of weights under our names.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
    """
    return FoundWeights(files.language_model.parent, match_original(files, config).found)


def open_transformers_folder(folder: Path) -> Weights:
    """A folder that `save_pretrained` wrote as weights under our names.

    Raises:
        CheckpointError: files are missing or damaged, or hold names that are not ours.
    """
    weights = open_weights(folder)
    strangers = [name for name in weights if part_of(name) is None]
    if strangers:
        raise CheckpointError(f"{folder}: {len(strangers)} names are not Video-LLaMA's, the first is {strangers[0]}")
    return weights


def write_transformers_folder(
    weights: Weights,
    config: VideoLlamaConfig,
    processor: VideoLlamaProcessor,
    folder: Path,
    *,
    language_model_files: Path | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Write a folder that `from_pretrained` reads: weights in safetensors, configuration and processor.

    Args:
        weights: under our names.
        config: of the model.
        processor: of the model.
        folder: an existing folder.
        language_model_files: the language model's own folder; its configuration and tokenizer are kept in a
            subfolder, so that the way back restores them.
        dtype: convert the weights; None keeps every tensor's own.
        options: `max_shard_size` and `advance` of `write_shards`.
    """
    write_shards(weights, {name: name for name in weights}, folder, dtype=dtype, **options)
    processor.save_pretrained(folder)
    if language_model_files is not None:
        (folder / LANGUAGE_MODEL_FOLDER).mkdir(exist_ok=True)
        _copy_small_files(language_model_files, folder / LANGUAGE_MODEL_FOLDER)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    config = copy.deepcopy(config)
    config.architectures = [VideoLlamaForConditionalGeneration.__name__]
    config.dtype = dtype or config.text_config.dtype
    config.text_config.name_or_path = ""  # of this machine, and no use elsewhere
    config.save_pretrained(folder)  # last: without it the folder is not taken for a model


def write_original_folder(
    weights: Weights,
    config: VideoLlamaConfig,
    folder: Path,
    *,
    language_model_files: Path,
    name: str,
    **options: Any,
) -> None:
    """Write a folder in the original layout; projects that follow the original start from these files.

    Of ImageBind only the parts that the model has are written, which the original itself would not load.

    Args:
        weights: under our names.
        config: of the model; a copy goes beside the weights, for sizes that are not the published ones.
        folder: an existing folder.
        language_model_files: a folder with the language model's configuration and tokenizer.
        name: what follows in the names of the trained files: `VL_{name}.pth`.
        options: `max_shard_size`, `dtype` and `advance` of `write_original_weights`.
    """
    write_original_weights(weights, folder, name, **options)
    _copy_small_files(language_model_files, folder / LANGUAGE_MODEL_FOLDER)
    config.save_pretrained(folder)


def language_model_files(folder: Path, config: VideoLlamaConfig, scratch: Path) -> Path:
    """The language model's configuration and tokenizer of a folder that `save_pretrained` wrote.

    Args:
        folder: where they are kept if it was converted; else they are taken out of the model's own.
        config: of the whole model.
        scratch: an empty folder to put them into, if they must be taken out.
    """
    kept = folder / LANGUAGE_MODEL_FOLDER
    if (kept / "config.json").exists():
        return kept
    config.text_config.save_pretrained(scratch)
    load_tokenizer(folder).save_pretrained(scratch)
    return scratch


def _copy_small_files(source: Path, target: Path) -> None:
    """All files of a language model but its weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
