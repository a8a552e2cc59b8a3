"""A process that decodes clips and does nothing else: both ends of it.

It is started by hand and not through `multiprocessing`, which would import the main script, and all that this
imports, into every process; a decoder needs a tenth of that memory. Questions and answers are pickled over its
standard input and output. It ends when its input does, so it never outlives its owner.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from video_llama.errors import MediaError
from video_llama.media.decode import ClipDecoder, Decoded
from video_llama.media.sources import describe_source, is_file
from video_llama.registry import VIDEO_READERS

__all__ = [
    "DECODE_SECONDS",
    "DecodeProcess",
    "ProcessDied",
    "TookTooLong",
    "decode_source",
    "home_of_reader",
    "pack_source",
    "serve",
]

DECODE_SECONDS = 600.0
"""Default time for one file or window. Real files take seconds; a network file system that hangs takes for ever."""

_START = (
    # Its owner ends it.
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from video_llama.inference.decode_process import serve; serve()"
)
# A process may have been killed for no fault of the clip.
_ATTEMPTS = 2
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class ProcessDied(Exception):
    """The process is no longer there: its decoder crashed, or it was killed."""


class TookTooLong(ProcessDied):
    """The process was ended, because it did not answer in time."""


class DecodeProcess:
    """Start, use and end one decoding process.

    Args:
        decoder: what the process does; its video reader's module is imported there.
        seconds: after which a process that has not answered is ended.
    """

    def __init__(self, decoder: ClipDecoder, seconds: float = DECODE_SECONDS) -> None:
        self._decoder = decoder
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def decode(self, packed_source: bytes, first: int) -> Decoded | None:
        """Return what the decoder makes of a pickled source; None if the process cannot unpickle it.

        Raises:
            ProcessDied: before it answered; the next call starts another one.
            TookTooLong: it did not answer in time, and was ended.
            RuntimeError: an error of the program, with the process's traceback.
        """
        is_late = threading.Event()
        try:
            process = self._running()
            _send(cast(IO[bytes], process.stdin), (packed_source, first))
            with _end_after(self._seconds, process, is_late):
                answer = pickle.load(cast(IO[bytes], process.stdout))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            # The process has closed its end of the pipe, perhaps in the middle of an answer.
            self._end()
            if is_late.is_set():
                raise TookTooLong from error
            raise ProcessDied from error
        if isinstance(answer, str):
            raise RuntimeError(f"while decoding: {answer}")
        return cast("Decoded | None", answer)

    def close(self) -> None:
        """End the process, whatever it is doing, for good."""
        self._is_closed = True
        self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            # `close` may come from another thread. After it, no new process may start.
            if self._is_closed:
                raise ProcessDied
            if self._process is None:
                self._process = self._start()
            return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _START, *sys.path]
        environment = {**os.environ, **_ONE_THREAD}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        _send(cast(IO[bytes], process.stdin), (self._decoder, home_of_reader(self._decoder)))
        return process

    def _end(self) -> None:
        with self._lock:
            # Two threads may come here: only one of them gets the process and ends it.
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@contextmanager
def _end_after(seconds: float, process: subprocess.Popen[bytes], is_late: threading.Event) -> Iterator[None]:
    """Kill a process that is still at work after some time: reading from it then fails."""

    def end() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def pack_source(source: Any) -> bytes | None:
    """Return what a decoding process is sent; None for a source that has to be read by its owner."""
    if not is_file(source):
        return None
    try:
        return pickle.dumps(os.fspath(source) if isinstance(source, os.PathLike) else source)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def decode_source(process: DecodeProcess, packed: bytes, source: Any, first: int) -> Decoded | None:
    """Return what a process makes of a source; the error, if the process crashes or takes too long with it.

    Args:
        process: where it is decoded.
        packed: the source from `pack_source`.
        source: the source itself, for the error.
        first: number of the first window to read.

    Returns:
        None if the process cannot unpickle it.
    """
    reason = "the process that decodes it crashes"
    for _ in range(_ATTEMPTS):
        try:
            return process.decode(packed, first)
        except TookTooLong:
            reason = "decoding it takes too long, or its file system does not answer"
            break
        except ProcessDied:
            continue
    # Say that this window is the last one, so that the rest of such a file is not tried.
    return first + 1, [MediaError(describe_source(source), reason)]


def home_of_reader(decoder: ClipDecoder) -> str:
    """Return the name of the module that registers the decoder's video reader.

    Raises:
        ConfigError: there is no such reader.
    """
    return str(VIDEO_READERS.get(decoder.video_reader).__module__)


def serve() -> None:
    """Answer questions until there are no more; this runs in the process."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a decoder prints must not get among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    questions = sys.stdin.buffer
    try:
        decoder, home = pickle.load(questions)
        importlib.import_module(home)
        while True:
            packed_source, first = pickle.load(questions)
            _send(answers, _answer(decoder, packed_source, first))
    except (EOFError, BrokenPipeError):
        # The owner is gone; flushing what it no longer reads would fail.
        os._exit(0)


def _answer(decoder: ClipDecoder, packed_source: bytes, first: int) -> Decoded | str | None:
    try:
        source = pickle.loads(packed_source)
    except (ImportError, AttributeError):
        # The source is of a class of the owner's main script, which is not imported here.
        return None
    try:
        return decoder(source, first)
    except Exception:
        # Sent to the owner, which raises it.
        return traceback.format_exc()


def _send(stream: IO[bytes], content: Any) -> None:
    # Pickle into memory first: an error while pickling must not leave half a message in the pipe.
    buffer = io.BytesIO()
    pickle.dump(content, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(buffer.getbuffer())
    stream.flush()
