"""Choose the examples of each batch, by arithmetic on seeds and counts only.

A batch is a pure function of the seed, its number and the rank. So a run resumes from the number alone, and data
loader workers can take batches in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import ConfigError

__all__ = ["MixtureBatchSampler", "SampleRef", "mixture_weights"]

# Streams of random numbers that must not overlap.
_CHOICE, _ORDER, _SAMPLE, _REPLACEMENT = range(4)

_BATCHES_SORTED_TOGETHER = 50


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
    """Return the share of the batches of each dataset: by `sample_ratio`, or by size if none has one.

    Raises:
        ConfigError: a ratio is negative, all are 0, or only some datasets have one.
    """
    without = [name for name, ratio in zip(names, ratios, strict=True) if ratio is None]
    if without and len(without) < len(names):
        raise ConfigError(
            f"sample_ratio must be set for all datasets or for none; it is missing for {', '.join(without)}"
        )
    weights = [float(size) for size in sizes]
    if not without:
        weights = [float(ratio) for ratio in ratios if ratio is not None]
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"datasets.{name}.sample_ratio must be 0 or more, but is {weight}")
    if sum(weights) <= 0:
        raise ConfigError("every sample_ratio is 0: there is nothing to train on")
    return [weight / sum(weights) for weight in weights]


class MixtureBatchSampler:
    """Draws the batches of a run from several datasets.

    All examples of a batch are from one dataset, the same on every rank. Each pass over a dataset is in a new random
    order; a batch may end one pass and begin the next. The ranks share each pass: one process with batches of twice
    the size sees what two processes see.

    Args:
        sizes: number of examples of each dataset.
        shares: probability of each dataset, from `mixture_weights`.
        batch_size: of one process.
        num_batches: of the whole run, for one process.
        num_passes: instead of `num_batches`: how often to go through all the data. A pass takes each example of each
            dataset with a share once, whatever the shares are. The last batch of a dataset in a pass has fewer
            examples if need be, spread over the ranks; a rank that gets none of them has an empty batch.
        seed: of everything.
        rank, world_size: of this process.
        block_sizes: for datasets in shards, how many neighbours to keep near each other: blocks are shuffled, and
            examples within a few blocks; 0 shuffles freely.
        lengths: of the examples of each dataset whose batches hold examples of like length, so that little of them is
            padding; None for other datasets.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        *,
        batch_size: int,
        num_batches: int = 0,
        num_passes: int = 0,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        block_sizes: Sequence[int] | None = None,
        lengths: Sequence[NDArray[np.int64] | None] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.block_sizes = list(block_sizes or [0] * len(self.sizes))
        self._lengths = list(lengths or [None] * len(self.sizes))
        # Of each dataset, how many batches a pass has; 0 where batches are drawn and go on from pass to pass.
        self._per_pass = [0] * len(self.sizes)
        # Choose the dataset of every batch at once, so that any batch can be made without the ones before it.
        if num_passes:
            stride = batch_size * world_size
            self._per_pass = [-(-size // stride) * (share > 0) for size, share in zip(sizes, shares, strict=True)]
            one_pass = np.repeat(np.arange(len(self.sizes)), self._per_pass)
            orders = [
                np.random.default_rng([seed, _CHOICE, number]).permutation(one_pass) for number in range(num_passes)
            ]
            choices = np.concatenate(orders)
        else:
            choices = np.random.default_rng([seed, _CHOICE]).choice(len(self.sizes), size=num_batches, p=shares)
        self._datasets = choices.astype(np.int32)
        # How many batches of the same dataset came before.
        self._turns = np.zeros(len(choices), dtype=np.int64)
        for dataset in range(len(self.sizes)):
            chosen = self._datasets == dataset
            self._turns[chosen] = np.arange(chosen.sum())
        # The last order of each dataset, with the number of its pass.
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return len(self._datasets)

    def __getitem__(self, number: int) -> list[SampleRef]:
        """Return the samples of this rank's batch of that number."""
        dataset = int(self._datasets[number])
        return [self._sample(dataset, position) for position in self._positions(number, self.rank)]

    def turn(self, number: int) -> tuple[int, int]:
        """Return the dataset of a batch, and how many batches of it came before."""
        return int(self._datasets[number]), int(self._turns[number])

    def first_sample(self, number: int) -> SampleRef:
        """Return the first sample of a batch, over all ranks."""
        return self._sample(int(self._datasets[number]), self._positions(number, 0)[0])

    def _positions(self, number: int, rank: int) -> range:
        """Return the places that a rank's batch has in the dataset's sequence of examples."""
        dataset, turn = self.turn(number)
        stride = self.world_size * self.batch_size
        first, count = turn * stride, stride
        per_pass = self._per_pass[dataset]
        if per_pass:
            # The last batch of a pass ends with it.
            number_of_pass, turn = divmod(turn, per_pass)
            size = self.sizes[dataset]
            first = number_of_pass * size + turn * stride
            count = min(stride, size - turn * stride)
        # Ranks take neighbouring stretches, the first ones the longer ones.
        start, end = (-(-count * place // self.world_size) for place in (rank, rank + 1))
        return range(first + start, first + end)

    def sample_seed(self, ref: SampleRef) -> int:
        """Return the seed of all that is random about one sample: crops, prompts."""
        rng = np.random.default_rng([self.seed, _SAMPLE, ref.dataset, ref.position])
        return int(rng.integers(2**62))

    def replacement(self, ref: SampleRef, attempt: int) -> int:
        """Return the index of the example that replaces a bad one, the same in every run."""
        rng = np.random.default_rng([self.seed, _REPLACEMENT, ref.dataset, ref.position, attempt])
        return int(rng.integers(self.sizes[ref.dataset]))

    def _sample(self, dataset: int, position: int) -> SampleRef:
        # Positions only grow within a process, so the last order of each dataset is the only one worth keeping.
        epoch, place = divmod(position, self.sizes[dataset])
        if dataset not in self._orders or self._orders[dataset][0] != epoch:
            self._orders[dataset] = (epoch, self._draw_order(dataset, epoch))
        return SampleRef(dataset, int(self._orders[dataset][1][place]), position)

    def _draw_order(self, dataset: int, epoch: int) -> NDArray[np.int64]:
        """Return the order of one pass: a permutation of the dataset's indices."""
        size, block = self.sizes[dataset], self.block_sizes[dataset]
        rng = np.random.default_rng([self.seed, _ORDER, dataset, epoch])
        lengths = self._lengths[dataset]
        if lengths is not None:
            begun = 0 if self._per_pass[dataset] else epoch * size
            return self._group(rng.permutation(size), lengths, begun, rng)
        if not 0 < block < size:
            return rng.permutation(size)
        # Shuffle whole blocks of neighbours, then the examples within windows of eight blocks: a window reads from few
        # shards, and yet its order is random.
        starts = rng.permutation(np.arange(0, size, block))
        order = np.concatenate([np.arange(start, min(start + block, size)) for start in starts])
        window = 8 * block
        return np.concatenate([rng.permutation(order[start : start + window]) for start in range(0, size, window)])

    def _group(
        self, order: NDArray[np.int64], lengths: NDArray[np.int64], begun: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return an order in which the examples of a batch, those of all ranks, are of like length.

        Sorted is within stretches of many batches only: which examples meet in a batch stays random, and so does the
        order of the batches. `begun` examples were drawn before this pass.
        """
        stride = self.world_size * self.batch_size
        # The first examples complete the batch that the pass before has begun.
        first, order = np.split(order, [min(-begun % stride, len(order))])
        stretch = stride * _BATCHES_SORTED_TOGETHER
        sorted_parts = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            sorted_parts.append(part[np.argsort(lengths[part], kind="stable")])
        whole = np.concatenate([order[:0], *sorted_parts])
        # What does not fill a batch comes last.
        num_full = len(whole) // stride * stride
        batches = rng.permutation(whole[:num_full].reshape(-1, stride))
        return np.concatenate([first, batches.ravel(), whole[num_full:]])
