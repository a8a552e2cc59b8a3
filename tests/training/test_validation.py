"""Figures on a validation split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from tests.training.test_trainer import assert_same, read_log, trained
from video_llama.constants import IGNORE_INDEX
from video_llama.data.examples import Example
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.errors import DatasetError, MediaError
from video_llama.training.trainer import Trainer
from video_llama.training.validation import first_answer, media_of_prompt, rouge_l, validate

pytestmark = pytest.mark.slow


@pytest.fixture
def validated(make_config: MakeConfig, corpus: Path) -> Trainer:
    split = corpus / "validation" / "webvid"
    return Trainer(
        make_config(
            f"datasets.webvid.valid_build_info.anno_dir={split / 'annotations'}",
            f"datasets.webvid.valid_build_info.videos_dir={split / 'videos'}",
            "run.num_generations=3",
        )
    )


def test_rouge_is_the_f1_of_the_longest_common_subsequence_of_words() -> None:
    assert rouge_l("a b c", "a b c") == 1
    assert rouge_l("A red ball", "a RED ball") == 1
    assert rouge_l("x y", "a b") == 0
    assert rouge_l("the ball moves left", "the red ball moves") == pytest.approx(2 * 3 / 8)
    assert rouge_l("b a", "a b") == pytest.approx(0.5)
    assert rouge_l("", "a") == 0
    assert rouge_l("", "") == 1


def test_the_first_answer_is_what_the_first_labels_say() -> None:
    labels = [IGNORE_INDEX, IGNORE_INDEX, 5, 6, IGNORE_INDEX, 7]
    assert first_answer(ProcessedSample("a", [1, 2, 5, 6, 3, 7], labels, [])) == ([1, 2], [5, 6])
    assert first_answer(ProcessedSample("a", [1, 5, 6], [IGNORE_INDEX, 5, 6], [])) == ([1], [5, 6])


def test_validation_measures_the_loss_that_training_has(validated: Trainer) -> None:
    report = validated.evaluate()["webvid"]
    table, encoder = validated.valid_datasets[0].examples, validated.valid_datasets[0].encoder
    assert (report.num_samples, report.num_bad) == (len(table), 0)
    losses, tokens, right = 0.0, 0, 0
    validated.model.eval()
    for example in table:
        sample = encoder(example)
        labels = torch.tensor([sample.labels])
        with torch.no_grad():
            output = validated.model(
                input_ids=torch.tensor([sample.input_ids]), pixel_values=sample.media[0].values[None], labels=labels
            )
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        losses, tokens = losses + float(output.loss) * count, tokens + count
        right += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
    assert report.loss == pytest.approx(losses / tokens, rel=1e-4)
    assert report.token_accuracy == pytest.approx(right / tokens)


def test_a_sample_that_cannot_be_used_is_left_out_counted_and_quarantined(
    validated: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    (dataset,) = validated.valid_datasets
    bad = dataset.examples[1].id

    def encode(example: Example) -> ProcessedSample:
        if example.id == bad:
            raise MediaError("a.mp4", "damaged")
        return dataset.encoder(example)

    validated.valid_datasets = [dataclasses.replace(dataset, encoder=encode)]  # type: ignore[arg-type]
    report = validated.evaluate()["webvid"]
    assert (report.num_samples, report.num_bad) == (len(dataset.examples) - 1, 1)
    assert f"{bad} (validation) cannot be used: a.mp4: damaged" in caplog.text
    (line,) = (validated.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": bad, "reason": "a.mp4: damaged", "iteration": 0, "split": "validation"}
    assert validated.metric_logger.bad_samples() == []  # what is measured is no reason to stop training


def test_generated_answers_are_kept_beside_the_expected_ones(validated: Trainer) -> None:
    report = validated.evaluate()["webvid"]
    lines = [json.loads(line) for line in (validated.folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(report.answers) == 3
    assert all(line["expected"] for line in lines)
    assert report.rouge_l == pytest.approx(sum(rouge_l(x["answer"], x["expected"]) for x in lines) / 3)


def test_media_that_come_after_the_first_answer_are_no_part_of_its_prompt(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    image, length = trainer.model.config.image_token_id, trainer.model.config.num_video_query_tokens
    media = [MediaInput("pixel_values", torch.full((1, 3, 2, 2), float(number))) for number in range(2)]
    run = [image] * length
    sample = ProcessedSample(
        "a", [1, *run, 5, *run, 6], [IGNORE_INDEX] * (1 + length) + [5] + [IGNORE_INDEX] * length + [6], media
    )
    assert media_of_prompt(first_answer(sample)[0], sample, trainer.model.config) == media[:1]
    assert media_of_prompt(sample.input_ids, sample, trainer.model.config) == media


def test_a_run_validates_after_each_epoch(validated: Trainer) -> None:
    validated.train()
    assert [line["iteration"] for line in read_log(validated.folder) if line["event"] == "valid"] == [4, 8]


def test_a_split_that_cannot_be_read_is_an_error(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    annotations = corpus / "validation" / "webvid" / "annotations"
    trainer = Trainer(
        make_config(
            f"datasets.webvid.valid_build_info.anno_dir={annotations}",
            f"datasets.webvid.valid_build_info.videos_dir={tmp_path}",
        )
    )
    with pytest.raises(DatasetError, match="no sample of its validation split can be used"):
        trainer.evaluate()


MakeValidated = Callable[..., Trainer]


@pytest.fixture
def make_validated(make_config: MakeConfig, corpus: Path) -> MakeValidated:
    """Trainers with a validation split of clips and one of pictures."""
    split = corpus / "validation"
    settings = [
        f"datasets.webvid.valid_build_info.anno_dir={split / 'webvid' / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'webvid' / 'videos'}",
        f"datasets.cc_sbu_align.valid_build_info.storage={split / 'cc_sbu_align'}",
    ]
    return lambda *options: Trainer(make_config(*settings, *options))


def validations(folder: Path) -> list[tuple[int, str]]:
    return [(line["iteration"], line["dataset"]) for line in read_log(folder) if line["event"] == "valid"]


class Killed(BaseException):
    pass


BOTH_EPOCHS = [(4, "webvid"), (4, "cc_sbu_align"), (8, "webvid"), (8, "cc_sbu_align")]


@pytest.mark.parametrize("validated_before", [0, 1, 2, 3])
def test_a_run_killed_between_an_epochs_checkpoint_and_its_validation_makes_up_for_it(
    validated_before: int, make_validated: MakeValidated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = make_validated(f"run.output_dir={tmp_path / 'unbroken'}")
    unbroken.train()
    first = make_validated()
    calls = iter(range(10))

    def be_killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == validated_before:
            raise Killed
        return validate(*args, **kwargs)

    monkeypatch.setattr("video_llama.training.trainer.validate", be_killed)
    with pytest.raises(Killed):
        first.train()
    monkeypatch.undo()
    assert validations(first.folder) == BOTH_EPOCHS[:validated_before]
    make_validated("run.resume_ckpt_path=auto").train()
    assert validations(first.folder) == BOTH_EPOCHS
    assert_same(trained(first.folder), trained(unbroken.folder))
    make_validated("run.resume_ckpt_path=auto").train()  # a finished run has nothing to make up for
    assert validations(first.folder) == BOTH_EPOCHS


def test_a_sigterm_in_the_last_step_of_an_epoch_leaves_its_validation_to_the_run_that_goes_on(
    make_validated: MakeValidated,
) -> None:
    first = make_validated("run.accum_grad_iters=4")
    first._stop_signal = 15
    assert first.train().iteration == 4
    assert validations(first.folder) == []
    make_validated("run.accum_grad_iters=4", "run.resume_ckpt_path=auto").train()
    assert validations(first.folder) == BOTH_EPOCHS


def test_what_a_course_that_was_left_has_validated_does_not_count(make_validated: MakeValidated) -> None:
    first = make_validated("run.save_freq=1", "run.keep_checkpoints=8")
    first.train()
    path = first.folder / "checkpoints" / "step_00000007"
    back = make_validated(f"run.resume_ckpt_path={path}")
    back._stop_signal = 15
    assert back.train().iteration == 8
    make_validated("run.resume_ckpt_path=auto").train()
    assert validations(first.folder) == [*BOTH_EPOCHS, *BOTH_EPOCHS[2:]]
