"""Write files whole or not at all, and make the folders that configurations name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from video_llama.errors import ConfigError

__all__ = ["INCOMPLETE", "make_folder", "sync", "write_whole"]

INCOMPLETE = ".incomplete"
"""Suffix of files in progress."""


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
    """Make a folder that a configuration names, unless it is there.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: the folder {path} cannot be made ({error.strerror})") from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
