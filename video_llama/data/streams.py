"""Rows of Hugging Face datasets that are read as they come, in an order that a run can go on with exactly.

A stream has no random places, so its rows are read in the main process, in one order, and handed to the worker
processes that decode them. The order is a function of the seed, the process and the number of processes. It is shuffled
in blocks and not in the library's own buffer, whose content no state holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from video_llama.data.mixture import MixtureBatchSampler
from video_llama.errors import DatasetError
from video_llama.utils.extras import import_extra

__all__ = ["RowStream", "StreamFeed", "StreamPlace", "StreamedBatch", "StreamedRow"]


class StreamedRow(NamedTuple):
    """One row: its cells by column, where it is (for error messages), and its number (for logs)."""

    cells: dict[str, Any]
    where: str
    number: str


class StreamPlace(NamedTuple):
    """Where one process stands in a stream; a list of values of JSON.

    Args:
        order: what the rows and their order depend on.
        number_of_pass: how often the stream was read to its end.
        first: rows of this pass before the current block.
        used: rows of the block that were taken.
        state: of the library, before the block; None at the start of a pass.
    """

    order: list[Any]
    number_of_pass: int = 0
    first: int = 0
    used: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class StreamedBatch:
    """The number of a batch whose rows come from a stream, and the rows."""

    number: int
    rows: list[StreamedRow]


class RowStream:
    """One process's share of a stream, again and again.

    The processes share the files of a dataset if their number divides that of the files. Otherwise each takes every
    n-th row, and reads all.

    Args:
        rows: a `datasets.IterableDataset`.
        name: of the rows, for error messages.
        block_size: rows that are shuffled at a time, and held in memory twice.
        seed: of the order of files and rows.
        digest: of the rows, as far as it is known.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        *,
        block_size: int,
        seed: Sequence[int],
        digest: str = "",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        split = import_extra("datasets.distributed", name).split_dataset_by_node
        self._rows = split(rows, rank, world_size)
        self._name, self._block_size, self._seed, self._rank = name, block_size, list(seed), rank
        self._order = [*seed, digest, block_size, rank, world_size]

    def place(self, values: Sequence[Any] | None) -> StreamPlace | None:
        """Return the place of a checkpoint, or None where it is one of another order of rows."""
        found = StreamPlace(*values) if values else None
        return found if found is not None and found.order == self._order else None

    def read(self, place: StreamPlace | None = None) -> Iterator[tuple[StreamedRow, StreamPlace]]:
        """Yield rows from a place on, by default from the start, without end; each with the place behind it.

        Raises:
            DatasetError: the library cannot read on, or this process's share has no rows.
        """
        blocks = self._blocks(place or StreamPlace(self._order))
        # The next block is read while this one is used, so that training does not wait for the network.
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(next, blocks)
            while True:
                before, rows = ahead.result()
                ahead = thread.submit(next, blocks)
                for used in range(before.used, len(rows)):
                    yield rows[used], before._replace(used=used + 1)

    def _blocks(self, place: StreamPlace) -> Iterator[tuple[StreamPlace, list[StreamedRow]]]:
        """Yield the shuffled blocks from that of a place on, each with its place."""
        while True:
            try:
                yield from self._rest_of_pass(place)
            except DatasetError:
                raise
            except Exception as error:
                # The library raises what its many readers and the network raise.
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise DatasetError(f"{self._name}: the stream cannot be read on ({reason})") from error
            place = StreamPlace(self._order, place.number_of_pass + 1)

    def _rest_of_pass(self, place: StreamPlace) -> Iterator[tuple[StreamPlace, list[StreamedRow]]]:
        number_of_pass, first = place.number_of_pass, place.first
        # The library shuffles the files by the number of the epoch, from 1 on.
        self._rows.set_epoch(1 + int(np.random.default_rng([*self._seed, number_of_pass]).integers(2**31)))
        self._rows.load_state_dict(place.state)
        tables = iter(self._rows)
        while block := list(islice(tables, self._block_size)):
            rows = [
                StreamedRow(
                    table.to_pylist()[0],
                    f"{self._name}, row {number} of pass {number_of_pass} in process {self._rank}",
                    f"{number_of_pass}:{self._rank}:{number}",
                )
                for number, table in enumerate(block, start=first)
            ]
            order = np.random.default_rng([*self._seed, self._rank, number_of_pass, first]).permutation(len(rows))
            yield place, [rows[position] for position in order]
            first += len(rows)
            place = StreamPlace(self._order, number_of_pass, first, 0, self._rows.state_dict())
        if not first:
            raise DatasetError(f"{self._name}: the stream has no rows for process {self._rank}")


class StreamFeed:
    """Read the rows that the batches of a run take from streams; in the main process.

    Args:
        sampler: what each batch consists of.
        streams: by the number of their dataset.
    """

    def __init__(self, sampler: MixtureBatchSampler, streams: Mapping[int, RowStream]) -> None:
        self._sampler, self._streams = sampler, streams
        # By the number of a batch, where the streams stand before it.
        self._places: dict[int, dict[int, StreamPlace]] = {}

    def requests(self, numbers: Iterable[int], places: Mapping[str, Any]) -> Iterator[int | StreamedBatch]:
        """Yield what a worker needs to know of each batch: its number, or the rows too.

        Args:
            numbers: of the batches, growing.
            places: where the streams stand before the first one, from `places`. Without that of a stream its rows are
                read from the start, and those of earlier batches left out.
        """
        readers: dict[int, Iterator[tuple[StreamedRow, StreamPlace]]] = {}
        known = {dataset: stream.place(places.get(str(dataset))) for dataset, stream in self._streams.items()}
        now = {dataset: place for dataset, place in known.items() if place is not None}
        for number in numbers:
            dataset, turn = self._sampler.turn(number)
            self._places[number] = dict(now)
            if dataset not in self._streams:
                yield number
                continue
            if dataset not in readers:
                readers[dataset] = self._streams[dataset].read(now.get(dataset))
                if dataset not in now:
                    # The same rows as without a stop, only later.
                    skipped = turn * self._sampler.batch_size
                    next(islice(readers[dataset], skipped, skipped), None)
            taken = list(islice(readers[dataset], self._sampler.batch_size))
            now[dataset] = taken[-1][1]
            self._places[number + 1] = dict(now)
            yield StreamedBatch(number, [row for row, _ in taken])

    def places(self, number: int) -> dict[str, Any]:
        """Return where the streams stand before a batch that was asked for or is the next one, as values of JSON."""
        self._places = {later: places for later, places in self._places.items() if later >= number}
        return {str(dataset): list(place) for dataset, place in self._places.get(number, {}).items()}
