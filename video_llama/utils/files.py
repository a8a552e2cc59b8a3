"""Write files whole or not at all, make the folders that configurations name, and read settings of checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from video_llama.errors import CheckpointError, ConfigError, translate_foreign

__all__ = ["INCOMPLETE", "check_output_file", "make_folder", "read_json_object", "sync", "write_whole"]

INCOMPLETE = ".incomplete"
"""Suffix of files in progress."""

# A configuration has kilobytes, a tokenizer of 256 000 words 40 MB.
_MAX_SETTINGS_BYTES = 256 * 2**20


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Write to a temporary file and rename it. Several processes may write the same file; the last one wins.

    Args:
        path: the final name; its folder must be there.
        write: writes everything to the path it is given; if it raises, nothing is left behind.
        durable: wait until the content is on the disk, so that a power cut cannot leave an empty file.
    """
    # The process id keeps several writers of one file apart. The file is in the same folder, so that the rename cannot
    # leave half a file.
    in_progress = path.with_name(f".{path.name}.{os.getpid()}{INCOMPLETE}")
    try:
        write(in_progress)
        if durable:
            sync(in_progress)
        os.replace(in_progress, path)
    except BaseException:
        # The disk may be full: free what was written.
        in_progress.unlink(missing_ok=True)
        raise


def make_folder(path: Path, key: str) -> None:
    """Make a folder that a configuration or an option names, unless it is there.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: the folder {path} cannot be made ({error.strerror})") from error


def check_output_file(path: Path, option: str) -> None:
    """Make the folder of a file that is written when all work is done, and check now that the file can be written.

    Raises:
        ConfigError: it cannot be; `option` of the command line names it.
    """
    make_folder(path.parent, option)
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file")
    for place in (path, path.parent):
        if place.exists() and not os.access(place, os.W_OK):
            raise ConfigError(f"{option}: {place} cannot be written; name another file")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a checkpoint holds.

    Raises:
        CheckpointError: it is absent, no ordinary file, far too large, or not a JSON object.
    """
    with translate_foreign(CheckpointError, file):
        # A pipe or a device would be waited for without an end.
        if not file.is_file():
            there = "not a file"
            if not file.exists():
                there = "missing"
            raise CheckpointError(f"{file}: {there}; the folder is incomplete, download or convert it again")
        size = file.stat().st_size
        if size > _MAX_SETTINGS_BYTES:
            raise CheckpointError(f"{file}: {size:,} bytes are more than settings have; download it again")
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a JSON object; download it again")
    return content
