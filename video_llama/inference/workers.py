"""Decode in processes of their own, so that the model never waits and a file that crashes a decoder costs one clip."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from video_llama.errors import VideoLlamaError
from video_llama.inference.decode_process import (
    DECODE_SECONDS,
    DecodeProcess,
    decode_source,
    home_of_reader,
    pack_source,
)
from video_llama.processor.clips import ClipReader, ClipSource, Window

__all__ = ["WindowRead", "read_ahead"]


@dataclass(frozen=True)
class WindowRead:
    """One window of one clip, or why it cannot be read.

    Args:
        key: of the clip.
        number: of the window.
        num_windows: that the clip has.
        window: what was read, or the error.
        seconds: that reading it took, in whatever process.
    """

    key: int
    number: int
    num_windows: int
    window: Window | VideoLlamaError
    seconds: float = 0.0


@dataclass(frozen=True)
class _Task:
    key: int
    source: ClipSource
    first: int = 0


def read_ahead(
    clips: Iterable[tuple[int, ClipSource]],
    reader: ClipReader,
    num_workers: int,
    num_ahead: int = 8,
    seconds: float = DECODE_SECONDS,
) -> Iterator[WindowRead]:
    """Read clips; with workers the results come as they are done, whatever the order of the clips.

    Args:
        clips: (key, source).
        reader: how a clip is read.
        num_workers: processes; 0 reads in this one.
        num_ahead: clips that are read or wait to be taken.
        seconds: that a worker has for a clip or window; it is then ended, and the clip has an error.
    """
    if num_workers == 0:
        results = _read_here(clips, reader)
    else:
        results = _Pool(reader, num_workers, num_ahead, seconds).read(clips)
    for task, (num_windows, windows, seconds) in results:
        for offset, window in enumerate(windows):
            yield WindowRead(task.key, task.first + offset, num_windows, window, seconds / len(windows))


_Result = tuple[int, list[Window | VideoLlamaError], float]


def _read_here(clips: Iterable[tuple[int, ClipSource]], reader: ClipReader) -> Iterator[tuple[_Task, _Result]]:
    for key, source in clips:
        task: _Task | None = _Task(key, source)
        while task is not None:
            begun = time.perf_counter()
            num_windows, windows = reader(task.source, task.first)
            yield task, (num_windows, windows, time.perf_counter() - begun)
            task = _rest(task, num_windows, len(windows))


def _rest(task: _Task, num_windows: int, num_read: int) -> _Task | None:
    first = task.first + num_read
    return _Task(task.key, task.source, first) if first < num_windows else None


class _Pool:
    """Decoding processes, each with a thread of this one that waits for it and finishes what it has decoded."""

    def __init__(self, reader: ClipReader, num_workers: int, num_ahead: int, seconds: float) -> None:
        self._reader = reader
        self._num_ahead = max(num_ahead, num_workers)
        self._threads = ThreadPoolExecutor(num_workers, "video-llama-decode")
        self._processes = [DecodeProcess(reader.decoder, seconds) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._running: dict[Future[_Result], _Task] = {}
        # Which no other process can import.
        self._only_here = home_of_reader(reader.decoder) == "__main__"

    def read(self, clips: Iterable[tuple[int, ClipSource]]) -> Iterator[tuple[_Task, _Result]]:
        # The rest of what was begun.
        waiting: deque[_Task] = deque()
        fresh = (_Task(key, source) for key, source in clips)
        try:
            while True:
                # Keep a fixed number of tasks in work. The rest of a begun clip goes before a new clip, so that the
                # windows of one clip come out close together.
                while len(self._running) < self._num_ahead:
                    task = waiting.popleft() if waiting else next(fresh, None)
                    if task is None:
                        break
                    self._running[self._threads.submit(self._read, task)] = task
                if not self._running:
                    return
                for task, result in self._take():
                    yield task, result
                    num_windows, windows, _ = result
                    rest = _rest(task, num_windows, len(windows))
                    if rest is not None:
                        waiting.append(rest)
        finally:
            self._close()

    def _take(self) -> list[tuple[_Task, _Result]]:
        """Return the results that are complete, at least one, in the order in which they were begun."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        finished = [future for future in self._running if future in done]
        return [(self._running.pop(future), future.result()) for future in finished]

    def _read(self, task: _Task) -> _Result:
        packed = None if self._only_here else pack_source(task.source)
        # There are as many processes as threads, so one is always idle here.
        process = self._idle.get()
        begun = time.perf_counter()
        try:
            decoded = None if packed is None else decode_source(process, packed, task.source, task.first)
        finally:
            self._idle.put(process)
        windows: list[Window | VideoLlamaError]
        if decoded is None:
            # The source cannot be sent to a process: this thread reads it.
            num_windows, windows = self._reader(task.source, task.first)
        else:
            num_windows = decoded[0]
            windows = [self._reader.finish(window, task.source) for window in decoded[1]]
        return num_windows, windows, time.perf_counter() - begun

    def _close(self) -> None:
        """End everything; a process that is still decoding for nobody is killed."""
        # Cancel what has not begun, then end the processes. Their threads stop waiting and can be joined.
        for future in self._running:
            future.cancel()
        for process in self._processes:
            process.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
