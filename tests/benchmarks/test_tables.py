"""The tables of the document are what the figures beside it say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables


def test_the_tables_of_the_document_are_those_of_the_results() -> None:
    assert tables.main(["--check"]) == 0


def line(section: str, card: str = "H100", **changes: object) -> str:
    known = {"section": section, "card": card, "status": "ok", "rehearsal": False, "seconds": 1.0}
    return json.dumps({**known, "versions": {"torch": "2.11.0"}, "figures": {}, **changes})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = {"8 frames": {"ms": 9.876, "speed_up": 1.2}, "1 frames": {"ms": 1234.5}, "kernels": {"gemm": {"ms": 1.0}}}
    old, new = tmp_path / "2026-11-26.jsonl", tmp_path / "2026-11-27.jsonl"
    old.write_text("\n".join([line("encoders", figures={"8 frames": {"ms": 7.0}}), line("card", rehearsal=True)]))
    new.write_text("\n".join([line("encoders", figures={"cores": 16, **rows}), line("card", status="failed: no")]))
    return tmp_path


def test_each_run_is_drawn_the_newest_first_without_rehearsals_and_kernels(results: Path) -> None:
    assert tables.draw(tables.read(results)).splitlines() == [
        "### H100, run 2026-11-27",
        "",
        "torch 2.11.0.",
        "",
        "#### The card",
        "",
        "Not whole: failed: no.",
        "",
        "#### Encoders",
        "",
        "cores: 16",
        "",
        "|  | ms | speed up |",
        "| --- | --- | --- |",
        "| 8 frames | 9.88 | 1.2 |",
        "| 1 frames | 1234 |  |",
        "",
        "### H100, run 2026-11-26",
        "",
        "torch 2.11.0.",
        "",
        "#### Encoders",
        "",
        "|  | ms |",
        "| --- | --- |",
        "| 8 frames | 7 |",
    ]


def test_tables_are_put_between_the_marks_and_nowhere_else(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr(tables, "DOCUMENT", document)
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.main(["--check"]) == 1
    assert "run benchmarks/tables.py" in capsys.readouterr().err
    assert tables.main([]) == tables.main(["--check"]) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n\n### H100")
    assert text.endswith(f"|\n\n{tables.END}\nafter\n")
    with pytest.raises(ValueError, match="needs one line"):
        tables.insert("no marks", "")
