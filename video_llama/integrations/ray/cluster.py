"""The cluster: connect to it, and what its nodes have."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from video_llama.errors import ConfigError
from video_llama.utils.extras import import_extra

__all__ = ["connect", "count_places", "has_gpus", "num_cpus"]


@contextmanager
def connect() -> Iterator[Any]:
    """Yield the module `ray`, connected: to RAY_ADDRESS, else to a cluster that runs on this machine, else to its own.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = import_extra("ray", "--launcher ray")
    # A program that uses Ray itself stays connected.
    if ray.is_initialized():
        yield ray
        return
    # Nothing is reported to anybody, unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The driver tells of what is lost, once.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"no cluster of Ray can be reached ({error}); start one with `ray start --head`, set RAY_ADDRESS, or unset "
            "it to use this machine alone"
        ) from error
    # Ray's own handler would end the program without a word.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _resources(ray: Any) -> dict[str, dict[str, float]]:
    """Return the resources of each node that is alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def has_gpus(ray: Any) -> bool:
    """Return whether a node has a GPU."""
    return any(resources.get("GPU", 0) >= 1 for resources in _resources(ray).values())


def num_cpus(ray: Any, node: str | None = None) -> int:
    """Return how many CPUs a node has, or all nodes together; at least 1."""
    resources = _resources(ray)
    nodes = resources.values() if node is None else [resources.get(node, {})]
    return max(1, int(sum(node.get("CPU", 0) for node in nodes)))


def count_places(ray: Any, uses_gpus: bool) -> dict[str, int]:
    """Return how many captioners each node has room for: one for each GPU, or one where GPUs are not used."""
    if not uses_gpus:
        return dict.fromkeys(_resources(ray), 1)
    return {node: int(resources.get("GPU", 0)) for node, resources in _resources(ray).items()}
