"""The captioners of a run: started where there is room, and started again when they are lost."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from video_llama.captioning.corpus import CorpusSettings
from video_llama.errors import ConfigError
from video_llama.integrations.ray.captioner import Captioner, Loaded, ModelSource
from video_llama.integrations.ray.cluster import count_places, has_gpus, num_cpus
from video_llama.integrations.ray.work import Work

__all__ = ["CaptionerPool", "Running"]

logger = logging.getLogger(__name__)

CALLS_AHEAD = 2
"""Calls that a captioner has: the one that it works at, and one whose clips are on their way to it."""

# So often in a row may captioners be lost before one of them has loaded its model.
_LOSSES = 3
_REFRESH_SECONDS = 2.0


@dataclass(eq=False)
class Running:
    """A captioner as the driver sees it.

    Args:
        node: where it is.
        actor: its handle.
        loading: the reference of its first call, until this has returned.
        calls: references of its calls in the order in which it works at them, with their work.
    """

    node: str
    actor: Any
    loading: Any
    calls: deque[tuple[Any, list[Work]]] = field(default_factory=deque)

    @property
    def is_testing(self) -> bool:
        """Whether it works at a clip that may have ended another captioner: it then gets nothing else."""
        return any(work.is_suspect for _, works in self.calls for work in works)

    def submit(self, works: Sequence[Work]) -> None:
        """Hand over decoded clips."""
        payloads = [work.payload for work in works]
        self.calls.append((self.actor.caption.remote([work.part for work in works], *payloads), list(works)))


class CaptionerPool:
    """One captioner for each GPU of the cluster; on a cluster without GPUs, or for the device cpu, one for each node.

    Nodes that join the cluster get theirs, too.
    """

    def __init__(self, ray: Any, source: ModelSource, settings: CorpusSettings, device: str | None) -> None:
        self._ray, self._source, self._settings = ray, source, settings
        self._uses_gpus = device != "cpu" and has_gpus(ray)
        if device not in (None, "cpu") and not self._uses_gpus:
            raise ConfigError(f"--device {device}: the cluster has no GPU; leave it out, or use --device cpu")
        self._running: list[Running] = []
        self._losses = 0
        self._looked = float("-inf")
        self.loaded: Loaded | None = None

    def __iter__(self) -> Iterator[Running]:
        return iter(list(self._running))

    def is_busy(self) -> bool:
        """Return whether a captioner has clips."""
        return any(running.calls for running in self._running)

    def ready(self) -> list[Running]:
        """Return those that have loaded their model."""
        return [running for running in self._running if running.loading is None]

    def is_there(self, running: Running) -> bool:
        """Return whether the node of a captioner is there, so that a lost captioner died by itself."""
        return running.node in count_places(self._ray, self._uses_gpus)

    def refresh(self) -> None:
        """Start captioners where there is room for more."""
        if time.monotonic() - self._looked < _REFRESH_SECONDS:
            return
        self._looked = time.monotonic()
        there = Counter(running.node for running in self._running)
        for node, places in count_places(self._ray, self._uses_gpus).items():
            for _ in range(places - there[node]):
                self._running.append(self._start(node))

    def _start(self, node: str) -> Running:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        device = "cuda" if self._uses_gpus else "cpu"
        # They ask for no CPU, or they could keep the last ones from the decoding that they wait for.
        options = {"num_cpus": 0, "num_gpus": int(self._uses_gpus), "max_restarts": 0}
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self._ray.remote(Captioner).options(**options, scheduling_strategy=place).remote()
        threads = int(os.environ.get("OMP_NUM_THREADS", num_cpus(self._ray, node)))
        return Running(node, actor, actor.load.remote(self._source, self._settings, device, threads))

    def note_loaded(self, running: Running, loaded: Loaded) -> None:
        """Note that a captioner has loaded its model."""
        running.loading, self.loaded, self._losses = None, loaded, 0

    def drop(self, running: Running) -> None:
        """Forget a captioner that is lost; the next `refresh` starts another one.

        Raises:
            ConfigError: several in a row were lost while they loaded their models.
        """
        self._running.remove(running)
        self._ray.kill(running.actor)
        self._looked = float("-inf")
        if running.loading is None:
            logger.warning("a captioner is lost; its clips go to others")
            return
        self._losses += self.is_there(running)
        if self._losses >= _LOSSES:
            raise ConfigError(
                f"{_LOSSES} captioners in a row were lost while they loaded the model: is there memory for it on each "
                "node? Ray's logs say more (/tmp/ray/session_latest/logs)"
            )
