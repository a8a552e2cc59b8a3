"""Reading and drawing the log of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.plot_training import Curve, main, read_log
from video_llama.errors import DatasetError


def write(path: Path, *lines: dict[str, object], end: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def train(iteration: int, loss: float) -> dict[str, object]:
    return {"event": "train", "iteration": iteration, "time": 1.0, "loss": loss, "lr": 1e-3}


VALID = {"event": "valid", "iteration": 10, "dataset": "webvid", "loss": 2.5, "exact_match": None}


def test_the_curves_are_those_of_the_log(tmp_path: Path) -> None:
    log = read_log(
        write(tmp_path / "log.jsonl", {"event": "start", "iteration": 0}, train(5, 3.0), train(10, 2.0), VALID)
    )
    assert log.train == {"loss": Curve([5, 10], [3.0, 2.0]), "lr": Curve([5, 10], [1e-3, 1e-3])}
    assert log.valid == {"webvid": {"loss": Curve([10], [2.5])}}
    assert log.resumed == []


def test_iterations_done_again_after_a_kill_count_once_as_they_were_last(tmp_path: Path) -> None:
    lines = [train(5, 3.0), train(10, 9.0), {"event": "resume", "iteration": 5}, train(10, 2.0)]
    log = read_log(write(tmp_path / "log.jsonl", *lines, end='{"event": "tra'))
    assert log.train["loss"] == Curve([5, 10], [3.0, 2.0])
    assert log.resumed == [5]


def test_iterations_past_the_checkpoint_that_a_run_went_back_to_are_not_drawn(tmp_path: Path) -> None:
    lines = [train(5, 3.0), VALID, train(10, 9.0), train(15, 9.0), {"event": "resume", "iteration": 5}, train(10, 2.0)]
    log = read_log(write(tmp_path / "log.jsonl", *lines))
    assert log.train["loss"] == Curve([5, 10], [3.0, 2.0])
    assert log.valid == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no iteration is logged yet"),
        ('{"event": "start", "iteration": 0}\n', "no iteration is logged yet"),
        ('nonsense\n{"event": "start", "iteration": 0}\n', "line 1: not a line of a training log"),
        ('{"loss": 1}\n{"event": "start", "iteration": 0}\n', "line 1: not a line of a training log"),
    ],
)
def test_what_is_no_log_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_log(tmp_path)


@pytest.mark.slow
def test_the_plot_is_a_picture_with_a_line_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss in (("a", 3.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.jsonl", train(5, loss), train(10, loss - 1), VALID)
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "one.png")]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "two.png")]) == 0
    one, two = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("one", "two"))
    orange = (255, 127, 14)  # the second colour
    assert orange not in {colour for _, colour in one.getcolors(1 << 24)}
    assert orange in {colour for _, colour in two.getcolors(1 << 24)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "one.png", "two.png"]


def test_the_plot_lies_beside_the_log_by_default(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", train(5, 1.0))
    assert main([str(tmp_path / "log.jsonl")]) == 0
    assert (tmp_path / "training.png").exists()


def test_a_missing_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
