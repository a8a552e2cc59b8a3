"""The conversation of one visitor: its files, its chat, and how all of it is freed again."""

from __future__ import annotations

import logging
import mimetypes
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.demo.limits import Limits
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import MediaError, OutOfMemoryError, VideoLlamaError
from video_llama.inference.chat import Chat, Decoded, Turn, Upload
from video_llama.media.containers import limit_frames

__all__ = ["SESSION_ENDED", "Session", "SessionFile"]

logger = logging.getLogger(__name__)

SESSION_ENDED = "this conversation has ended, and its files are removed; load the page again"
BUSY = "the last request of this conversation is not finished yet; wait for it or stop it"
TOO_LITTLE_MEMORY = (
    "the server has too little memory for it; try again with fewer frames, a shorter conversation, fewer beams or a "
    "shorter answer"
)
# How long to wait for the current token of a stopped answer: a large model on a CPU takes a while.
_STOP_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class SessionFile:
    """A file of a conversation."""

    # The visitor's name for it.
    name: str
    kind: str
    # Where it was copied from, and the session's own copy.
    source: Path
    path: Path
    upload: Upload
    # Of the Q-Formers' attention; empty without frames or without audio.
    frame_shares: list[float]
    segment_shares: list[float]

    @property
    def key(self) -> str:
        """Return what the page calls the file: nobody can guess it, and no two files have the same."""
        return self.path.stem


