"""Write a checkpoint in either layout from tensors that are read one file's worth at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from video_llama.checkpoints.original_layout import IMAGEBIND_FILE, QFORMER_FILE, VISION_FILE
from video_llama.checkpoints.report import Found
from video_llama.checkpoints.weight_files import Weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    LANGUAGE_MODEL,
    PROJECTION,
    QFORMER,
    VIDEO_BRANCH,
    VISION_ENCODER,
    Part,
    part_of,
    to_original_name,
)
from video_llama.errors import CheckpointError
from video_llama.model.precision import kept_dtype
from video_llama.utils.files import write_whole

__all__ = ["LANGUAGE_MODEL_FOLDER", "FoundWeights", "prepare_output_folder", "write_original_weights", "write_shards"]

LANGUAGE_MODEL_FOLDER = "language_model"

Advance = Callable[[int], object]


class FoundWeights(Weights):
    """Weights from several files under our names, as `match_original` finds them."""

    def __init__(self, path: Path, found: Mapping[str, Found]) -> None:
        super().__init__(path)
        self._found = found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def header(self, name: str) -> Tensor:
        found = self._found[name]
        return found.weights.header(found.name)

    def file_of(self, name: str) -> Path:
        return self._found[name].file

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        found = self._found[name]
        return found.weights.read(found.name, dtype)


def prepare_output_folder(path: str | os.PathLike[str]) -> Path:
    """An empty folder to write to.

    Raises:
        CheckpointError: there is something in it already.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already and is not empty; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        dtype: convert all numbers with a fraction, but for what keeps more digits (`kept_dtype`); None keeps every
            tensor's own.
        advance: called with the number of bytes of every tensor written.
    """
    headers = {name: _as_written(stored, weights.header(stored), dtype) for name, stored in names.items()}
    plan = split_torch_state_dict_into_shards(
        headers, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file_name, members in plan.filename_to_tensors.items():
        tensors = dict(_read_all(weights, {name: names[name] for name in members}, dtype, advance))
        write_whole(folder / file_name, partial(save_file, tensors, metadata={"format": "pt"}))
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_whole(folder / "model.safetensors.index.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_original_weights(
    weights: Weights,
    folder: Path,
    name: str,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write the weight files of the original layout (`original_files` lists them), the language model in shards.

    Args:
        weights: a whole model under our names.
        folder: an existing folder; the language model goes to `language_model` in it.
        name: what follows in the names of the trained files: `VL_{name}.pth`, `AL_{name}.pth`.
        max_shard_size, dtype, advance: as for `write_shards`. A `.pth` is written whole.
    """
    for file_name, parts, is_wrapped in (
        (VISION_FILE, (VISION_ENCODER,), False),
        (QFORMER_FILE, (QFORMER,), True),
        (f"VL_{name}.pth", (VIDEO_BRANCH, PROJECTION), True),
        (f"AL_{name}.pth", (AUDIO_BRANCH,), True),
        (IMAGEBIND_FILE, (AUDIO_ENCODER, IMAGEBIND_VISION), False),
    ):
        tensors = dict(_read_all(weights, _names_in_file(weights, parts), dtype, advance))
        if tensors:
            content = {"model": tensors} if is_wrapped else tensors
            write_whole(folder / file_name, partial(torch.save, content))
        del tensors
    language_model = folder / LANGUAGE_MODEL_FOLDER
    language_model.mkdir(exist_ok=True)
    names = _names_in_file(weights, (LANGUAGE_MODEL,))
    write_shards(weights, names, language_model, max_shard_size=max_shard_size, dtype=dtype, advance=advance)


def _names_in_file(weights: Iterable[str], parts: tuple[Part, ...]) -> dict[str, str]:
    """Original name, as the file has it, to our name."""
    ours = ((name, part_of(name)) for name in weights)
    return {
        (to_original_name(name) or name).removeprefix(part.file_prefix): name
        for name, part in ours
        if part in parts and part is not None
    }


def _read_all(
    weights: Weights, names: Mapping[str, str], dtype: torch.dtype | None, advance: Advance
) -> Iterator[tuple[str, Tensor]]:
    for name, stored in names.items():
        tensor = weights.read(stored, _as_written(stored, weights.header(stored), dtype).dtype).contiguous()
        advance(tensor.nbytes)
        yield name, tensor


def _as_written(name: str, header: Tensor, dtype: torch.dtype | None) -> Tensor:
    return header.to(kept_dtype(name, dtype)) if dtype is not None and header.is_floating_point() else header
