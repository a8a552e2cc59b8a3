"""Work on a batch in parts, each on a thread of its own, instead of sharing out every single operation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["map_on_threads"]


def map_on_threads(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The same as `function(batch)`, the items of the batch shared out over torch's threads.

    Torch shares every operation out over its threads, which wait for each other at the end of each. Where items do
    not depend on each other, that waiting can be spared.

    Args:
        function: maps (items, ...) to (items, ...), each item by itself. Where gradients are recorded, or autocast or
            another mode of the caller's thread would see the operations, it is simply called.
        batch: (items, ...), on a CPU.

    Raises:
        Exception: whatever `function` raises.
    """
    threads = torch.get_num_threads()
    # As many for each; and with few such numbers there are few pools.
    workers = max(number for number in range(1, threads + 1) if threads % number == 0 and number <= max(len(batch), 1))
    if workers == 1 or _is_watched():
        return function(batch)
    inference = torch.is_inference_mode_enabled()

    def work(part: Tensor) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            return function(part)

    return torch.cat(list(_pool(workers, threads // workers).map(work, batch.tensor_split(workers))))


def _is_watched() -> bool:
    """Whether something that belongs to this thread alone takes part in its operations."""
    modes = getattr(torch._C, "_len_torch_dispatch_stack", int)()  # e.g. a FlopCounterMode
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or modes > 0


@lru_cache(maxsize=16)
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose own operations torch shares out over `threads`; kept, and their memory with them."""
    before = torch.get_num_threads()
    barrier = threading.Barrier(workers)
    pool = ThreadPoolExecutor(workers, "map_on_threads", initializer=_use_threads, initargs=(threads,))
    for started in [pool.submit(barrier.wait) for _ in range(workers)]:
        started.result()
    # A thread sets its own number, but also the one that threads begin with which never set theirs.
    torch.set_num_threads(before)
    return pool


def _use_threads(number: int) -> None:
    torch.get_num_threads()  # a thread's first operation would otherwise give it the common number again
    torch.set_num_threads(number)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is forked
    os.register_at_fork(after_in_child=_pool.cache_clear)
