"""Which examples make which batch: arithmetic on seeds and counts only.

A batch is a pure function of the seed, its number and the rank, so that going on after a stop needs to know the
number alone, and data loader workers can take batches in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import ConfigError

__all__ = ["MixtureBatchSampler", "SampleRef", "mixture_weights"]

_CHOICE, _ORDER, _SAMPLE, _REPLACEMENT = range(4)  # streams of random numbers that must not meet


@dataclass(frozen=True)
class SampleRef:
    """One place in a batch.

    Args:
        dataset: number of the dataset.
        index: of the example in it.
        position: how many examples of the dataset came before, over all batches and ranks.
    """

    dataset: int
    index: int
    position: int


def mixture_weights(sizes: Sequence[int], ratios: Sequence[float | None], names: Sequence[str]) -> list[float]:
    """The share of the batches that each dataset gets: by `sample_ratio`, or by size if none has one.

    Raises:
        ConfigError: a ratio is negative, all are 0, or only some datasets have one.
    """
    given = [name for name, ratio in zip(names, ratios, strict=True) if ratio is not None]
    if given and len(given) < len(names):
        without = ", ".join(name for name in names if name not in given)
        raise ConfigError(f"sample_ratio must be set for all datasets or for none; it is missing for {without}")
    weights = [float(ratio) for ratio in ratios if ratio is not None] if given else [float(size) for size in sizes]
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"datasets.{name}.sample_ratio must be 0 or more, but is {weight}")
    if sum(weights) <= 0:
        raise ConfigError("every sample_ratio is 0: there is nothing to train on")
    return [weight / sum(weights) for weight in weights]


class MixtureBatchSampler:
    """What each batch of a run is made of.

    All examples of a batch come from one dataset, the same on every rank. A dataset is gone through in a new
    random order each time; a batch may end one round and begin the next. The ranks share each round: one process
    with batches of twice the size sees what two processes see.

    Args:
        sizes: number of examples of each dataset.
        shares: probability of each dataset, as `mixture_weights` returns them.
        batch_size: of one process.
        num_batches: of the whole run, for one process.
        seed: of everything.
        rank, world_size: of this process.
        block_sizes: for datasets stored in shards, how many neighbours to keep near each other: blocks are
            shuffled, and examples within a few blocks; 0 shuffles freely.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        block_sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.block_sizes = list(block_sizes) if block_sizes is not None else [0] * len(self.sizes)
        choices = np.random.default_rng([seed, _CHOICE]).choice(len(self.sizes), size=num_batches, p=shares)
        self._datasets = choices.astype(np.int32)
        self._turns = np.zeros(num_batches, dtype=np.int64)  # how many batches of the same dataset came before
        for dataset in range(len(self.sizes)):
            chosen = self._datasets == dataset
            self._turns[chosen] = np.arange(chosen.sum())
        self._order = self._remembered_order()

    def __len__(self) -> int:
        return len(self._datasets)

    def __getstate__(self) -> dict[str, Any]:
        # Data loader workers that are not forked get a pickle, and the memory of orders cannot be one.
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = self._remembered_order()

    def __getitem__(self, number: int) -> list[SampleRef]:
        """The slots of this rank's batch of that number."""
        dataset, turn = int(self._datasets[number]), int(self._turns[number])
        first = (turn * self.world_size + self.rank) * self.batch_size
        return [self._slot(dataset, position) for position in range(first, first + self.batch_size)]

    def sample_seed(self, slot: SampleRef) -> int:
        """The seed of all that is random about one sample: crops, prompts."""
        return self._draw_seed([self.seed, _SAMPLE, slot.dataset, slot.position])

    def replacement(self, slot: SampleRef, attempt: int) -> int:
        """Index of the example that takes the place of one that cannot be read, the same at every run."""
        rng = np.random.default_rng([self.seed, _REPLACEMENT, slot.dataset, slot.position, attempt])
        return int(rng.integers(self.sizes[slot.dataset]))

    def _slot(self, dataset: int, position: int) -> SampleRef:
        epoch, place = divmod(position, self.sizes[dataset])
        return SampleRef(dataset, int(self._order(dataset, epoch)[place]), position)

    def _remembered_order(self) -> Callable[[int, int], NDArray[np.int64]]:
        return lru_cache(maxsize=2 * len(self.sizes))(self._draw_order)

    def _draw_order(self, dataset: int, epoch: int) -> NDArray[np.int64]:
        size, block = self.sizes[dataset], self.block_sizes[dataset]
        rng = np.random.default_rng([self.seed, _ORDER, dataset, epoch])
        if not 0 < block < size:
            return rng.permutation(size)
        starts = rng.permutation(np.arange(0, size, block))
        order = np.concatenate([np.arange(start, min(start + block, size)) for start in starts])
        window = 8 * block
        return np.concatenate([rng.permutation(order[start : start + window]) for start in range(0, size, window)])

    @staticmethod
    def _draw_seed(entropy: list[int]) -> int:
        return int(np.random.default_rng(entropy).integers(2**62))
