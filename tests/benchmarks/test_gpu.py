"""The measurement of a GPU, rehearsed on the CPU at tiny size: every section runs. No time is asserted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import REHEARSAL, Bench
from tests.conftest import needs_compiler


@needs_compiler
@pytest.mark.slow
def test_every_section_runs_and_writes_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--rehearse", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["section"]: line["status"] for line in lines} == dict.fromkeys(gpu.BUDGETS, "ok")
    assert status == 0
    assert all(line["rehearsal"] and line["card"] and line["versions"]["torch"] for line in lines)
    figures = {line["section"]: line["figures"] for line in lines}
    assert figures["decode"]["batch 2, fixed cache"]["texts_as_eager"] == 1
    assert figures["kv"]["as the page does"].keys() == {"first_round_s", "tokens_s"}
    assert figures["training"]["stage 2, cached"]["ms_step"] > 0
    shown = capsys.readouterr().out
    assert all(f"\n{section} (" in shown for section in gpu.BUDGETS)


def test_a_section_that_fails_or_takes_too_long_keeps_what_it_found(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), REHEARSAL, tmp_path, is_rehearsal=True)

    def fail(bench: Bench, figures: dict[str, object]) -> None:
        figures["before"] = 1
        raise ValueError("no such thing")

    def dawdle(bench: Bench, figures: dict[str, object]) -> None:
        figures["before"] = 2
        while True:
            try:
                time.sleep(1)
            except Exception:  # what is caught on the way does not keep a section alive
                continue

    lines = [bench.run("fails", fail, 60), bench.run("dawdles", dawdle, 0.2)]
    assert lines[0]["status"] == "failed: ValueError: no such thing"
    assert lines[1]["status"].startswith("out of time after 0 s")
    written = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["figures"] for line in written] == [{"before": 1}, {"before": 2}]


def test_sections_are_chosen_by_name_and_an_unknown_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--rehearse", "--sections", "memory=50", "--output", str(tmp_path)]) == 0
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["section"] for line in lines] == ["model", "memory"]
    for wrong in ("warp", "decode=fast"):
        with pytest.raises(SystemExit):
            gpu.main(["--rehearse", "--sections", wrong, "--output", str(tmp_path)])
    assert "no section 'warp'" in capsys.readouterr().err
