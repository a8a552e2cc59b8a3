"""What is due after a step, and where steps and epochs end."""

from __future__ import annotations

import random

import pytest

from video_llama.training.progress import RunLength, is_due


def test_a_step_past_a_multiple_is_due_as_one_that_ends_on_it() -> None:
    rng = random.Random(0)
    for _ in range(500):
        before, every = rng.randrange(100), rng.randrange(1, 12)
        after = before + rng.randrange(1, 9)
        passed = [number for number in range(before + 1, after + 1) if number % every == 0]
        assert is_due(every, before, after) is bool(passed)
    assert not is_due(0, 0, 100)


@pytest.mark.parametrize("first", range(11))
@pytest.mark.parametrize("accumulated", [1, 2, 3, 4, 7, 50])
def test_steps_from_anywhere_come_by_the_end_of_every_epoch(accumulated: int, first: int) -> None:
    length = RunLength(max_epoch=3, iters_per_epoch=10, accum_grad_iters=accumulated)
    iteration, ends, sizes = first, [], []
    while iteration < length.num_iterations:
        size = length.step_size(iteration)
        assert 1 <= size <= accumulated
        iteration += size
        sizes.append(size)
        if length.ends_epoch(iteration):
            ends.append((iteration, length.epoch(iteration)))
    assert ends == [(10 * number, number - 1) for number in range(1 + first // 10, 4)]
    assert iteration == 30
    if first == 0 and 10 % accumulated == 0:
        assert set(sizes) == {accumulated}
