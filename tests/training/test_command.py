"""The command line of train.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from video_llama.cli.train import build_parser, main
from video_llama.training.checkpoints import list_checkpoints


def test_a_run_is_started_overridden_and_continued(config_file: Path, tmp_path: Path) -> None:
    command = ["--cfg-path", str(config_file), "--options", "run.max_epoch=1"]
    assert main(command) == 0
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000004"
    assert main(["--cfg-path", str(config_file), "--resume"]) == 0
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000008"


def test_starting_over_a_run_is_refused_in_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg-path", str(config_file), "--options", "run.max_epoch=1"]) == 0
    capsys.readouterr()
    assert main(["--cfg-path", str(config_file)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "already contains a run" in error


def test_a_run_of_which_only_the_checkpoints_of_epochs_are_left_is_not_written_over(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_0.pth").write_bytes(b"precious")
    assert main(["--cfg-path", str(config_file)]) == 1
    assert "already contains a run (latest: checkpoint_0.pth)" in capsys.readouterr().err


def test_what_the_system_refuses_is_told_in_one_line(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file in the place of the folder")
    assert main(["--cfg-path", str(config_file)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(tmp_path / "run") in error


def test_ctrl_c_says_how_to_go_on(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("video_llama.training.trainer.Trainer.__init__", interrupt)
    assert main(["--cfg-path", str(config_file)]) == 130
    assert "--resume continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),
    ],
)
def test_a_full_gpu_is_told_in_one_line_with_what_to_lower(
    error: RuntimeError, config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("video_llama.training.learner.Learner.step", fill)
    assert main(["--cfg-path", str(config_file)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    words = ("run.batch_size_train", "use_grad_checkpoint", "features.dir", "load_in_8bit", "out of memory")
    assert all(word in lines[0] for word in words)
    assert "Traceback" not in lines[0]


def test_another_error_of_a_program_keeps_its_traceback(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("video_llama.training.learner.Learner.step", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["--cfg-path", str(config_file)])


def test_mistakes_in_the_configuration_are_told_before_anything_loads(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_llama.training.trainer.Trainer.__init__", pytest.fail)
    assert main(["--cfg-path", str(config_file), "--options", "run.batch_size=3", "run.init_lr=fast"]) == 1
    error = capsys.readouterr().err
    assert "unknown key run.batch_size" in error
    assert "run.init_lr must be a number" in error


def test_the_cache_alone_is_filled_on_request(config_file: Path, tmp_path: Path) -> None:
    options = ["--options", f"features.dir={tmp_path / 'cache'}"]
    assert main(["--cfg-path", str(config_file), "--cache-features", *options]) == 0
    assert any((tmp_path / "cache" / "features").rglob("*"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_the_cache_is_filled_although_a_run_is_there_which_is_left_as_it_was(config_file: Path, tmp_path: Path) -> None:
    assert main(["--cfg-path", str(config_file), "--options", "run.max_epoch=1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for more in ([], ["--resume"]):
        cache = tmp_path / f"cache{len(more)}"
        options = ["--cache-features", *more, "--options", f"features.dir={cache}"]
        assert main(["--cfg-path", str(config_file), *options]) == 0
        assert any((cache / "features").rglob("*"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_evaluation_alone_trains_nothing(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    split = corpus / "validation" / "webvid"
    options = [
        "run.evaluate=True",
        f"datasets.webvid.valid_build_info.anno_dir={split / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'videos'}",
    ]
    assert main(["--cfg-path", str(config_file), "--options", *options]) == 0
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert events == ["valid"]


def test_options_may_be_given_in_several_groups() -> None:
    parsed = build_parser().parse_args(["--cfg-path", "a", "--options", "x=1", "y=2", "--options", "z=3"])
    assert parsed.options == ["x=1", "y=2", "z=3"]
