"""Files of weights as mappings from name to tensor: read lazily, never trusted.

A file is memory-mapped, so its names and shapes cost nothing, and a tensor is copied out when it is asked
for. Pickles are read by torch's restricted unpickler only; a file that wants to run code is refused.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import struct
import threading
import zipfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from safetensors import SafetensorError, safe_open
from torch import Tensor

from video_llama.errors import CheckpointError

__all__ = ["FOLDER_FILES", "Weights", "open_weights"]

FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What a folder of weights holds one of, the preferred first."""

# Pages of a mapped file count as this process's memory once read; past this many, or past this part of a large
# file (mapping takes time too), the file is mapped afresh.
RELEASE_AFTER_BYTES = 32 * 2**20
RELEASES_OF_A_FILE = 64

# Training code stores its OmegaConf configuration beside the weights. These classes hold data and nothing else.
_HARMLESS_GLOBALS: dict[str, Any] = {
    "omegaconf.dictconfig.DictConfig": DictConfig,
    "omegaconf.listconfig.ListConfig": ListConfig,
    "omegaconf.base.ContainerMetadata": ContainerMetadata,
    "omegaconf.base.Metadata": Metadata,
    "omegaconf.nodes.AnyNode": AnyNode,
    "collections.defaultdict": defaultdict,
    "typing.Any": Any,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.int": int,
}


class Weights(Mapping[str, Tensor]):
    """Named tensors on disk; `weights[name]` reads one, as a copy.

    Args:
        path: the file or folder the names come from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def header(self, name: str) -> Tensor:
        """A tensor on the meta device with the shape and dtype of the stored one; nothing is read."""

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor, converted on the way if asked; several threads may read at a time."""

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)


class _File(Weights):
    """One file. Its mapping is dropped and made again when much has been read through it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _check_is_weights(path)
        self._mapped: dict[str, Tensor] | None = _map(path)
        self._headers = {name: tensor.to("meta") for name, tensor in self._mapped.items()}
        self._can_release = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        self._release_after = max(RELEASE_AFTER_BYTES, path.stat().st_size // RELEASES_OF_A_FILE)
        self._bytes_read = 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def header(self, name: str) -> Tensor:
        return self._headers[name]

    def file_of(self, name: str) -> Path:
        return self.path

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._view(name).to(dtype=dtype, copy=True)

    def _view(self, name: str) -> Tensor:
        """The mapped tensor; it keeps its mapping alive for as long as it is used."""
        with self._lock:
            if self._mapped is None:
                self._mapped = _map(self.path)
            view = self._mapped[name]
            self._bytes_read += view.nbytes
            if self._can_release and self._bytes_read > self._release_after:
                self._mapped, self._bytes_read = None, 0
        return view


class _Shards(Weights):
    """Several files and an index that says which holds what; a shard is opened when first needed."""

    def __init__(self, index: Path) -> None:
        super().__init__(index.parent)
        self._file_names = _read_index(index)
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        absent = sorted({name for name in self._file_names.values() if not (self.path / name).exists()})
        if absent:
            total = len(set(self._file_names.values()))
            raise CheckpointError(
                f"{self.path}: {len(absent)} of the {total} files that {index.name} lists are missing: "
                f"{', '.join(absent)}; complete the download"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_names)

    def __len__(self) -> int:
        return len(self._file_names)

    def header(self, name: str) -> Tensor:
        return self._file(name).header(name)

    def file_of(self, name: str) -> Path:
        return self.path / self._file_names[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._file(name).read(name, dtype)

    def _file(self, name: str) -> _File:
        file_name = self._file_names[name]
        with self._lock:
            if file_name not in self._files:
                self._files[file_name] = _File(self.path / file_name)
        file = self._files[file_name]
        if name not in file:
            raise CheckpointError(f"{file.path}: {name} is not in it, though the index says so; download it again")
        return file


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights in a `.pth`, `.bin` or `.safetensors` file, a shard index, or a folder of such files.

    Only names and shapes are read now. Of a training checkpoint with a `model` entry, that entry counts;
    optimizer, scaler and configuration are left alone.

    Raises:
        CheckpointError: the file is absent, empty, cut off, a git-LFS pointer or a web page, wants to run code,
            or holds no tensors; or the folder holds no weights or not all of its shards.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: no weights in this folder; it should hold one of {', '.join(FOLDER_FILES)}")
        path = found[0]
    return _Shards(path) if path.name.endswith(".index.json") else _File(path)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name."""
    _check_is_weights(index)
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index ({error!r}); download it again") from error


def _check_is_weights(path: Path) -> None:
    """Refuse what is no file of weights at all, for the reasons that occur in practice."""
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: a git-LFS pointer, not the file it stands for; run `git lfs pull` in its folder"
        )
    if start.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: a web page, not weights; the server answered with an error or a log-in page. Download it again"
        )
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(_cut_off(path))


def _cut_off(path: Path) -> str:
    return f"{path}: cut off after {path.stat().st_size:,} bytes; the download is incomplete, download it again"


def _no_weights(path: Path) -> str:
    return f"{path}: not a file of weights, or a damaged one; download it again"


def _map(path: Path) -> dict[str, Tensor]:
    tensors = _map_safetensors(path) if path.suffix == ".safetensors" else _map_pickle(path)
    if not tensors:
        raise CheckpointError(f"{path}: there are no weights in this file")
    return tensors


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        is_short = re.search("not fully covered|header length|too small", str(error))
        reason = _cut_off(path) if is_short else _no_weights(path)
        raise CheckpointError(f"{reason} ({error})") from error


def _map_pickle(path: Path) -> dict[str, Tensor]:
    content = _unpickle(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping from names to tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _unpickle(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)  # files of torch before 1.6 are not, and cannot be mapped
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if is_zip else set()
    refused = sorted(unsafe - _HARMLESS_GLOBALS.keys())
    if refused:
        raise CheckpointError(_wants_code(path, ", ".join(refused)))
    harmless: list[Any] = [(_HARMLESS_GLOBALS[name], name) for name in unsafe]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise CheckpointError(_wants_code(path, wanted[1])) from error
        raise CheckpointError(_wants_code(path, "a bare pickle") if _calls(path) else _no_weights(path)) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{_cut_off(path)} ({str(error).splitlines()[0]})") from error
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:  # bytes read as instructions
        raise CheckpointError(_no_weights(path)) from error


def _calls(path: Path) -> bool:
    """Whether a file is a pickle that calls anything; it is looked through, never opened."""
    calling = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE"}
    try:
        with path.open("rb") as file:
            return any(operation.name in calling for operation, _, _ in pickletools.genops(file))
    except ValueError:  # no pickle
        return False


def _wants_code(path: Path, names: str) -> str:
    return (
        f"{path}: refused, because opening it would run code ({names}). If you trust where it comes from, "
        f"save its tensors alone: torch.save({{'model': <state dict>}}, ...)"
    )
