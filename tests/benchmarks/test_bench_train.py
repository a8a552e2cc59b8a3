"""The benchmark of training steps at trial size: what is compared runs, and the table says what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_train import ANSWER_TOKENS, BATCH_SIZE, build_trainer, make_batch, print_steps, time_steps


def test_every_kind_of_step_runs_and_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = time_steps("tiny", ["float32"], 1, tmp_path)
    kinds = [f"stage {stage}, {kind}" for stage in (1, 2) for kind in ("encoded", "cached")]
    assert list(result["float32"]) == kinds
    assert all(wall > 0 and cpu > 0 for wall, cpu in result["float32"].values())
    trainer = build_trainer("tiny", tmp_path, "float32")
    for stage, count in ANSWER_TOKENS.items():
        assert make_batch(trainer, stage, is_cached=True).num_label_tokens == BATCH_SIZE * count
    capsys.readouterr()
    figures = {"stage 1, encoded": (8.0, 16.0), "stage 1, cached": (1.0, 1.0), "stage 2, encoded": (9.0, 18.0)}
    print_steps({"float32": {**figures, "stage 2, cached": (2.0, 3.0)}}, "small")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("float32")]
    assert lines[0][4:] == ["8.000", "0.50", "14.1", "s", "16.000"]
    assert lines[3][4:] == ["2.000", "2.00", "4.5x", "3.000", "6.0x"]
