"""Data loader workers that are there until the process they read for has ended.

A SIGTERM often goes to a whole process group or job (torchrun, Slurm, `timeout`). The run then saves where it stands,
for which it still needs the batches that its workers are reading.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["read_ahead"]


def read_ahead(
    dataset: Dataset[Any], indices: range, num_workers: int, prefetched: int, pin_memory: bool = False
) -> Iterator[Any]:
    """What a dataset holds, in the order of the indices.

    Args:
        dataset: its items are whole: they are neither collated nor shuffled.
        num_workers: processes that read; 0 reads in this one.
        prefetched: items that each worker reads ahead.
        pin_memory: call the items' own `pin_memory`, in a thread of this process if there are workers.
    """
    if not num_workers:
        return iter(DataLoader(dataset, batch_size=None, sampler=indices, pin_memory=pin_memory))
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=prefetched,
        pin_memory=pin_memory,
        worker_init_fn=_obey_the_parent_alone,
    )
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # workers start with this mask
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_parent_alone(worker: int) -> None:
    """End on a SIGTERM of the process that this one reads for, and on no other's."""
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
