"""The comparison of padded and grouped batches at a trial size; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.padding import main, summarise

pytestmark = pytest.mark.slow


def test_both_ways_learn_from_as_many_dialogues_with_less_padding_where_they_are_grouped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--dialogues", "64", "--batch-size", "4", "--steps", "4", "--rounds", "4"]
    assert main([*sizes, "--output", str(file)]) == 0
    report = json.loads(file.read_text())
    padded, grouped = (report["figures"][way] for way in ("padded", "grouped"))
    # One pass over the 64 dialogues each, so the same tokens.
    assert padded["samples"] == grouped["samples"] == 64
    assert padded["tokens"] == grouped["tokens"]
    assert grouped["padding_share"] < padded["padding_share"] / 2
    assert [len(stretches) for stretches in report["stretches"].values()] == [4, 4]
    assert f"| grouped | {grouped['padding_share']:.1%} |" in capsys.readouterr().out


def test_the_padding_share_is_that_of_all_positions_and_speeds_are_medians() -> None:
    stretch = {"seconds": 2.0, "cpu_seconds": 1.0, "samples": 4, "tokens": 30, "positions": 40}
    slow = {"seconds": 8.0, "cpu_seconds": 4.0, "samples": 4, "tokens": 60, "positions": 60}
    figures = summarise([stretch, stretch, slow])
    assert figures["padding_share"] == pytest.approx(1 - 120 / 140, abs=1e-4)
    assert figures["samples_per_cpu_second"] == 4
    assert figures["samples_per_second"] == 2
