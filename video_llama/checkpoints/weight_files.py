"""Open files of weights as mappings from name to tensor: read lazily, never trusted.

A file is memory-mapped, so names and shapes cost nothing, and a tensor is copied out when it is asked for. Pickles are
read by torch's restricted unpickler only; a file that would run code is refused.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from safetensors import SafetensorError, safe_open
from torch import Tensor

from video_llama.errors import CheckpointError, translate_foreign
from video_llama.model.precision import kept_dtype
from video_llama.utils.files import read_json_object

__all__ = ["FOLDER_FILES", "GatheredWeights", "TensorRef", "Weights", "converted_dtype", "open_weights"]

FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What a folder of weights holds one of, the preferred first."""

# Pages of a mapped file count as this process's memory once they are read. Past this many bytes, or past this part of
# a large file (mapping takes time, too), the file is mapped afresh.
RELEASE_AFTER_BYTES = 32 * 2**20
RELEASES_OF_A_FILE = 64

# Training code stores its OmegaConf configuration beside the weights. These classes hold data and nothing else.
_HARMLESS_CLASSES = (DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, dict, list, int)
_HARMLESS_GLOBALS: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _HARMLESS_CLASSES}
_HARMLESS_GLOBALS["typing.Any"] = Any


class Weights(Mapping[str, Tensor]):
    """Named tensors on disk; `weights[name]` reads one, as a copy.

    Args:
        path: the file or folder they come from.
        headers: name to a tensor on the meta device with the shape and dtype of the stored one.
    """

    def __init__(self, path: Path, headers: Mapping[str, Tensor]) -> None:
        self.path = path
        self._headers = headers

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of one tensor, converted on the way if asked; several threads may read at a time."""

    def header(self, name: str) -> Tensor:
        """Return a tensor on the meta device with the shape and dtype of the stored one; nothing is read."""
        return self._headers[name]

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.path

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor is stored, and under which name."""

    weights: Weights
    name: str

    @property
    def header(self) -> Tensor:
        """Return its shape and dtype, on the meta device."""
        return self.weights.header(self.name)

    @property
    def file(self) -> Path:
        """Return the file that holds it, also where the weights are in several files."""
        return self.weights.file_of(self.name)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy."""
        return self.weights.read(self.name, dtype)


class GatheredWeights(Weights):
    """Tensors of several files under new names.

    Args:
        path: the folder of the files.
        places: new name to where the tensor is stored.
    """

    def __init__(self, path: Path, places: Mapping[str, TensorRef]) -> None:
        super().__init__(path, {name: place.header for name, place in places.items()})
        self._places = places

    def file_of(self, name: str) -> Path:
        return self._places[name].file

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._places[name].read(dtype)


class _File(Weights):
    """One file. Its mapping is dropped and made again when much has been read through it."""

    def __init__(self, path: Path) -> None:
        _check_is_weights(path)
        self._mapped: dict[str, Tensor] | None = _map(path)
        super().__init__(path, {name: tensor.to("meta") for name, tensor in self._mapped.items()})
        # Pickles of old torch versions are no archives. They are in memory as a whole, so there is no mapping to drop.
        self._can_release = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        self._release_after = max(RELEASE_AFTER_BYTES, path.stat().st_size // RELEASES_OF_A_FILE)
        self._bytes_read = 0
        self._lock = threading.Lock()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        with self._lock:
            if self._mapped is None:
                self._mapped = _map(self.path)
            # A view keeps its mapping alive for as long as it is used.
            view = self._mapped[name]
            self._bytes_read += view.nbytes
            if self._can_release and self._bytes_read > self._release_after:
                self._mapped, self._bytes_read = None, 0
        # The slow part is outside the lock, so that several threads can read and convert at a time.
        return view.to(dtype=dtype, copy=True)


def converted_dtype(name: str, header: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a weight in a model of a precision: whole numbers, and what keeps more digits, differ."""
    if dtype is None or not header.is_floating_point():
        return header.dtype
    return kept_dtype(name, dtype)


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a `.pth`, `.bin` or `.safetensors` file, a shard index, or a folder of such files.

    Only names and shapes are read now. Of a training checkpoint with a `model` entry, that entry counts.

    Raises:
        CheckpointError: the file is absent, empty, cut off, a git-LFS pointer or a web page, would run code, or holds
            no tensors; or the folder holds no weights or not all of its shards.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: no weights in this folder; it should hold one of {', '.join(FOLDER_FILES)}")
        path = found[0]
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    return _File(path)


