"""Whether a folder of weights is what was written: checksums beside the files, and numbers that are finite."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from video_llama.checkpoints.original_layout import is_transformers_folder
from video_llama.checkpoints.saved_folder import read_saved_config, read_saved_processor
from video_llama.checkpoints.weight_files import open_weights
from video_llama.errors import CheckpointError, VideoLlamaError
from video_llama.utils.files import write_whole

__all__ = ["CHECKSUMS", "check_finite", "verify_folder", "write_checksums"]

CHECKSUMS = "SHA256SUMS"
"""The form is that of `sha256sum`, which can check it, too: `sha256sum -c SHA256SUMS`."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_CHUNK_BYTES = 1 << 22
_REDUCIBLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_checksums(folder: Path) -> None:
    """Write the checksum of every file of a folder beside them.

    Raises:
        OSError: a file cannot be read, or the checksums cannot be written.
    """
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    write_whole(folder / CHECKSUMS, lambda path: path.write_text("".join(lines), encoding="utf-8"))


def verify_folder(folder: Path) -> list[str]:
    """Return what is wrong with a folder of weights, a line for each problem; none if it is as it was written.

    Files are compared with the checksums beside them. Then all weights are read: they must be finite numbers, and
    settings and tokenizer of a folder in transformers' layout must fit them.
    """
    if not folder.is_dir():
        return [f"{folder}: not a folder"]
    problems = list(_differences(folder))
    # An adapter or a shard is a file of weights like any other; settings of a training run are none.
    others = ("optimizer.pt", "training_args.bin")
    weights = [path for path in _files(folder) if path.suffix in _WEIGHTS and path.name not in others]
    if not weights:
        problems.append(f"{folder}: no weights in this folder ({', '.join(sorted(_WEIGHTS))})")
    for path in weights:
        problems += _unusable_weights(path)
    if is_transformers_folder(folder):
        try:
            read_saved_processor(folder, read_saved_config(folder))
        except VideoLlamaError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def check_finite(model: nn.Module, source: object) -> None:
    """Refuse a model with weights that are no numbers: every answer would be empty, every loss NaN.

    Raises:
        CheckpointError: NaN or infinity in a weight; `source` says where it comes from.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.device.type != "meta"]
    # One flag for each weight: a GPU has computed them all by the time that the first is read.
    flags = [_is_finite(value) for _, value in named]
    bad = [name for (name, _), flag in zip(named, flags, strict=True) if not flag]
    if bad:
        raise CheckpointError(_not_finite(source, bad))


def _not_finite(source: object, names: list[str]) -> str:
    return (
        f"{source}: NaN or infinity in {len(names)} weights, the first is {names[0]}; download or convert it again, or "
        "load it in another precision (dtype)"
    )


def _is_finite(value: Tensor) -> Tensor:
    """Return a flag; true for what is no plain floating point."""
    if value.dtype not in _REDUCIBLE or not value.numel():
        return torch.ones((), dtype=torch.bool)
    # The least and the greatest value are NaN if there is one: this takes no memory, as a mask would.
    return torch.stack(torch.aminmax(value.detach())).isfinite().all()


def _differences(folder: Path) -> Iterator[str]:
    """Yield how the files differ from the checksums; nothing where there are none."""
    listing = folder / CHECKSUMS
    if not listing.is_file():
        return
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{listing}: cannot be read ({error})"
        return
    matches = [_LINE.fullmatch(line) for line in lines]
    listed = {match[2]: match[1] for match in matches if match is not None}
    if len(listed) < len(lines) or not lines:
        yield f"{listing}: damaged; it has lines that are no checksums, or none"
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(listed.keys() - there.keys()):
        yield f"{folder / name}: missing, but listed in {CHECKSUMS}"
    for name, path in there.items():
        # Notes and cards may be added; weights and settings that nobody listed may be another model's.
        if name not in listed and path.suffix in (*_WEIGHTS, ".json"):
            yield f"{path}: not listed in {CHECKSUMS}"
        elif name in listed and _digest(path) != listed[name]:
            yield f"{path}: changed since it was written, or damaged; copy or download it again"


def _unusable_weights(path: Path) -> Iterator[str]:
    try:
        weights = open_weights(path)
        bad = [name for name, value in weights.items() if not _is_finite(value)]
    except VideoLlamaError as error:
        yield str(error)
        return
    if bad:
        yield _not_finite(path, bad)


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder but the listing itself and what tools hide there."""
    found = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path.name != CHECKSUMS:
            found.append(path)
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
