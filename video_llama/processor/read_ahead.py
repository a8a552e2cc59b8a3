"""Decode ahead in worker processes, so that the model never waits and a file that crashes a decoder costs one clip."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from video_llama.errors import MediaError, VideoLlamaError
from video_llama.processor.clips import ClipReader, ClipSource, Window, describe_source, pack_windows, unpack_windows

__all__ = ["WindowRead", "read_ahead"]

_PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class WindowRead:
    """One window of one clip, or why it cannot be read.

    Args:
        key: of the clip.
        number: of the window.
        num_windows: that the clip has.
        window: what was read, or the error.
    """

    key: int
    number: int
    num_windows: int
    window: Window | VideoLlamaError


@dataclass(frozen=True)
class _Task:
    key: int
    source: ClipSource
    first: int = 0


def read_ahead(
    clips: Iterable[tuple[int, ClipSource]], reader: ClipReader, num_workers: int, num_ahead: int = 8
) -> Iterator[WindowRead]:
    """Read clips; with workers the results come as they are done, whatever the order of the clips.

    Args:
        clips: (key, source).
        reader: how a clip is read.
        num_workers: processes; 0 reads in this one.
        num_ahead: clips that are read or wait to be taken.
    """
    results = _read_here(clips, reader) if num_workers == 0 else _Pool(reader, num_workers, num_ahead).read(clips)
    for task, (num_windows, windows) in results:
        for offset, window in enumerate(windows):
            yield WindowRead(task.key, task.first + offset, num_windows, window)


_Result = tuple[_Task, tuple[int, list[Window | VideoLlamaError]]]


def _read_here(clips: Iterable[tuple[int, ClipSource]], reader: ClipReader) -> Iterator[_Result]:
    for key, source in clips:
        task: _Task | None = _Task(key, source)
        while task is not None:
            num_windows, windows = reader(task.source, task.first)
            yield task, (num_windows, windows)
            task = _rest(task, num_windows, len(windows))


def _rest(task: _Task, num_windows: int, num_read: int) -> _Task | None:
    first = task.first + num_read
    return _Task(task.key, task.source, first) if first < num_windows else None


class _Pool:
    """Worker processes that may die without taking the run with them."""

    def __init__(self, reader: ClipReader, num_workers: int, num_ahead: int) -> None:
        self._reader = reader
        self._num_workers, self._num_ahead = num_workers, max(num_ahead, num_workers)
        self._running: dict[Future[bytes], _Task] = {}
        self._pool = self._start(num_workers)

    def read(self, clips: Iterable[tuple[int, ClipSource]]) -> Iterator[_Result]:
        waiting: deque[_Task] = deque()  # the rest of what was begun
        fresh = (_Task(key, source) for key, source in clips)
        try:
            while True:
                while len(self._running) < self._num_ahead:
                    task = waiting.popleft() if waiting else next(fresh, None)
                    if task is None:
                        break
                    self._submit(task)
                if not self._running:
                    return
                for result in self._take():
                    yield result
                    task, (num_windows, windows) = result
                    rest = _rest(task, num_windows, len(windows))
                    if rest is not None:
                        waiting.append(rest)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, task: _Task) -> None:
        try:
            future = self._pool.submit(_read_packed, task.source, task.first)
        except BrokenProcessPool as error:  # it died since the last look; found out with the others
            future = Future()
            future.set_exception(error)
        self._running[future] = task

    def _take(self) -> list[_Result]:
        """What is done by now, at least one; in the order of its beginning."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            return self._recover()
        finished = [future for future in self._running if future in done]
        return [(self._running.pop(future), self._unpack(future.result())) for future in finished]

    def _recover(self) -> list[_Result]:
        """Start again after a worker died: what was under way is read once more, each clip by itself."""
        self._pool.shutdown(wait=True)
        results: list[_Result] = []
        for task in self._running.values():
            alone = self._start(1)
            try:
                results.append((task, self._unpack(alone.submit(_read_packed, task.source, task.first).result())))
            except BrokenProcessPool:
                error = MediaError(describe_source(task.source), "the process that decodes it crashes")
                results.append((task, (task.first + 1, [error])))
            finally:
                alone.shutdown(wait=True)
        self._running.clear()
        self._pool = self._start(self._num_workers)
        return results

    def _start(self, num_workers: int) -> ProcessPoolExecutor:
        # Forked where that is possible: workers begin at once and share the imported modules' memory.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        return ProcessPoolExecutor(num_workers, context, _begin, (self._reader,))

    def _unpack(self, packed: bytes) -> tuple[int, list[Window | VideoLlamaError]]:
        num_windows, windows = pickle.loads(packed)
        return num_windows, unpack_windows(windows, self._reader.media)


_reader: Any = None  # of a worker process


def _begin(reader: ClipReader) -> None:
    global _reader
    _reader = reader
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads the results ends the workers
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A pool whose owner was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _read_packed(source: ClipSource, first: int) -> bytes:
    """Pickled here: torch would pass tensors through shared memory, of which a container may have little."""
    num_windows, windows = _reader(source, first)
    return pickle.dumps((num_windows, pack_windows(windows)), protocol=pickle.HIGHEST_PROTOCOL)
