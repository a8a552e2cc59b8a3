"""Arithmetic on frame counts and seconds; the recorded indices are in tests/parity/test_media_parity.py."""

from __future__ import annotations

import random
from typing import Any

import pytest

from video_llama.media.sampling import (
    frame_seconds,
    frame_times_message,
    frame_window,
    sample_headtail_indices,
    sample_segment_starts,
    sample_uniform_indices,
)


@pytest.mark.parametrize(
    ("num_source_frames", "num_frames", "expected"),
    [(300, 8, [0, 37, 75, 112, 150, 187, 225, 262]), (9, 8, [0, 1, 2, 3, 4, 5, 6, 7]), (5, 8, [0, 1, 2, 3, 4])],
)
def test_uniform_indices_are_cut_off_equal_steps(num_source_frames: int, num_frames: int, expected: list[int]) -> None:
    assert sample_uniform_indices(num_source_frames, num_frames) == expected


@pytest.mark.parametrize("num_frames", [1, 8, 33, 128])
@pytest.mark.parametrize("num_source_frames", [1, 2, 31, 127, 100_003])
def test_uniform_indices_begin_with_the_first_frame_and_never_repeat(num_source_frames: int, num_frames: int) -> None:
    indices = sample_uniform_indices(num_source_frames, num_frames)
    assert indices[0] == 0
    assert indices == sorted(set(indices))
    assert indices[-1] < num_source_frames
    assert len(indices) == min(num_frames, num_source_frames)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("num_source_frames", [1, 2, 3, 5, 100])
def test_headtail_always_gives_as_many_ascending_frames_as_asked(num_source_frames: int, num_frames: int) -> None:
    indices = sample_headtail_indices(num_source_frames, num_frames, random.Random(0))
    assert len(indices) == num_frames
    assert indices == sorted(indices)
    assert set(indices) <= set(range(num_source_frames))


def test_headtail_takes_half_of_the_frames_from_each_half_of_the_video_without_repeats() -> None:
    for seed in range(20):
        indices = sample_headtail_indices(40, 8, random.Random(seed))
        assert len([index for index in indices if index < 20]) == 4
        assert len(set(indices)) == 8


def test_headtail_repeats_every_frame_of_a_short_half_before_one_comes_a_third_time() -> None:
    indices = sample_headtail_indices(4, 10, random.Random(0))
    assert sorted(indices.count(index) for index in range(4)) == [2, 2, 3, 3]


def test_headtail_depends_on_its_random_numbers_alone() -> None:
    draws = [sample_headtail_indices(1000, 8, random.Random(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("counts", [(0, 8), (8, 0), (-1, 8)])
def test_counts_below_one_are_errors(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample_uniform_indices(*counts)
    with pytest.raises(ValueError, match="at least 1"):
        sample_headtail_indices(*counts, random.Random(0))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 100)),
        (2.0, None, (20, 100)),
        (None, 2.0, (0, 20)),
        (2.0, 3.0, (20, 30)),
        (2.0, 99.0, (20, 100)),
        (2.05, 2.06, (20, 21)),
        (9.99, None, (99, 100)),
        (0.0, 0.01, (0, 1)),
    ],
)
def test_a_window_holds_the_frames_on_the_screen_in_it(
    start: float | None, end: float | None, expected: tuple[int, int]
) -> None:
    assert frame_window([index / 10 for index in range(100)], 10.0, start, end) == expected


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (3.0, 2.0, "no time between 3.0 and 2.0"),
        (3.0, 3.0, "no time"),
        (-1.0, None, "no time"),
        (10.0, 12.0, "ends after 10.00 seconds, before 10.0"),
        (10.0, None, "ends after 10.00 seconds, before 10.0"),
    ],
)
def test_a_window_outside_the_video_is_an_error(start: float, end: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_window([index / 10 for index in range(100)], 10.0, start, end)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, (0, 4)),
        (0.12, 0.2, (3, 4)),
        (1.0, 2.0, (3, 4)),
        (2.0, 3.0, (3, 5)),
        (3.0, 5.0, (4, 6)),
        (5.0, None, (5, 6)),
    ],
)
def test_a_window_of_a_variable_rate_holds_what_is_on_the_screen_in_it(
    start: float, end: float | None, expected: tuple[int, int]
) -> None:
    assert frame_window([0.0, 0.04, 0.08, 0.12, 2.5, 4.0], 6.0, start, end) == expected


def test_windows_of_odd_lengths_begin_with_their_own_frame() -> None:
    times = [index / 30 for index in range(900)]
    for frames in (3, 7, 11, 33):
        length = frames / 30
        windows = [frame_window(times, 30.0, number * length, (number + 1) * length) for number in range(27)]
        assert windows == [(number * frames, (number + 1) * frames) for number in range(27)]


def test_times_of_a_constant_rate_are_the_index_divided_by_it_however_the_file_rounds_them() -> None:
    fps = 30000 / 1001
    exact = [index / fps for index in range(300)]
    rounded = [5.0 + round(time, 3) for time in exact]
    assert frame_seconds(rounded, 0.033, fps, 0.001) == (exact, 300 / fps)
    assert frame_seconds([7.0] * 3, 0.0, 10.0, 0.001) == ([0.0, 0.1, 0.2], 3 / 10)


def test_other_times_are_those_that_the_file_states() -> None:
    times, duration = frame_seconds([2.0, 2.1, 2.5, 4.0], 0.5, 10.0, 0.001)
    assert times == pytest.approx([0.0, 0.1, 0.5, 2.0])
    assert duration == pytest.approx(2.5)
    # Where the file does not say how long the last one stays, it stays for the average time.
    assert frame_seconds([2.0, 2.1, 2.5, 4.0], 0.0, 10.0, 0.001)[1] == pytest.approx(2.1)


def test_the_sentence_gives_the_count_and_times_to_a_tenth() -> None:
    assert frame_times_message([0.0, 0.26, 12.34]) == (
        "The video contains 3 frames sampled at 0.0, 0.3, 12.3 seconds. "
    )
    assert frame_times_message([]) == ""


@pytest.mark.parametrize(("spacing", "expected"), [("main", [0.0, 4.0, 8.0]), ("pv015", [0.0, 8 / 3, 16 / 3])])
def test_segments_reach_the_end_of_the_sound_or_stop_short_of_it(spacing: Any, expected: list[float]) -> None:
    starts = sample_segment_starts(10.0, 3, 2.0, spacing)
    assert [float(start) for start in starts] == pytest.approx(expected)


@pytest.mark.parametrize("spacing", ["main", "pv015"])
@pytest.mark.parametrize("duration", [0.1, 2.0])
def test_segments_of_a_sound_no_longer_than_one_all_begin_at_its_start(spacing: Any, duration: float) -> None:
    assert sample_segment_starts(duration, 4, 2.0, spacing) == [0, 0, 0, 0]


def test_a_single_segment_is_the_beginning() -> None:
    assert sample_segment_starts(10.0, 1, 2.0, "main") == [0]


def test_segments_need_a_count_and_a_known_spacing() -> None:
    with pytest.raises(ValueError, match="num_segments"):
        sample_segment_starts(10.0, 0, 2.0, "main")
    unknown: Any = "even"
    with pytest.raises(ValueError, match="'even'"):
        sample_segment_starts(10.0, 2, 2.0, unknown)
