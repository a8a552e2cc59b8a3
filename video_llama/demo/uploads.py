"""Files as the web server stores them when visitors send them, until a session has taken its own copy."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from video_llama.errors import VideoLlamaError

__all__ = ["Uploads", "stored_bytes"]

_TAKEN_SECONDS = 60.0  # somebody else may have sent the same file a moment ago, and wait for a turn
_WAITING_SECONDS = 1800.0  # how long an upload may wait for its turn


class Uploads:
    """The folder in which the server puts uploads, and how long they stay there.

    Args:
        folder: nothing else is ever read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: dict[tuple[Path, int], float] = {}  # place and inode: the same file may be sent again
        self._lock = threading.Lock()

    def find(self, data: Any) -> tuple[Path, str]:
        """The place of an uploaded file and the name its owner gave it.

        Args:
            data: what the browser or the client says about the file.

        Raises:
            VideoLlamaError: there is no file, or it is not one that was uploaded.
        """
        if isinstance(data, (list, tuple)) and len(data) == 1:
            data = data[0]
        if not isinstance(data, dict) or not isinstance(data.get("path"), str):
            raise VideoLlamaError("no file was uploaded")
        path = self._resolve(data["path"])
        name = data.get("orig_name") or path.name
        self._mark_taken(path)
        return path, Path(str(name)).name[:200] or path.name

    def sweep(self, now: float | None = None) -> None:
        """Remove what was taken a minute ago or lies there for half an hour, and folders left empty."""
        now = time.time() if now is None else now
        with self._lock:
            spent = {key for key, taken in self._taken.items() if now - taken > _TAKEN_SECONDS}
            for key in spent:
                del self._taken[key]
        for path in sorted(self.folder.rglob("*"), reverse=True):
            try:
                if path.is_dir():
                    path.rmdir()  # fails, as it should, where something is in it
                    continue
                status = path.stat()
                if (path, status.st_ino) in spent or now - status.st_mtime > _WAITING_SECONDS:
                    path.unlink()
            except OSError:
                continue

    def _resolve(self, text: str) -> Path:
        try:
            path, folder = Path(text).resolve(), self.folder.resolve()
            is_there = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a circle of links
            raise VideoLlamaError("only files that were uploaded can be read") from error
        if not path.is_relative_to(folder):
            raise VideoLlamaError("only files that were uploaded can be read")
        if not is_there:
            raise VideoLlamaError("the upload was lost; upload it again")
        return path

    def _mark_taken(self, path: Path) -> None:
        with self._lock:
            self._taken.setdefault((path, path.stat().st_ino), time.time())


def stored_bytes(folder: Path) -> int:
    """How much the files below a folder take; a file under two names counts once."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:  # removed meanwhile
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
