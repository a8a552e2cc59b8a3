"""Clips that end processes, for the tests of Ray. Its workers import this file, so it loads little."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clip:
    """A file that is opened as `ShardMember` is."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __str__(self) -> str:
        return self.path

    @contextmanager
    def open(self) -> Iterator[str]:
        yield self.path


class Slow(Clip):
    """Takes seconds to open, so that a test can end the process that decodes it."""

    @contextmanager
    def open(self) -> Iterator[str]:
        time.sleep(4)
        yield self.path


class EndsDecoder(Clip):
    """Ends the process that decodes it."""

    @contextmanager
    def open(self) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield self.path


class EndsCaptioner(Clip):
    """Ends the process of an actor of Ray that receives it, and no other."""

    def __reduce__(self) -> tuple[object, ...]:
        return _arrive, (self.path,)


def _arrive(path: str) -> EndsCaptioner:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return EndsCaptioner(path)