def _open_shards(index: Path) -> Weights:
    """Open the files that an index lists."""
    _check_is_weights(index)
    folder = index.parent
    file_names = read_json_object(index).get("weight_map")
    if not isinstance(file_names, dict) or not all(_is_in_folder(name) for name in file_names.values()):
        raise CheckpointError(f"{index}: not a table of weights and of files beside it; download it again")
    shards = sorted(set(file_names.values()))
    absent = [name for name in shards if not (folder / name).exists()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of the {len(shards)} files that {index.name} lists are missing: "
            f"{', '.join(absent)}; complete the download"
        )
    files = {name: _File(folder / name) for name in shards}
    # Check all names now, not when the tensor is read in the middle of loading.
    for name, shard in file_names.items():
        if name not in files[shard]:
            raise CheckpointError(f"{folder / shard}: {name} is not in it, though the index says so; download it again")
    return GatheredWeights(folder, {name: TensorRef(files[shard], name) for name, shard in file_names.items()})


def _is_in_folder(name: object) -> bool:
    """Whether a name from an index is that of a file in its folder: the index may be a stranger's."""
    return isinstance(name, str) and not os.path.isabs(name) and ".." not in Path(name).parts


def _check_is_weights(path: Path) -> None:
    """Refuse what is not a file of weights at all, for the reasons that occur in practice."""
    with translate_foreign(CheckpointError, path):
        # A pipe or a device would be waited for, or read, without an end.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: a folder, pipe or device, not a file of weights")
        with path.open("rb") as stream:
            start = stream.read(512)
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
    # The directory of a zip archive is at its end. A file that begins as an archive and has none was cut off.
    if start.startswith(b"PK") and not _is_archive(path):
        raise _cut_off(path, "no end of the archive")


def _map(path: Path) -> dict[str, Tensor]:
    tensors = _map_safetensors(path) if path.suffix == ".safetensors" else _map_pickle(path)
    if not tensors:
        raise CheckpointError(f"{path}: there are no weights in this file")
    return tensors


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    with translate_foreign(CheckpointError, path):
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            if re.search("not fully covered|header length|too small", str(error)):
                raise _cut_off(path, error) from error
            raise _not_weights(path) from error


def _map_pickle(path: Path) -> dict[str, Tensor]:
    content = _unpickle(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping from names to tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _unpickle(path: Path) -> Any:
    # Files of torch before 1.6 are no archives; they cannot be mapped, nor their globals listed.
    is_zip = _is_archive(path)
    unsafe: set[str] = set()
    if is_zip:
        with translate_foreign(CheckpointError, path):
            _check_archive(path)
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    refused = sorted(unsafe - _HARMLESS_GLOBALS.keys())
    if refused:
        raise _runs_code(path, ", ".join(refused))
    # Allow the known data classes for this one call only. torch refuses all other names.
    harmless: list[Any] = [(_HARMLESS_GLOBALS[name], name) for name in unsafe]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # Old files could not be checked before loading. The error message tells a refused name from damaged bytes.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise _runs_code(path, wanted[1]) from error
        if _calls(path):
            raise _runs_code(path, "a bare pickle") from error
        raise _not_weights(path) from error
    except (RuntimeError, EOFError) as error:
        raise _cut_off(path, error) from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, struct.error) as error:
        # Other bytes, read as instructions.
        raise _not_weights(path) from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # Python raises this for some damaged ones.
        return True


def _check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more than it has bytes: torch stores its members as they are."""
    with zipfile.ZipFile(path) as archive:
        packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{path}: {packed[0]} in it is compressed, as torch never does; download it again")


def _calls(path: Path) -> bool:
    """Return whether a file is a pickle that calls anything; it is scanned, never loaded."""
    calling = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE"}
    try:
        with path.open("rb") as file:
            return any(operation.name in calling for operation, _, _ in pickletools.genops(file))
    except (ValueError, MemoryError, OverflowError):
        # The bytes are no pickle, or claim a length that they do not have.
        return False


def _cut_off(path: Path, reason: object) -> CheckpointError:
    size, first_line = path.stat().st_size, str(reason).partition("\n")[0]
    return CheckpointError(
        f"{path}: cut off after {size:,} bytes ({first_line}); the download is incomplete, download it again"
    )


def _not_weights(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: not a file of weights, or a damaged one; download it again")


def _runs_code(path: Path, names: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused, because opening it would run code ({names}). If you trust where it comes from, "
        f"save its tensors alone: torch.save({{'model': <state dict>}}, ...)"
    )
