"""Which data stop a run: those of which more is bad than the limit, and no others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from video_llama.data.batches import BadSample, Batch
from video_llama.errors import DatasetError
from video_llama.training.checkpoints import TrainingState
from video_llama.training.metric_logger import MetricLogger
from video_llama.training.monitor import DataMonitor


def monitor(folder: Path, sizes: dict[str, int], shares: list[float], limit: float = 0.01) -> DataMonitor:
    accelerator = Accelerator(cpu=True)
    metric_logger = MetricLogger(accelerator, folder)
    return DataMonitor(accelerator, metric_logger, sizes=sizes, shares=shares, max_bad_share=limit)


def draws(size: int, num_bad: int, rounds: int, seed: int) -> Iterator[Batch]:
    """One sample after the other of some rounds; the first ones are bad, and replaced by what is drawn."""
    rng = random.Random(seed)
    for _ in range(rounds):
        for first in rng.sample(range(size), size):
            index, failures = first, []
            while index < num_bad:
                failures.append(BadSample(f"clips/{index}", "no such file"))
                index = rng.randrange(size)
            yield Batch(
                0, {"labels": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)}, [], [f"clips/{index}"], failures
            )


def count_all(counts: DataMonitor, batches: Iterator[Batch], state: TrainingState) -> None:
    for batch in batches:
        counts.count([batch], state)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "num_bad"), [(120, 1), (100, 1), (300, 3), (1999, 19)])
def test_data_within_the_limit_never_stop_a_run(size: int, num_bad: int, seed: int, tmp_path: Path) -> None:
    counts, state = monitor(tmp_path, {"clips": size}, [1.0]), TrainingState()
    count_all(counts, draws(size, num_bad, 10, seed), state)
    assert state.bad_ids == sorted(f"clips/{index}" for index in range(num_bad))
    assert state.samples_bad >= 10 * num_bad  # drawn again and again


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "num_bad", "most"), [(120, 2, 120), (300, 4, 300), (10_000, 5_000, 400)])
def test_data_past_the_limit_stop_a_run_in_the_first_round_and_the_sooner_the_worse_they_are(
    size: int, num_bad: int, most: int, seed: int, tmp_path: Path
) -> None:
    counts, state = monitor(tmp_path, {"clips": size}, [1.0]), TrainingState()
    message = rf"of {size} samples cannot be used.*run\.max_bad_samples \(1\.00%\)"
    with pytest.raises(DatasetError, match=message) as stop:
        count_all(counts, draws(size, num_bad, 1, seed), state)
    assert "clips/" in str(stop.value)
    assert 0.01 * size < len(state.bad_ids) <= 0.01 * size + 20
    assert state.samples_seen <= 2 * most


@pytest.mark.parametrize("seed", range(3))
def test_of_a_stream_counts_what_was_drawn_and_not_its_unknown_length(seed: int, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    logger = MetricLogger(accelerator, tmp_path)
    sizes = {"clips": 100}  # the rows that were looked at
    counts = DataMonitor(accelerator, logger, sizes=sizes, shares=[1.0], streamed=["clips"], max_bad_share=0.01)
    # One in 125 is bad: never past 1 %, although by chance it may be more for a while.
    count_all(counts, draws(5000, 40, 1, seed), TrainingState())
    # One in 50 is bad, twice the limit.
    state = TrainingState()
    with pytest.raises(DatasetError, match=r"samples cannot be used, more than run\.max_bad_samples \(1\.00%\)"):
        count_all(counts, draws(5000, 100, 1, seed), state)
    assert 3 < len(state.bad_ids) < state.samples_seen / 50 + 20
    strict = DataMonitor(accelerator, logger, sizes=sizes, shares=[1.0], streamed=["clips"], max_bad_share=0)
    with pytest.raises(DatasetError):
        count_all(strict, draws(5000, 1, 1, seed), TrainingState())


def test_datasets_count_as_they_are_mixed(tmp_path: Path) -> None:
    sizes, shares = {"clips": 100, "talks": 10_000}, [0.5, 0.5]
    batch = Batch(
        0,
        {"labels": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)},
        [],
        ["talks/0"],
        [BadSample("clips/1", "a"), BadSample("talks/2", "b")],
    )
    state = TrainingState()
    monitor(tmp_path, sizes, shares).count([batch], state)  # 0.505 %
    batch.failures.append(BadSample("clips/3", "c"))
    with pytest.raises(
        DatasetError, match=r"3 of 10100 samples cannot be used.* as the datasets are mixed, 1\.00% of what"
    ):
        monitor(tmp_path, sizes, shares).count([batch], state)  # 1.005 %
    monitor(tmp_path, sizes, [0.0, 1.0]).count([batch], state)  # one that is not drawn from does not count


def test_bad_samples_found_before_a_stop_count_after_it(tmp_path: Path) -> None:
    counts = monitor(tmp_path, {"clips": 120}, [1.0])
    batch = Batch(
        0,
        {"labels": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)},
        [],
        ["clips/0"],
        [BadSample("clips/1", "no such file")],
    )
    counts.count([batch], TrainingState(bad_ids=["clips/1"]))
    with pytest.raises(DatasetError, match="2 of 120"):
        counts.count([batch], TrainingState(bad_ids=["clips/2"]))
