"""The conversation of one visitor: its files, its chat, and how all of it is freed again."""

from __future__ import annotations

import logging
import mimetypes
import os
import secrets
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.demo.limits import Limits
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import MediaError, OutOfMemoryError, VideoLlamaError
from video_llama.inference.chat import Chat, Decoded, Turn, Upload
from video_llama.media.containers import limit_frames

__all__ = ["SESSION_ENDED", "MediaItem", "Session"]

logger = logging.getLogger(__name__)

SESSION_ENDED = "this conversation has ended, and its files are removed; load the page again"
BUSY = "the last request of this conversation is not finished yet; wait for it or stop it"
_STOP_SECONDS = 30.0  # a token of a large model on a CPU takes a while


@dataclass(frozen=True, eq=False)
class MediaItem:
    """A file of a conversation.

    Attributes:
        name: what its owner calls it.
        kind: "video", "image" or "audio".
        source: where it was taken from.
        path: the session's own copy.
        upload: what the model saw and heard.
        frame_shares, segment_shares: of the Q-Formers' attention; empty where there was nothing to see or hear.
    """

    name: str
    kind: str
    source: Path
    path: Path
    upload: Upload
    frame_shares: list[float]
    segment_shares: list[float]


class Session:
    """What one visitor uploaded, asked and was told.

    Every method that changes it fails with one clear error while another one runs.
    """

    def __init__(self, chat: Chat, folder: Path, limits: Limits) -> None:
        self.chat = chat
        self.folder = folder
        self.limits = limits
        self.last_used = time.monotonic()
        self.closed = False
        self.times_cleared = 0
        """Whoever shows an answer looks whether it has been forgotten meanwhile."""
        self._items: dict[Upload, MediaItem] = {}
        self._busy = threading.Lock()
        self._stop = threading.Event()

    @property
    def turns(self) -> list[Turn]:
        """The conversation so far."""
        return self.chat.turns

    @property
    def media(self) -> list[MediaItem]:
        """The files of the conversation, in order."""
        return [self._items[upload] for turn in self.turns for upload in turn.uploads]

    def item(self, upload: Upload) -> MediaItem:
        """What is known about an upload of a turn."""
        return self._items[upload]

    def add(self, path: str | os.PathLike[str], name: str, *, num_frames: int | None, listen: bool) -> MediaItem:
        """Copy a file into the session, decode and encode it.

        Raises:
            VideoLlamaError: the file cannot be used; its message names the file as its owner does.
        """
        steps = self.adding(path, name, num_frames=num_frames, listen=listen)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                item: MediaItem = done.value
                return item

    def adding(
        self, path: str | os.PathLike[str], name: str, *, num_frames: int | None, listen: bool
    ) -> Generator[str, None, MediaItem]:
        """`add` in steps: yields what is done next, "decoding" and "encoding", and returns the file's entry."""
        with self._working(), _called(name):
            if len(self.media) >= self.limits.media:
                raise VideoLlamaError(f"a conversation holds {self.limits.media} files; clear it first")
            copy = self.folder / secrets.token_hex(16)
            is_kept = False
            try:
                yield "decoding"
                # Not around a yield: the steps of a generator may run in different threads and contexts.
                with limit_frames(self.limits.pixels):
                    kind = self.limits.check_file(path)
                    copy = copy.with_suffix(_served_suffix(name, kind))
                    _link_or_copy(path, copy)
                    decoded = self._decode(copy, kind, num_frames, listen)
                yield "encoding"
                upload = self.chat.add(decoded)
                is_kept = True
            except (MediaError, FileNotFoundError):
                raise  # told in the owner's words
            except Exception as error:
                raise _explained(error, f"{name} could not be taken in") from error
            finally:
                if not is_kept:
                    copy.unlink(missing_ok=True)
            item = MediaItem(name, kind, Path(path), copy, upload, *self._shares(upload))
            self._items[upload] = item
            return item

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Ask and yield the answer as it grows; `stop` or closing the iterator ends it early."""
        question = self.limits.check_question(question)
        with self._working():
            self.chat.ask(question)
            yield from self._answer(options)

    def retry(self, question: str | None = None, **options: Any) -> Iterator[str]:
        """Answer the last question again, or another one in its place."""
        checked = None if question is None else self.limits.check_question(question)
        with self._working():
            turn = self._last_question()
            turn.question = checked or turn.question
            turn.answer = None
            yield from self._answer(options)

    def undo(self) -> str:
        """Take back the last question and return it; without one, the last file."""
        with self._working():
            turn = self.turns[-1] if self.turns else Turn()
            question, turn.question, turn.answer = turn.question or "", None, None
            if not question and turn.uploads:
                self._forget(turn.uploads.pop())
            if not turn.uploads and self.turns:
                self.chat.undo()
            return question

    def clear(self) -> None:
        """Forget everything and free its memory and files; an answer that is being given is stopped."""
        self.times_cleared += 1
        self.stop()
        if not self._busy.acquire(timeout=_STOP_SECONDS):
            raise VideoLlamaError(BUSY)
        try:
            self._free()
        finally:
            self._busy.release()

    def stop(self) -> None:
        """End the answer that is being given after its current token."""
        self._stop.set()

    def close(self) -> None:
        """Free everything for good."""
        self.closed = True
        self.stop()
        if self._busy.acquire(blocking=False):  # otherwise whoever is at work frees it
            try:
                self._free()
            finally:
                self._busy.release()

    @property
    def busy(self) -> bool:
        """Whether a file is being read or an answer given."""
        return self._busy.locked()

    @contextmanager
    def _working(self) -> Iterator[None]:
        if self.closed:
            raise VideoLlamaError(SESSION_ENDED)
        if not self._busy.acquire(blocking=False):
            raise VideoLlamaError(BUSY)
        self._stop.clear()
        try:
            yield
        finally:
            self.last_used = time.monotonic()
            if self.closed:
                self._free()
            self._busy.release()

    def _answer(self, options: dict[str, Any]) -> Iterator[str]:
        turn, said = self._last_question(), ""
        pieces = self.chat.stream_answer(stop=self._stop, **options)
        try:
            for piece in pieces:
                said += piece
                yield said
                if self._stop.is_set():
                    break
        except Exception as error:
            turn.question = None  # a question that cannot be answered must not stand in the way of the next
            raise _explained(error, "the question could not be answered") from error
        finally:
            pieces.close()  # ends the generation if it still runs
        if not said:
            yield ""

    def _last_question(self) -> Turn:
        if any(turn.question for turn in self.turns) and self.turns[-1].question is None:
            raise VideoLlamaError("a file was added after the last question; ask about it, or undo it first")
        if not self.turns or self.turns[-1].question is None:
            raise VideoLlamaError("there is no question to answer again")
        return self.turns[-1]

    def _decode(self, path: Path, kind: str, num_frames: int | None, listen: bool) -> Decoded:
        if kind == "image":
            return self.chat.decode_img(path)
        if kind == "audio":
            return self.chat.decode_audio(path)
        frames = None if num_frames is None else max(1, min(num_frames, self.limits.frames))
        return self.chat.decode_video(path, num_frames=frames, listen=listen)

    def _shares(self, upload: Upload) -> tuple[list[float], list[float]]:
        found: dict[str, list[float]] = {"image": [], "audio": []}
        assert isinstance(self.chat.model, SharedModel)
        for encoded in upload.encoded:
            found[encoded.kind] = self.chat.model.shares(encoded)
        return found["image"], found["audio"]

    def _forget(self, upload: Upload) -> None:
        self._items.pop(upload).path.unlink(missing_ok=True)

    def _free(self) -> None:
        self.chat.reset()
        for upload in list(self._items):
            self._forget(upload)
        if self.closed:
            shutil.rmtree(self.folder, ignore_errors=True)


def _link_or_copy(source: str | os.PathLike[str], copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # another file system
        shutil.copyfile(source, copy)


def _served_suffix(name: str, kind: str) -> str:
    """The suffix under which a browser gets a file: one that makes it play it, never one that makes it run it."""
    suffix = Path(name).suffix.lower()
    media_type = mimetypes.guess_type(f"file{suffix}")[0] or ""
    return suffix if media_type.startswith(f"{kind}/") and "xml" not in media_type else ""


def _explained(error: Exception, what: str) -> VideoLlamaError:
    """For the visitor: errors that are meant for people as they are; others shortly, with all of it in the log."""
    if isinstance(error, OutOfMemoryError):
        logger.warning("%s: %s", what, error)
        return VideoLlamaError(
            f"{what}: the server has too little memory for it; try again with fewer frames, a shorter conversation, "
            "fewer beams or a shorter answer"
        )
    if isinstance(error, VideoLlamaError):
        return VideoLlamaError(str(error))
    logger.error("%s", what, exc_info=error)
    if isinstance(error, ValueError):  # of an option, most likely; a bug otherwise, which the log shows
        return VideoLlamaError(str(error))
    reason = str(error).strip().splitlines() or [""]
    return VideoLlamaError(f"{what}: {type(error).__name__}: {reason[0][:200]} (the server's log has more)")


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Let errors about a file name it as its owner does, not by its place on the server."""
    try:
        yield
    except MediaError as error:
        raise MediaError(name, error.reason, error.hint) from error
    except FileNotFoundError as error:
        raise MediaError(name, "the upload was lost", "upload it again") from error
