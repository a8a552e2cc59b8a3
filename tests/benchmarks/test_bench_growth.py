"""The growth and loading benchmarks at trial sizes, in this process; exponents by hand. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench
from benchmarks.benches import growth, growth_tasks, instructblip, loading
from benchmarks.benches.growth import Bounds, Growth, fit_exponent
from benchmarks.benches.long_clips import BLOCK_SECONDS, make_long_clip, shows_what_it_should
from tests.benchmarks.test_bench import run
from video_llama.processor.media_processor import MediaProcessor

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh interpreters take seconds each to import what is measured."""

    def measure(task: str, size: int, model_size: str, repeats: int, folder: Path, _: int) -> dict[str, Any]:
        return growth_tasks.measure_cost(task, size, model_size, repeats, folder)

    monkeypatch.setattr(growth, "measure", measure)


@pytest.mark.parametrize("cost", bench.COSTS)
def test_each_cost_grows_and_its_results_are_right(
    tmp_path: Path, cost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = run(tmp_path, "growth", "--of", cost)
    assert status == 0
    (row,) = rows
    sizes = row["sizes"]
    assert isinstance(sizes, list)
    assert len(sizes) >= 2
    assert row["agrees"] is True
    assert row["time_exponent"] is not None
    assert str(row["what"]) in capsys.readouterr().out


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    sizes = [1.0, 4.0, 16.0, 256.0]
    assert fit_exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power)


def test_one_size_has_no_exponent_and_little_memory_counts_as_flat() -> None:
    assert fit_exponent([5.0, 5.0], [1.0, 2.0]) is None
    assert fit_exponent([1.0, 2.0, 4.0], [0.0, 3.0, 9.0], floor=16.0) == 0


@pytest.mark.parametrize(
    ("time", "memory", "agrees", "holds"),
    [(1.0, 0.1, True, True), (1.2, 0.1, True, False), (1.0, 0.5, True, False), (1.0, None, False, False)],
)
def test_a_cost_holds_if_no_exponent_is_larger_than_promised(
    time: float, memory: float | None, agrees: bool, holds: bool
) -> None:
    row = Growth("growth", "x", [1, 2], [1.0, 2.0], [1.0, 1.0], time, memory, Bounds(1.05, 0.2), agrees)
    assert row.holds is holds
    assert row.as_dict()["holds"] is holds


def test_a_long_clip_shows_its_pictures_in_turn_and_sounds_to_its_end(tmp_path: Path) -> None:
    path, seconds = make_long_clip(tmp_path, 70.0)
    assert seconds == pytest.approx(20 * BLOCK_SECONDS)
    frames, sound = MediaProcessor(image_size=56).process_video(path)
    assert shows_what_it_should(frames)
    assert sound is not None
    assert sound.duration_seconds == pytest.approx(seconds)
    frames.indices[3] += 8
    assert not shows_what_it_should(frames)


def test_tokens_are_compared_with_plain_generation(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "tokens")
    assert status == 0
    assert [row["agrees"] for row in rows[:2]] == [True, True]
    assert {row["peer_name"] for row in rows} == {"InstructBLIP", "its own generate", "generate without a cache"}


def test_both_models_load_all_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(who: str, folder: Path, dtype: str) -> dict[str, float]:
        assert instructblip.main([who, str(folder), dtype]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["weights"] > 0.1
        return found

    monkeypatch.setattr(loading, "measure_loading", measure)
    rows = loading.run_loading("tiny", 1, tmp_path)
    assert [row.what for row in rows] == ["load time", "peak memory of loading"]
    assert rows[0].ours > 0
    assert rows[0].peer > 0
