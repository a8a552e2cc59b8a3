"""Convert a checkpoint of one layout into the other; tensors are read one file's worth at a time."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from video_llama.checkpoints.language_model import check_language_model
from video_llama.checkpoints.original_layout import IMAGEBIND_FILE, QFORMER_FILE, VISION_FILE, OriginalFiles
from video_llama.checkpoints.report import match_checkpoint
from video_llama.checkpoints.weight_files import GatheredWeights, Weights, converted_dtype, open_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    LANGUAGE_MODEL,
    MODEL_PARTS,
    PROJECTION,
    QFORMER,
    VIDEO_BRANCH,
    VISION_ENCODER,
    Part,
    part_of,
    to_original_name,
)
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_configuration import AudioEncoderConfig, FrameEncoderConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer
from video_llama.utils.files import write_whole

__all__ = [
    "language_model_files",
    "open_original",
    "open_transformers_folder",
    "prepare_output_folder",
    "write_language_model",
    "write_original_folder",
    "write_shards",
    "write_transformers_folder",
]

LANGUAGE_MODEL_FOLDER = "language_model"

_WEIGHT_SUFFIXES = {".bin", ".safetensors", ".pth", ".pt", ".gguf", ".h5", ".msgpack"}

Advance = Callable[[int], object]


def open_original(files: OriginalFiles, config: VideoLlamaConfig) -> Weights:
    """Open a checkpoint in the original layout as one set of weights under our names.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
    """
    # Delta weights have the right names and shapes, so matching them would not notice: check the values first.
    check_language_model(open_weights(files.language_model), config.text_config)
    return GatheredWeights(files.language_model.parent, match_checkpoint(files, config).found)


def open_transformers_folder(folder: Path) -> Weights:
    """Open a folder that `save_pretrained` wrote as weights under our names.

    Raises:
        CheckpointError: files are missing or damaged, or hold names that are not ours.
    """
    weights = open_weights(folder)
    unknown = [name for name in weights if part_of(name) is None]
    if unknown:
        raise CheckpointError(f"{folder}: {len(unknown)} names are not Video-LLaMA's, the first is {unknown[0]}")
    return weights


def prepare_output_folder(path: str | os.PathLike[str]) -> Path:
    """Return an empty folder to write to.

    Raises:
        CheckpointError: there is something in it already.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already and is not empty; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        config, processor: of the model.
        folder: an existing folder.
        language_model_files: the language model's own folder; its configuration and tokenizer are kept in a subfolder,
            so that the way back restores them.
        dtype, options: as for `write_shards`.
    """
    write_shards(weights, {name: name for name in weights}, folder, dtype=dtype, **options)
    processor.save_pretrained(folder)
    if language_model_files is not None:
        (folder / LANGUAGE_MODEL_FOLDER).mkdir(exist_ok=True)
        _copy_small_files(language_model_files, folder / LANGUAGE_MODEL_FOLDER)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    # Change a copy, since the caller goes on with its own configuration.
    config = copy.deepcopy(config)
    config.architectures = [VideoLlamaForConditionalGeneration.__name__]
    config.dtype = dtype or config.text_config.dtype
    # A path of this machine, and no use elsewhere.
    config.text_config.name_or_path = ""
    # Last: without it the folder is not taken for a model.
    config.save_pretrained(folder)


def language_model_files(folder: Path, config: VideoLlamaConfig, scratch: Path) -> Path:
    """Return a folder with the configuration and tokenizer of a model's language model.

    Args:
        folder: written by `save_pretrained`; it has them in a subfolder if it was converted.
        config: of the whole model.
        scratch: an empty folder, to write them to otherwise.
    """
    kept = folder / LANGUAGE_MODEL_FOLDER
    if (kept / "config.json").exists():
        return kept
    config.text_config.save_pretrained(scratch)
    load_tokenizer(folder).save_pretrained(scratch)
    return scratch


def write_shards(
    weights: Weights,
    names: Mapping[str, str],
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write safetensors as transformers reads them: one file, or shards with an index.

    Never more than one shard is in memory. A file has its final name only when it is complete.

    Args:
        weights: where tensors are read from.
        names: name to write to name to read.
        folder: an existing folder.
        max_shard_size: bytes, or text such as "5GB".
        dtype: convert all floating-point numbers, except what keeps more digits (`kept_dtype`); None converts nothing.
        advance: called with the number of bytes of every tensor written.
    """
    # Plan the shards from headers alone, without reading a tensor. The headers get the dtype that will be written, so
    # that the planned sizes are those of the files.
    headers = {name: weights.header(stored) for name, stored in names.items()}
    headers = {name: header.to(converted_dtype(names[name], header, dtype)) for name, header in headers.items()}
    plan = split_torch_state_dict_into_shards(
        headers, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    # Read, write and free one shard before the next one is read.
    for file_name, members in plan.filename_to_tensors.items():
        tensors = dict(_read_all(weights, {name: names[name] for name in members}, dtype, advance))
        write_whole(folder / file_name, partial(save_file, tensors, metadata={"format": "pt"}))
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_whole(folder / "model.safetensors.index.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_original_folder(
    weights: Weights,
    config: VideoLlamaConfig,
    folder: Path,
    *,
    language_model_files: Path,
    name: str,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write a folder in the original layout (`original_layout.py` lists its files).

    Of ImageBind only the parts that the model has are written, which the original itself would not load.

    Raises:
        CheckpointError: the model has parts that the original does not know.

    Args:
        weights: under our names.
        config: of the model; a copy goes beside the weights, for sizes that are not the published ones.
        folder: an existing folder.
        language_model_files: a folder with the language model's configuration and tokenizer.
        name: what follows in the names of the trained files: `VL_{name}.pth`, `AL_{name}.pth`.
        dtype, max_shard_size, advance: as for `write_shards`; a `.pth` is written whole.
    """
    _check_original_holds(config)
    # By part, the original's name as the file has it to our name.
    names: dict[Part, dict[str, str]] = {part: {} for part in MODEL_PARTS}
    for ours in weights:
        part, original = part_of(ours), to_original_name(ours)
        if part is not None and original is not None:
            names[part][original.removeprefix(part.file_prefix)] = ours
    # As in the original, the video branch and its projection share a file, and so do both encoders of ImageBind.
    files = {
        VISION_FILE: names[VISION_ENCODER],
        IMAGEBIND_FILE: names[AUDIO_ENCODER] | names[IMAGEBIND_VISION],
        QFORMER_FILE: names[QFORMER],
        f"VL_{name}.pth": names[VIDEO_BRANCH] | names[PROJECTION],
        f"AL_{name}.pth": names[AUDIO_BRANCH],
    }
    for file_name, members in files.items():
        tensors = dict(_read_all(weights, members, dtype, advance))
        if tensors:
            # The published files of the two encoders have no `model` entry.
            is_bare = file_name in (VISION_FILE, IMAGEBIND_FILE)
            write_whole(folder / file_name, partial(torch.save, tensors if is_bare else {"model": tensors}))
        del tensors
    target = folder / LANGUAGE_MODEL_FOLDER
    target.mkdir(exist_ok=True)
    write_shards(weights, names[LANGUAGE_MODEL], target, max_shard_size=max_shard_size, dtype=dtype, advance=advance)
    _copy_small_files(language_model_files, target)
    config.save_pretrained(folder)


def write_language_model(
    weights: Weights,
    config: VideoLlamaConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Write the language model alone, as a folder that `AutoModelForCausalLM` and other programs read.

    Args:
        weights: of the whole model, under our names.
        config, tokenizer: of the whole model.
        folder: an existing folder.
        dtype, options: as for `write_shards`.
    """
    prefix = "language_model."
    names = {name.removeprefix(prefix): name for name in weights if part_of(name) is LANGUAGE_MODEL}
    write_shards(weights, names, folder, dtype=dtype, **options)
    tokenizer.save_pretrained(folder)
    own = copy.deepcopy(config.text_config)
    # A folder that this package has saved names the class of the whole model alone.
    own.architectures = own.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[own.model_type]]
    # What the weights are, whatever they were when the language model was published; the largest one tells.
    largest = max(names.values(), key=lambda name: weights.header(name).numel())
    own.dtype = converted_dtype(largest, weights.header(largest), dtype)
    own.name_or_path = ""
    GenerationConfig.from_model_config(own).save_pretrained(folder)
    # Last: without it the folder is not taken for a model.
    own.save_pretrained(folder)


def _read_all(
    weights: Weights, names: Mapping[str, str], dtype: torch.dtype | None, advance: Advance
) -> Iterator[tuple[str, Tensor]]:
    for name, stored in names.items():
        tensor = weights.read(stored, converted_dtype(stored, weights.header(stored), dtype)).contiguous()
        advance(tensor.nbytes)
        yield name, tensor


def _check_original_holds(config: VideoLlamaConfig) -> None:
    """Refuse what the original has no names for."""
    others = [] if config.connector is None else [f"the connector {config.connector['name']!r}"]
    encoders = {"frame": config.vision_config}
    if config.use_audio:
        encoders["audio"] = config.audio_config
    for kind, encoder in encoders.items():
        if isinstance(encoder, (FrameEncoderConfig, AudioEncoderConfig)):
            others.append(f"the {kind} encoder {encoder.name!r}")
    if others:
        raise CheckpointError(f"the original layout cannot hold {' and '.join(others)}: keep the transformers layout")


def _copy_small_files(source: Path, target: Path) -> None:
    """Copy all files of a language model but its weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
