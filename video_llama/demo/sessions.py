"""The conversations of all visitors, one for each and never shared, and the uploads they are made from."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_llama.conversation import Conversation
from video_llama.demo.limits import Limits
from video_llama.demo.session import SESSION_ENDED, Session
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import VideoLlamaError
from video_llama.inference.chat import Chat
from video_llama.inference.generation import GenerationOptions

__all__ = ["Defaults", "Sessions", "Uploads", "stored_bytes"]

logger = logging.getLogger(__name__)

_MAX_ENDED_KEYS = 10_000
# How long an upload may wait for its turn, and how long it stays once a conversation has taken it.
_WAITING_SECONDS = 1800.0
_TAKEN_SECONDS = 60.0


@dataclass(frozen=True)
class Defaults:
    """How files are read and answers drawn unless a visitor chooses otherwise."""

    options: GenerationOptions = field(default_factory=GenerationOptions)
    # None for the template of the weights, and for as many frames as the model was trained with.
    template: Conversation | None = None
    num_frames: int | None = None
    # Whether the audio tracks of videos are used.
    listen: bool = True


class Sessions:
    """The conversations of all visitors, by the key that Gradio makes up for each page or client.

    Args:
        model: the model, or the promise of it while it is loading.
        folder: where files are kept: `uploads` as they come, and in `sessions` those of each conversation, in a folder
            whose name nobody can guess.
        limits: what visitors may do.
        defaults: what visitors need not choose.
    """

    def __init__(
        self,
        model: Future[SharedModel],
        folder: Path,
        limits: Limits | None = None,
        defaults: Defaults | None = None,
    ) -> None:
        self.model = model
        self.uploads, self.folder = Uploads(folder / "uploads"), folder / "sessions"
        self.limits, self.defaults = limits or Limits(), defaults or Defaults()
        self._sessions: dict[str, Session] = {}
        # A request that waited too long must not revive a conversation that has ended.
        self._ended: dict[str, None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """Return the session of a visitor, and open it at the first call.

        Raises:
            VideoLlamaError: there are too many visitors, the session has ended, or the request names none.
        """
        if not key:
            raise VideoLlamaError("the request names no session; send a session_hash, as gradio_client does")
        # Wait for the model outside of the lock, so that other visitors can leave meanwhile.
        model = self.model.result()
        self.end_idle()
        with self._lock:
            if key in self._ended:
                raise VideoLlamaError(SESSION_ENDED)
            if key not in self._sessions:
                self._make_room()
                folder = self.folder / secrets.token_hex(16)
                folder.mkdir(mode=0o700, parents=True)
                chat = Chat(model, self.defaults.template, options=self.defaults.options)
                self._sessions[key] = Session(chat, folder, self.limits)
            session = self._sessions[key]
            session.last_used = time.monotonic()
            return session

    def find(self, key: str | None) -> Session | None:
        """Return the session of a visitor, if there is one."""
        return self._sessions.get(key or "")

    def end(self, key: str | None) -> None:
        """Free a visitor's conversation and files; the key is not accepted again."""
        key = key or ""
        with self._lock:
            session = self._sessions.pop(key, None)
            self._ended[key] = None
            # A dictionary keeps its order, so the first key is the oldest.
            if len(self._ended) > _MAX_ENDED_KEYS:
                del self._ended[next(iter(self._ended))]
        if session is not None:
            session.close()

    def end_all(self) -> None:
        """Free everything, when the server stops."""
        for key in list(self._sessions):
            self.end(key)

    def end_idle(self) -> None:
        """End the sessions that nobody has used for `limits.idle_seconds`."""
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if not session.busy and now - session.last_used > self.limits.idle_seconds:
                logger.info("a session is ended: it was idle for %.0f s", now - session.last_used)
                self.end(key)

    def _make_room(self) -> None:
        """Close an empty session where there are too many."""
        if len(self._sessions) < self.limits.sessions:
            return
        empty = [key for key, session in self._sessions.items() if not session.turns and not session.busy]
        if not empty:
            raise VideoLlamaError("the demo is full at the moment; try again in a few minutes")
        self._sessions.pop(empty[0]).close()


class Uploads:
    """The folder in which Gradio puts uploads; no file outside of it is ever read for a visitor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, data: Any) -> tuple[Path, str]:
        """Return the path of an uploaded file and its owner's name for it.

        Args:
            data: what the browser or the client says about the file.

        Raises:
            VideoLlamaError: there is no file, or it is not one that was uploaded.
        """
        if isinstance(data, (list, tuple)) and len(data) == 1:
            data = data[0]
        if not isinstance(data, dict) or not isinstance(data.get("path"), str):
            raise VideoLlamaError("no file was uploaded")
        try:
            path = Path(data["path"]).resolve()
            is_upload, is_file = path.is_relative_to(self.folder.resolve()), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            # The path is too long, has a null character, or its links form a circle.
            raise VideoLlamaError("only files that were uploaded can be read") from error
        if not is_upload:
            raise VideoLlamaError("only files that were uploaded can be read")
        if not is_file:
            raise VideoLlamaError("the upload was lost; upload it again")
        # Let `sweep` remove it soon. Gradio replaces a file that is sent again by a new one, which waits its own time.
        old_enough = time.time() - _WAITING_SECONDS + _TAKEN_SECONDS
        os.utime(path, (old_enough, old_enough))
        name = Path(str(data.get("orig_name") or path.name)).name
        return path, name[:200] or path.name

    def sweep(self, now: float | None = None) -> None:
        """Remove what was taken a minute ago or has been there for half an hour, and empty folders."""
        now = now or time.time()
        # In reverse order the files of a folder come before the folder itself.
        for path in sorted(self.folder.rglob("*"), reverse=True):
            try:
                if path.is_dir():
                    # Fails, as it should, where a file is left.
                    path.rmdir()
                elif now - path.stat().st_mtime > _WAITING_SECONDS:
                    path.unlink()
            except OSError:
                continue


def stored_bytes(folder: Path) -> int:
    """Return the size of the files below a folder; a file under two names counts once."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:
                # The file was removed in the meantime.
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
