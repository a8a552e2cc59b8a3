"""Which examples make which batch."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from video_llama.data.mixture import MixtureBatchSampler, SampleRef, mixture_weights
from video_llama.errors import ConfigError


def make_plan(**settings: Any) -> MixtureBatchSampler:
    settings = {"sizes": [10, 7], "shares": [0.5, 0.5], "batch_size": 3, "num_batches": 40, "seed": 5, **settings}
    return MixtureBatchSampler(settings.pop("sizes"), settings.pop("shares"), **settings)


def one_set(size: int, **settings: Any) -> MixtureBatchSampler:
    return make_plan(sizes=[size], shares=[1.0], **settings)


def all_batches(plan: MixtureBatchSampler) -> list[list[SampleRef]]:
    return [plan[number] for number in range(len(plan))]


def rounds(plan: MixtureBatchSampler, size: int) -> list[list[int]]:
    """The indices of a plan of one dataset, cut where a new round begins."""
    indices = [slot.index for batch in all_batches(plan) for slot in batch]
    return [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]


def test_shares_are_the_ratios_over_their_sum() -> None:
    assert mixture_weights([5, 900], [3, 1], ["a", "b"]) == [0.75, 0.25]
    assert mixture_weights([5, 900], [0, 2.5], ["a", "b"]) == [0.0, 1.0]


def test_shares_are_by_size_if_no_dataset_has_a_ratio() -> None:
    assert mixture_weights([30, 10], [None, None], ["a", "b"]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("ratios", "cause"),
    [
        ([1, -2], r"datasets\.b\.sample_ratio must be 0 or more, but is -2"),
        ([1, float("nan")], r"datasets\.b\.sample_ratio"),
        ([float("inf"), 1], r"datasets\.a\.sample_ratio"),
        ([0, 0], "nothing to train on"),
        ([1, None], "missing for b"),
    ],
)
def test_ratios_without_a_meaning_are_config_errors(ratios: list[float | None], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        mixture_weights([10, 10], ratios, ["a", "b"])


def test_a_batch_depends_on_the_seed_and_its_number_alone() -> None:
    plan, again = make_plan(), make_plan()
    backwards = [again[number] for number in reversed(range(len(again)))][::-1]
    assert all_batches(plan) == backwards
    assert all_batches(make_plan(seed=6)) != backwards


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert all_batches(make_plan(num_batches=90))[:40] == all_batches(make_plan())


def test_a_plan_is_the_same_in_another_process() -> None:
    plan = make_plan()
    expected = all_batches(plan)  # with its memory of orders filled
    assert all_batches(pickle.loads(pickle.dumps(plan))) == expected


def test_all_slots_of_a_batch_are_of_one_dataset() -> None:
    for batch in all_batches(make_plan()):
        assert len(batch) == 3
        assert len({slot.dataset for slot in batch}) == 1


def test_positions_count_the_examples_of_each_dataset() -> None:
    slots = [slot for batch in all_batches(make_plan()) for slot in batch]
    for dataset in (0, 1):
        positions = [slot.position for slot in slots if slot.dataset == dataset]
        assert positions == list(range(len(positions)))


@pytest.mark.parametrize("settings", [{}, {"block_sizes": [2, 3]}])
def test_two_ranks_see_what_one_sees_with_batches_of_twice_the_size(settings: dict[str, Any]) -> None:
    whole = make_plan(batch_size=6, **settings)
    ranks = [make_plan(rank=rank, world_size=2, **settings) for rank in (0, 1)]
    for number in range(len(whole)):
        assert ranks[0][number] + ranks[1][number] == whole[number]


@pytest.mark.parametrize("block", [0, 1, 4, 50])
def test_each_round_is_a_permutation_and_no_two_are_alike(block: int) -> None:
    seen = rounds(one_set(10, block_sizes=[block]), 10)
    assert len(seen) == 12
    for indices in seen:
        assert sorted(indices) == list(range(10))
    assert len({tuple(indices) for indices in seen}) == 12


def test_a_dataset_smaller_than_a_batch_is_gone_through_more_than_once() -> None:
    [batch] = all_batches(one_set(2, batch_size=5, num_batches=1))
    assert Counter(slot.index for slot in batch[:4]) == {0: 2, 1: 2}


def test_shares_are_obeyed() -> None:
    plan = make_plan(sizes=[3, 1000, 50], shares=[0.6, 0.3, 0.1], num_batches=4000)
    counts = Counter(batch[0].dataset for batch in all_batches(plan))
    assert [counts[dataset] / 4000 for dataset in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_a_dataset_without_a_share_is_never_drawn() -> None:
    assert {batch[0].dataset for batch in all_batches(make_plan(shares=[0.0, 1.0]))} == {1}


def test_blocks_keep_neighbours_near_each_other_and_yet_shuffle() -> None:
    size, block = 4000, 20
    plan = one_set(size, block_sizes=[block], batch_size=8 * block, num_batches=size // (8 * block))
    windows = [sorted(slot.index for slot in batch) for batch in all_batches(plan)]
    for window in windows:  # 8 blocks in each, whole ones
        assert len({index // block for index in window}) == 8
    firsts = [window[0] for window in windows]
    assert firsts != sorted(firsts)
    order = [slot.index for slot in plan[0]]
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.2


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 30])
def test_whole_passes_take_every_example_once_in_each(batch_size: int, world_size: int) -> None:
    sizes = [10, 7, 1, 24]
    settings = {"sizes": sizes, "shares": [0.2, 0.4, 0.4, 0.0], "batch_size": batch_size, "num_passes": 3}
    ranks = [make_plan(**settings, num_batches=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    per_pass = sum(-(-size // (batch_size * world_size)) for size in sizes[:3])
    assert {len(plan) for plan in ranks} == {3 * per_pass}
    orders = []
    for number in range(3):
        seen: list[SampleRef] = []
        for batch in range(number * per_pass, (number + 1) * per_pass):
            refs = [plan[batch] for plan in ranks]
            # The first rank logs, so it always has something; the others have no more than it.
            assert 1 <= len(refs[0]) <= batch_size
            assert all(len(part) <= len(refs[0]) for part in refs)
            assert {part.dataset for group in refs for part in group} == {ranks[-1].first_sample(batch).dataset}
            assert refs[0][0] == ranks[-1].first_sample(batch)
            seen += [ref for group in refs for ref in group]
        expected = {(dataset, index) for dataset in range(3) for index in range(sizes[dataset])}
        assert len(seen) == len(expected)
        assert {(ref.dataset, ref.index) for ref in seen} == expected
        orders.append(tuple((ref.dataset, ref.index) for ref in seen))
    assert len(set(orders)) == 3


def test_the_processes_of_a_whole_pass_share_the_batches_of_one() -> None:
    settings: dict[str, Any] = {"sizes": [10, 7], "num_batches": 0, "num_passes": 2}
    whole = make_plan(**settings, batch_size=4)
    ranks = [make_plan(**settings, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert all_batches(whole) == [ranks[0][number] + ranks[1][number] for number in range(len(whole))]


def test_replacements_are_drawn_from_the_seed_the_place_and_the_attempt() -> None:
    plan, again = one_set(1000), one_set(1000)
    slots = [slot for batch in all_batches(plan)[:5] for slot in batch]
    drawn = [[plan.replacement(slot, attempt) for attempt in range(4)] for slot in slots]
    assert drawn == [[again.replacement(slot, attempt) for attempt in range(4)] for slot in slots]
    assert len({index for row in drawn for index in row}) > 50
    assert all(0 <= index < 1000 for row in drawn for index in row)
    assert drawn != [[one_set(1000, seed=6).replacement(slot, attempt) for attempt in range(4)] for slot in slots]


def test_sample_seeds_differ_from_place_to_place_but_not_from_run_to_run() -> None:
    plan = make_plan(num_batches=100)
    slots = [slot for batch in all_batches(plan) for slot in batch]
    seeds = [plan.sample_seed(slot) for slot in slots]
    assert len(set(seeds)) == len(slots)
    assert seeds == [make_plan(num_batches=100).sample_seed(slot) for slot in slots]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("size", [96, 101])
@pytest.mark.parametrize("drawn_by_pass", [True, False])
def test_batches_of_like_length_take_every_example_once_and_pad_less(size: int, drawn_by_pass: bool) -> None:
    lengths = np.random.default_rng(3).integers(10, 500, size)

    def sampler(given: list[np.ndarray] | None, rank: int) -> MixtureBatchSampler:
        amount = {"num_passes": 3} if drawn_by_pass else {"num_batches": 3 * size // 8 + 1}
        return MixtureBatchSampler(
            [size], [1.0], batch_size=4, seed=7, rank=rank, world_size=2, lengths=given, **amount
        )

    def padding(given: list[np.ndarray] | None) -> float:
        real, computed, taken = 0, 0, []
        ranks = [sampler(given, rank) for rank in range(2)]
        for number in range(len(ranks[0])):
            refs = [ref for rank in ranks for ref in rank[number]]
            taken += [ref.index for ref in refs]
            of_batch = [int(lengths[ref.index]) for ref in refs]
            real, computed = real + sum(of_batch), computed + len(of_batch) * max(of_batch)
        assert [sorted(taken[start : start + size]) for start in (0, size, 2 * size)] == [list(range(size))] * 3
        return 1 - real / computed

    assert padding([lengths]) < 0.25 < 0.4 < padding(None)
    # The same numbers on every call, and other batches in every pass.
    assert [sampler([lengths], 0)[5]] == [sampler([lengths], 0)[5]]
    assert {ref.index for ref in sampler([lengths], 0)[0]} != {ref.index for ref in sampler([lengths], 0)[size // 8]}
