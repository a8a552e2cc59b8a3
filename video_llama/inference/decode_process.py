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
from typing import IO, Any, cast

from video_llama.media.decode import ClipDecoder, Decoded
from video_llama.registry import VIDEO_READERS

__all__ = ["DecodeProcess", "ProcessDied", "home_of_reader", "serve"]

_START = (
    # Its owner ends it.
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from video_llama.inference.decode_process import serve; serve()"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class ProcessDied(Exception):
    """The process is no longer there: its decoder crashed, or somebody killed it."""


class DecodeProcess:
    """The owner's end.

    Args:
        decoder: what the process does; its video reader's module is imported there.
    """

    def __init__(self, decoder: ClipDecoder) -> None:
        self._decoder = decoder
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def decode(self, packed_source: bytes, first: int) -> Decoded | None:
        """What the decoder gives for a pickled source; None if that cannot be unpickled there.

        Raises:
            ProcessDied: before it answered; the next call starts another one.
            RuntimeError: an error of the program, with the process's traceback.
        """
        try:
            process = self._running()
            _send(cast(IO[bytes], process.stdin), (packed_source, first))
            answer = pickle.load(cast(IO[bytes], process.stdout))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:  # its end was closed, maybe midway
            self._end()
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
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def home_of_reader(decoder: ClipDecoder) -> str:
    """The module that registers the decoder's video reader.

    Raises:
        ConfigError: there is no such reader.
    """
    return str(VIDEO_READERS.get(decoder.video_reader).__module__)


def serve() -> None:
    """The process's end: answer until there are no more questions."""
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
    except (ImportError, AttributeError):  # a class of the owner's main script
        return None
    try:
        return decoder(source, first)
    except Exception:  # sent to the owner, who raises it
        return traceback.format_exc()


def _send(stream: IO[bytes], content: Any) -> None:
    buffer = io.BytesIO()
    pickle.dump(content, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(buffer.getbuffer())
    stream.flush()