class Session:
    """The files, questions and answers of one visitor.

    Every method that changes it fails with one clear error while another one runs.
    """

    def __init__(self, chat: Chat, folder: Path, limits: Limits) -> None:
        self.chat, self.folder, self.limits = chat, folder, limits
        self.last_used = time.monotonic()
        self.closed = False
        # Lets those who show an answer see that it was cleared meanwhile.
        self.times_cleared = 0
        self._files: dict[Upload, SessionFile] = {}
        # By identity: two turns with the same words are still two.
        self._settings: dict[int, dict[str, Any]] = {}
        self._busy = threading.Lock()
        self._stop = threading.Event()

    @property
    def turns(self) -> list[Turn]:
        """Return the conversation so far."""
        return self.chat.turns

    @property
    def media(self) -> list[SessionFile]:
        """Return the files of the conversation, in order."""
        return [self._files[upload] for turn in self.turns for upload in turn.uploads]

    @property
    def busy(self) -> bool:
        """Return whether a file is being read or an answer given."""
        return self._busy.locked()

    def file(self, upload: Upload) -> SessionFile:
        """Return what is known about an upload of a turn."""
        return self._files[upload]

    def settings(self, turn: Turn) -> dict[str, Any]:
        """Return the settings with which a turn was answered; nothing before that."""
        return self._settings.get(id(turn), {})

    def add(self, path: str | os.PathLike[str], name: str, *, num_frames: int | None, listen: bool) -> SessionFile:
        """Copy a file into the session, decode and encode it.

        Raises:
            VideoLlamaError: the file cannot be used; the message names the file as its owner does.
        """
        *_, file = self.adding(path, name, num_frames=num_frames, listen=listen)
        assert isinstance(file, SessionFile)
        return file

    def adding(
        self, path: str | os.PathLike[str], name: str, *, num_frames: int | None, listen: bool
    ) -> Iterator[str | SessionFile]:
        """Do as `add` in steps: yield what comes next, "decoding" and "encoding", and at last the file."""
        with self._working():
            if len(self.media) >= self.limits.media:
                advice = "remove a file or begin a new conversation"
                raise VideoLlamaError(f"limit reached: {self.limits.media} files in a conversation; {advice}")
            copy = self.folder / secrets.token_hex(16)
            upload: Upload | None = None
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
            except MediaError as error:
                # The copy has a random name, so the error names the file as its owner does.
                raise MediaError(name, error.reason, error.hint) from error
            except FileNotFoundError as error:
                raise MediaError(name, "the upload was lost", "upload it again") from error
            except Exception as error:
                raise _explained(error, f"{name} could not be loaded") from error
            finally:
                # After any failure, and when the visitor leaves between two steps, which closes this generator.
                if upload is None:
                    copy.unlink(missing_ok=True)
            shares = self._attention_shares(upload)
            file = SessionFile(name, kind, Path(path), copy, upload, shares["image"], shares["audio"])
            self._files[upload] = file
        yield file

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Ask and yield the answer as it grows; `stop` or closing the iterator ends it early."""
        question = self.limits.check_question(question)
        with self._working():
            self.chat.ask(question)
            yield from self._answer(options)

    def retry(self, question: str | None = None, **options: Any) -> Iterator[str]:
        """Answer the last question again, or another one in its place."""
        if question is not None:
            question = self.limits.check_question(question)
        with self._working():
            turn = self.last_question()
            turn.question = question or turn.question
            turn.answer = None
            yield from self._answer(options)

    def undo(self) -> str:
        """Take back the last question and return it; without one, the last file."""
        with self._working():
            if not self.turns:
                return ""
            turn = self.turns[-1]
            question = turn.question or ""
            # A turn has files and a question. The question is taken back first, then the files one by one.
            turn.question = turn.answer = None
            if not question and turn.uploads:
                self._remove(turn.uploads.pop())
            if not turn.uploads:
                self.chat.undo()
            return question

    def remove(self, key: str) -> None:
        """Remove one file, and free its memory; answers that were given about it stay.

        Raises:
            VideoLlamaError: the conversation has no such file.
        """
        with self._working():
            for number, turn in enumerate(self.turns):
                for upload in turn.uploads:
                    if self._files[upload].key == key:
                        turn.uploads.remove(upload)
                        self._remove(upload)
                        if not turn.uploads and turn.question is None:
                            del self.turns[number]
                        return
            raise VideoLlamaError("this file is not in the conversation any more")

    def clear(self) -> None:
        """Remove everything and free its memory and files; a running answer is stopped."""
        # Counted before the wait below, so that the running answer is not shown any longer.
        self.times_cleared += 1
        self.stop()
        if not self._busy.acquire(timeout=_STOP_SECONDS):
            raise VideoLlamaError(BUSY)
        try:
            self._free()
        finally:
            self._busy.release()

    def stop(self) -> None:
        """End the running answer after its current token."""
        self._stop.set()

    def close(self) -> None:
        """Free everything for good."""
        self.closed = True
        self.stop()
        # While a request runs, the end of it frees everything.
        if self._busy.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._busy.release()

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
            # `close` was called while this request ran, and left the freeing to it.
            if self.closed:
                self._free()
            self._busy.release()

    def _answer(self, options: dict[str, Any]) -> Iterator[str]:
        turn, text = self.last_question(), ""
        self._settings[id(turn)] = dict(options)
        pieces = self.chat.stream_answer(stop=self._stop, **options)
        try:
            for piece in pieces:
                text += piece
                yield text
                if self._stop.is_set():
                    break
        except Exception as error:
            # A question that cannot be answered must not stay in front of the next.
            turn.question = None
            raise _explained(error, "the question could not be answered") from error
        finally:
            # Ends the generation if it still runs.
            pieces.close()
        if not text:
            yield ""

    def last_question(self) -> Turn:
        """Return the turn whose question can be answered again.

        Raises:
            VideoLlamaError: there is no question, or a file was added after it.
        """
        if self.turns and self.turns[-1].question is not None:
            return self.turns[-1]
        if any(turn.question for turn in self.turns):
            raise VideoLlamaError("a file was added after the last question; ask about it, or undo it first")
        raise VideoLlamaError("nothing to answer again yet: ask a question first")

    def _decode(self, path: Path, kind: str, num_frames: int | None, listen: bool) -> Decoded:
        if kind == "image":
            return self.chat.decode_img(path)
        if kind == "audio":
            return self.chat.decode_audio(path)
        return self.chat.decode_video(path, num_frames=num_frames, listen=listen)

    def _attention_shares(self, upload: Upload) -> dict[str, list[float]]:
        assert isinstance(self.chat.model, SharedModel)
        shares: dict[str, list[float]] = {"image": [], "audio": []}
        for encoded in upload.encoded:
            shares[encoded.kind] = self.chat.model.shares(encoded)
        return shares

    def _remove(self, upload: Upload) -> None:
        self._files.pop(upload).path.unlink(missing_ok=True)

    def _free(self) -> None:
        self.chat.reset()
        self._settings.clear()
        for upload in list(self._files):
            self._remove(upload)
        if self.closed:
            shutil.rmtree(self.folder, ignore_errors=True)


def _link_or_copy(source: str | os.PathLike[str], copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:
        # A hard link needs one file system for both names.
        shutil.copyfile(source, copy)


def _served_suffix(name: str, kind: str) -> str:
    """Return a suffix with which a browser plays the file, never one with which it would run it."""
    suffix = Path(name).suffix.lower()
    media_type = mimetypes.guess_type(f"file{suffix}")[0] or ""
    if media_type.startswith(f"{kind}/") and "xml" not in media_type:
        return suffix
    return ""


def _explained(error: Exception, what: str) -> VideoLlamaError:
    """Return an error for the visitor: expected ones in full, others shortly, with the traceback in the log."""
    if isinstance(error, OutOfMemoryError):
        logger.warning("%s: %s", what, error)
        return VideoLlamaError(f"{what}: {TOO_LITTLE_MEMORY}")
    if isinstance(error, VideoLlamaError):
        return VideoLlamaError(str(error))
    logger.error("%s", what, exc_info=error)
    # Most likely of an option.
    if isinstance(error, ValueError):
        return VideoLlamaError(str(error))
    reason = str(error).strip().partition("\n")[0]
    return VideoLlamaError(f"{what}: {type(error).__name__}: {reason[:200]} (the server's log has more)")
