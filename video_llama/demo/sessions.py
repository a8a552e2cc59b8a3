"""The conversations of all visitors: one for each, never shared, ended when nobody uses it any more."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

from video_llama.conversation import Conversation
from video_llama.demo.limits import Limits
from video_llama.demo.session import SESSION_ENDED, Session
from video_llama.demo.shared_model import SharedModel
from video_llama.demo.uploads import Uploads
from video_llama.errors import VideoLlamaError
from video_llama.inference.chat import Chat
from video_llama.inference.generation import GenerationOptions

__all__ = ["Sessions"]

logger = logging.getLogger(__name__)

_KEYS_REMEMBERED = 10_000


class Sessions:
    """The conversations of all visitors, by the key that the page makes up for each.

    Args:
        model: the model, or the promise of it while it is loading.
        folder: where files are kept: `uploads` as they come, and in `sessions` those of each session, in a folder that
            nobody can guess.
        limits: what visitors may do.
        template: of the conversations; by default the one that belongs to the weights.
        options: how answers are drawn, as far as a visitor does not choose otherwise.
        num_frames: frames to look at in a video unless a visitor chooses otherwise; None for the model's own number.
        listen: whether videos are listened to unless a visitor chooses otherwise.
    """

    def __init__(
        self,
        model: Future[SharedModel],
        folder: Path,
        *,
        limits: Limits | None = None,
        template: Conversation | None = None,
        options: GenerationOptions | None = None,
        num_frames: int | None = None,
        listen: bool = True,
    ) -> None:
        self.model = model
        self.uploads = Uploads(folder / "uploads")
        self.folder = folder / "sessions"
        self.limits = limits or Limits()
        self.num_frames, self.listen = num_frames, listen
        self._template, self._options = template, options
        self.num_ended = 0
        self._sessions: dict[str, Session] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()  # a request that waited too long must not revive one
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """The session of a visitor; a new one at the first call.

        Raises:
            VideoLlamaError: there are too many visitors, the session has ended, or the request names none.
        """
        if not key:
            raise VideoLlamaError("the request names no session; send a session_hash, as gradio_client does")
        model = self.model.result()
        self.end_idle()
        with self._lock:
            if key in self._ended:
                raise VideoLlamaError(SESSION_ENDED)
            if key not in self._sessions:
                self._make_room()
                folder = self.folder / secrets.token_hex(16)
                folder.mkdir(mode=0o700, parents=True)
                chat = Chat(model, self._template, options=self._options)
                self._sessions[key] = Session(chat, folder, self.limits)
            session = self._sessions[key]
            session.last_used = time.monotonic()
            return session

    def find(self, key: str | None) -> Session | None:
        """The session of a visitor, if there is one."""
        return self._sessions.get(key or "")

    def end(self, key: str | None) -> None:
        """Free a visitor's conversation and files; the key is not accepted again."""
        with self._lock:
            session = self._sessions.pop(key or "", None)
            self.num_ended += session is not None
            self._ended[key or ""] = None
            while len(self._ended) > _KEYS_REMEMBERED:
                self._ended.popitem(last=False)
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
        if len(self._sessions) < self.limits.sessions:
            return
        empty = [key for key, session in self._sessions.items() if not session.turns and not session.busy]
        if not empty:
            raise VideoLlamaError("too many people are here at the moment; try again in a few minutes")
        self._sessions.pop(empty[0]).close()
