"""Workers that read ahead, and what signals do to them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from video_llama.data.batches import read_ahead


class SlowNumbers(Dataset[tuple[int, int]]):
    """Number N and the process that read it; the first one takes as long as a file is there."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock

    def __getitem__(self, index: int) -> tuple[int, int]:
        while self._lock.exists():
            time.sleep(0.01)
        return index, os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_come_in_the_order_of_their_indices(num_workers: int, tmp_path: Path) -> None:
    items = read_ahead(SlowNumbers(tmp_path / "no"), range(3, 9), num_workers, 1)
    assert [index for index, _ in items] == list(range(3, 9))


def test_a_worker_outlives_a_sigterm_of_others_but_not_of_the_process_it_reads_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    items = read_ahead(SlowNumbers(lock), range(4), 1, 1)
    (worker,) = items._workers  # type: ignore[attr-defined]
    if os.fork() == 0:  # a process that is not the worker's parent
        os.kill(worker.pid, signal.SIGTERM)
        os._exit(0)
    os.wait()
    lock.unlink()
    assert [index for index, _ in items] == [0, 1, 2, 3]
    assert next(iter(read_ahead(SlowNumbers(lock), range(4), 1, 1)))[1] != os.getpid()
    lock.touch()
    stuck = read_ahead(SlowNumbers(lock), range(4), 1, 1)
    (worker,) = stuck._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


def test_sigterm_still_reaches_this_process(tmp_path: Path) -> None:
    items = read_ahead(SlowNumbers(tmp_path / "no"), range(2), 1, 1)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(items)) == 2
