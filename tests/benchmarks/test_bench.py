"""The benchmarks at trial sizes: every comparison runs and its results agree. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench
from benchmarks.benches import decode, encoders, language, real_size, timing
from benchmarks.benches.timing import Row

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh interpreters take seconds each to import what is measured."""
    for module in (decode, encoders):
        monkeypatch.setattr(module, "memory_of", lambda code, *arguments: (10.0, 20.0))


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    options = ["--size", "tiny", "--repeats", "1", "--threads", "1", "--clips", "3", "--workers", "0"]
    status = bench.main([*arguments, *options, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")])
    return status, json.loads((tmp_path / "out.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("name", "num_compared", "num_rows"),
    [("decode", 4, 7), ("vision", 2, 2), ("audio", 1, 3), ("second-turn", 1, 1), ("captioning", 1, 2)],
)
@pytest.mark.usefixtures("no_processes")
def test_a_bench_runs_and_what_it_compares_agrees(
    tmp_path: Path, name: str, num_compared: int, num_rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = run(tmp_path, name)
    assert status == 0
    assert len(rows) == num_rows
    assert sum(row["agrees"] is True for row in rows) >= num_compared
    assert all(row["bench"] == name and row["target"] is None for row in rows)
    shown = capsys.readouterr().out
    assert all(str(row["what"]) in shown for row in rows)


@pytest.mark.parametrize(("tokens", "status"), [(8, 0), (3, 1)])
def test_the_real_size_is_measured_from_start_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, status: int
) -> None:
    said = {"weights": 100.0, "tokens": tokens, "prompt": 9, "load": 1.0, "answer": 2.0}
    monkeypatch.setattr(real_size, "output_of", lambda code, *arguments: (json.dumps(said), 900.0, 1000.0))
    found, rows = run(tmp_path, "real-size")
    assert found == status
    assert rows[0]["ours"] == 1000.0
    assert rows[0]["peer"] == pytest.approx(1.15 * 100.0 + 1024)
    assert all(row["agrees"] is (tokens == 8) for row in rows)


def test_the_last_printed_line_of_a_fresh_interpreter_comes_back() -> None:
    said, resident, peak = timing.output_of("print(1); print('a', 'b')")
    assert said == "a b"
    assert 0 < resident <= peak + 1


def test_the_real_size_is_no_part_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_names: list[str] = []
    for name in bench.BENCHES:
        monkeypatch.setitem(bench.BENCHES, name, lambda arguments, name=name: run_names.append(name) or [])
    bench.main(["all", "--work", str(tmp_path)])
    assert set(bench.BENCHES) - set(run_names) == {"real-size"}


def test_a_wrong_result_fails_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "caption_alone", lambda model, path: "something else")
    status, _ = run(tmp_path, "captioning")
    assert status == 1


@pytest.mark.parametrize(
    ("ours", "peer", "target", "agrees", "holds"),
    [
        (1.0, 3.0, 3.0, True, True),
        (1.0, 2.9, 3.0, True, False),
        (1.0, 9.0, 3.0, False, False),
        (1, 1, None, None, True),
    ],
)
def test_a_row_holds_if_results_agree_and_the_ratio_is_reached(
    ours: float, peer: float, target: float | None, agrees: bool | None, holds: bool
) -> None:
    row = Row("x", "y", ours, peer, "s", "z", target, agrees)
    assert row.holds is holds
    assert row.as_dict()["ratio"] == peer / ours


@pytest.mark.parametrize(("strict", "status"), [([], 0), (["--strict"], 1)])
def test_a_ratio_that_is_not_reached_fails_only_a_strict_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, strict: list[str], status: int
) -> None:
    row = Row("x", "y", 2.0, 2.0, "s", "z", 3.0)
    monkeypatch.setitem(bench.BENCHES, "vision", lambda arguments: [row])
    assert bench.main(["vision", "--threads", "1", "--work", str(tmp_path), *strict]) == status


def test_tasks_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order, clock = "", 0.0

    def take(name: str, seconds: list[float]) -> None:
        nonlocal order, clock
        order += name
        clock += seconds.pop(0)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    first, second = [99.0, 1.0, 5.0, 3.0], [99.0, 2.0, 2.0, 8.0]
    medians = timing.alternate({"a": lambda: take("a", first), "b": lambda: take("b", second)}, 3)
    assert order == "ababbaab"
    assert medians == {"a": 3.0, "b": 2.0}


def test_the_memory_of_a_fresh_interpreter_is_its_own() -> None:
    bare, _ = timing.memory_of("")
    resident, peak = timing.memory_of(
        "import sys; kept = bytearray(int(sys.argv[1])); freed = bytearray(10**8); del freed", 5 * 10**7
    )
    assert 45 < resident - bare < 60
    assert 130 < peak - bare < 165


def test_operations_of_the_vit_are_those_of_its_matrix_products() -> None:
    config = encoders.make_config("tiny")
    model = encoders.build("tiny")
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.video_branch.vision_encoder(torch.zeros(3, 3, 56, 56))
    assert encoders.vit_operations(config, 3) == pytest.approx(counted.get_total_flops(), rel=0.01)
