"""The best weights of a run, and the end of a run that no longer gets better."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from tests.training.test_trainer import assert_same, read_log, trained
from video_llama.checkpoints.trained_run import find_trained_run
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.load import load_pretrained_model
from video_llama.training.checkpoints import TrainingState, list_checkpoints
from video_llama.training.model_selection import combine, note_validation
from video_llama.training.trainer import Trainer
from video_llama.training.validation import ValidationReport

MakeTrainer = Callable[..., Trainer]


def test_the_figures_of_all_sets_are_those_of_one_set_with_all_their_tokens() -> None:
    # Nine tokens of loss 2 and one of loss 12: their mean is 3.
    sets = [(2.0, 9, 4, 0), (12.0, 1, 1, 2)]
    names = ("loss", "num_tokens", "num_samples", "num_bad")
    overall = combine([dict(zip(names, line, strict=True), token_accuracy=line[0] / 20) for line in sets])
    assert (overall.loss, overall.token_accuracy) == (pytest.approx(3.0), pytest.approx(0.15))
    assert (overall.num_samples, overall.num_bad) == (5, 2)


def test_the_lowest_loss_is_the_best_and_small_gains_do_not_put_off_the_end() -> None:
    state, course = TrainingState(), []
    for iteration, loss in enumerate([5.0, 4.0, 4.5, 3.95, math.nan, 3.0], start=1):
        state.iteration = iteration
        is_best = note_validation(state, loss, threshold=0.1)
        course.append((is_best, state.best_iteration, state.early_stopping_counter))
    assert course == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (True, 4, 2), (False, 4, 3), (True, 6, 0)]
    assert state.best_loss == 3.0


@pytest.fixture
def make_trainer(make_config: MakeConfig, corpus: Path) -> MakeTrainer:
    """Trainers with a validation split of clips and one of images."""
    split = corpus / "validation"
    settings = [
        f"datasets.webvid.valid_build_info.anno_dir={split / 'webvid' / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'webvid' / 'videos'}",
        f"datasets.cc_sbu_align.valid_build_info.storage={split / 'cc_sbu_align'}",
        "run.num_generations=0",
    ]
    return lambda *options: Trainer(make_config(*settings, *options))


def losing(monkeypatch: pytest.MonkeyPatch, losses: list[float], dies_at: int | None = None) -> None:
    """Let validations have these losses, one for both sets each; the run dies in the one of that number."""
    numbers = iter(range(2 * len(losses)))

    def measure(*args: Any, **kwargs: Any) -> ValidationReport:
        number = next(numbers)
        if number == dies_at:
            raise KeyboardInterrupt
        return ValidationReport(losses[number // 2], 0.5, num_tokens=10, num_samples=5, num_bad=0)

    monkeypatch.setattr("video_llama.training.trainer.validate", measure)


def validations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(folder) if line["event"] == "validation"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return content


@pytest.mark.slow
def test_the_weights_of_the_lowest_loss_are_kept_beside_the_last_and_the_folder_says_which_is_which(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, [5.0, 4.0, 4.5, 4.25])
    trainer = make_trainer("run.valid_freq=2", "run.keep_checkpoints=9")
    exported = {}
    save = trainer.save

    def save_and_keep() -> None:
        save()
        exported[trainer.state.iteration] = {
            name: parameter.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }

    trainer.save = save_and_keep  # type: ignore[method-assign]
    trainer.train()
    folder = trainer.folder
    record = json.loads((folder / "checkpoints.json").read_text())
    assert record["best"] == {
        "file": "checkpoint_best.pth", "epoch": 0, "iteration": 4, "loss": 4.0, "token_accuracy": 0.5,
    }  # fmt: skip
    assert record["last"] == {"file": "checkpoint_1.pth", "epoch": 1, "iteration": 8}
    assert [(line["iteration"], line["is_best"], line["best_iteration"]) for line in validations(folder)] == [
        (2, True, 2), (4, True, 4), (6, False, 4), (8, False, 4),
    ]  # fmt: skip
    assert {line["num_samples"] for line in validations(folder)} == {10}
    # By default the folder is its last epoch; a file in it is that file.
    last = load_pretrained_model(folder, device="cpu", half=False).model
    best = load_pretrained_model(folder / "checkpoint_best.pth", device="cpu", half=False).model
    for name, value in exported[8].items():
        assert torch.equal(last.get_parameter(name), value)
        assert torch.equal(best.get_parameter(name), exported[4][name])
    # As its configuration says, it is its best.
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("load_best_model_at_end: false", "load_best_model_at_end: true"))
    run = find_trained_run(folder)
    assert run is not None
    assert run.section.ckpt == str(folder / "checkpoint_best.pth")
    (folder / "checkpoint_best.pth").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint_best\.pth yet"):
        find_trained_run(folder)


@pytest.mark.slow
def test_a_run_stops_early_leaves_its_last_weights_too_and_stays_stopped(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, [5.0, 5.5, 4.9, 6.0])
    options = ["run.valid_freq=1", "run.early_stopping_patience=2", "run.early_stopping_threshold=0.2"]
    trainer = make_trainer(*options)
    assert trainer.train().iteration == 3
    assert [line.get("reason") for line in read_log(trainer.folder) if line["event"] == "stop"] == ["early stopping"]
    record = json.loads((trainer.folder / "checkpoints.json").read_text())
    assert (record["best"]["iteration"], record["last"]["iteration"]) == (3, 3)
    assert (trainer.folder / "checkpoint_0.pth").exists()
    assert make_trainer(*options, "run.resume_ckpt_path=auto").train().iteration == 3
    losing(monkeypatch, [4.0] * 5)
    patient = make_trainer("run.valid_freq=1", "run.early_stopping_patience=9", "run.resume_ckpt_path=auto")
    assert patient.train().iteration == 8


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [1, 2, 3, 7])
def test_a_run_killed_in_a_validation_ends_with_the_same_best_and_the_same_stop(
    dies_at: int, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = [5.0, 4.0, 4.5, 4.2]
    options = ["run.valid_freq=2", "run.early_stopping_patience=2"]
    losing(monkeypatch, losses)
    unbroken = make_trainer(*options, f"run.output_dir={tmp_path / 'unbroken'}")
    unbroken.train()
    losing(monkeypatch, losses, dies_at)
    first = make_trainer(*options)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    left = [loss for loss in losses for _ in range(2)][dies_at:]
    losses_left = iter(left)
    monkeypatch.setattr(
        "video_llama.training.trainer.validate",
        lambda *args, **kwargs: ValidationReport(next(losses_left), 0.5, num_tokens=10, num_samples=5, num_bad=0),
    )
    second = make_trainer(*options, "run.resume_ckpt_path=auto")
    second.train()
    assert_same(trained(unbroken.folder), trained(second.folder))
    assert_same(*(weights(folder / "checkpoint_best.pth") for folder in (unbroken.folder, second.folder)))
    known = [dataclasses.asdict(trainer.state) for trainer in (unbroken, second)]
    assert known[0] == known[1]
    lines = [
        [{key: value for key, value in line.items() if key != "time"} for line in validations(folder)]
        for folder in (unbroken.folder, second.folder)
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_the_best_of_a_course_that_was_left_is_set_aside(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losing(monkeypatch, [5.0, 4.0])
    first = make_trainer("run.save_freq=2", "run.keep_checkpoints=9")
    first.train()
    losing(monkeypatch, [4.5])
    earlier = list_checkpoints(first.folder / "checkpoints")[2]
    assert earlier.name == "step_00000006"
    back = make_trainer(f"run.resume_ckpt_path={earlier}")
    back.train()
    (aside,) = first.folder.glob("abandoned-00000006-*")
    assert {"checkpoint_best.pth", "checkpoint_1.pth"} <= {path.name for path in aside.iterdir()}
    assert "the best weights so far (iteration 4) are not in the folder" in caplog.text
    assert json.loads((first.folder / "checkpoints.json").read_text())["best"]["iteration"] == 8


@pytest.mark.slow
def test_the_best_file_of_another_folder_is_not_this_ones(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losing(monkeypatch, [5.0, 6.0])
    other = make_trainer("run.max_epoch=1", f"run.output_dir={tmp_path / 'other'}")
    other.train()
    path = list_checkpoints(other.folder / "checkpoints")[-1]
    shutil.copytree(path, tmp_path / "copy" / path.name)
    losing(monkeypatch, [6.0, 7.0])
    trainer = make_trainer(f"run.resume_ckpt_path={tmp_path / 'copy' / path.name}")
    trainer.train()
    assert json.loads((trainer.folder / "checkpoints.json").read_text())["best"]["loss"] == 6.0


@pytest.mark.parametrize("option", ["valid_freq=2", "early_stopping_patience=1", "load_best_model_at_end=True"])
def test_choosing_weights_without_anything_to_validate_on_is_refused(option: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=rf"run\.{option.partition('=')[0]} is .* no dataset has a valid_build_info"):
        Trainer(make_config(f"run.{option}"))
