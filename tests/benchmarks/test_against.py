"""The comparison with another commit, here with this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import against


@pytest.mark.slow
def test_two_checkouts_take_turns_and_their_ratio_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = [str(against.ROOT), "--rounds", "1", "--json", str(report), "--tasks", "decode"]
    assert against.main(arguments) == 0
    [(task, figures)] = json.loads(report.read_text())["tasks"].items()
    assert task == "decode"
    assert figures["ratio"] > 0
    assert figures["this"] > 0
    assert "| decode |" in capsys.readouterr().out
