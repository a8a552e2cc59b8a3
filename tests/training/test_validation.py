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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_of_a_large_split_the_same_samples_are_drawn_each_time(
    num_workers: int, validated: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset,) = validated.valid_datasets
    size = len(dataset.examples)
    assert size >= 5
    validated.config.run.max_valid_batches, validated.config.run.num_workers = 1, num_workers
    validated.config.run.num_generations = 9
    first = validated.evaluate()["webvid"]
    again = validated.evaluate()["webvid"]
    assert first == again
    assert first.num_samples == 2 < size
    validated.config.run.max_valid_batches = 2
    more = {line["id"] for line in validated.evaluate()["webvid"].answers}
    drawn = {line["id"] for line in first.answers}
    # A larger part of the split holds the smaller one, and is not its beginning for every seed.
    assert len(drawn) == 2
    assert drawn < more
    beginnings = []
    for seed in range(6):
        validated.config.run.seed = seed
        beginnings.append({line["id"] for line in validated.evaluate()["webvid"].answers})
    assert len({tuple(sorted(ids)) for ids in beginnings}) > 1


def test_workers_and_batches_change_no_figure_and_no_answer(validated: Trainer) -> None:
    run = validated.config.run
    run.num_generations = 5
    reports = []
    for batch_size, num_workers in [(1, 0), (3, 0), (2, 2)]:
        run.batch_size_eval, run.num_workers = batch_size, num_workers
        reports.append(validated.evaluate()["webvid"])
    alone, *others = reports
    assert len(alone.answers) == 5
    for report in others:
        assert report.answers == alone.answers
        assert report.loss == pytest.approx(alone.loss, rel=1e-5)
        assert (report.num_tokens, report.num_samples) == (alone.num_tokens, alone.num_samples)


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


def test_trackers_know_every_set_by_its_name_and_all_together(
    make_validated: MakeValidated, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, list[tuple[int, float]]] = {}
    trainer = make_validated("run.max_epoch=1", "run.trackers=[tensorboard]", "run.project=clips", "run.run_name=first")
    log = type(trainer.accelerator).log

    def keep(self: Any, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            sent.setdefault(name, []).append((step, value))
        log(self, values, step=step)

    monkeypatch.setattr(type(trainer.accelerator), "log", keep)
    trainer.train()
    lines = read_log(trainer.folder)
    sets = {line["dataset"]: line for line in lines if line["event"] == "valid"}
    (overall,) = (line for line in lines if line["event"] == "validation")
    for name, line in sets.items():
        assert sent[f"valid/{name}/loss"] == [(4, line["loss"])]
    assert sent["valid/loss"] == [(4, overall["loss"])]
    tokens = {name: line["num_tokens"] for name, line in sets.items()}
    mean = sum(line["loss"] * tokens[name] for name, line in sets.items()) / sum(tokens.values())
    assert overall["loss"] == pytest.approx(mean)
    # One value for each step and name.
    assert all(len({step for step, _ in values}) == len(values) for values in sent.values())
    events = [path for path in trainer.folder.rglob("events.out.tfevents.*") if path.parent.name == "first"]
    assert [path.parent.parent.name for path in events] == ["clips"]
    assert all(name in events[0].read_bytes() for name in (b"valid/webvid/loss", b"valid/loss", b"train/webvid/loss"))


def test_the_loss_of_each_dataset_is_that_of_its_batches(make_config: MakeConfig) -> None:
    trainer = Trainer(
        make_config("run.accum_grad_iters=2", "run.log_freq=4", "run.max_epoch=1", "run.iters_per_epoch=8")
    )
    learn, batches = trainer.learner.step, trainer.batches()
    parts: dict[str, list[tuple[float, int]]] = {}

    def measure(group: Any, iteration: int, tokens: float) -> Any:
        output = learn(group, iteration, tokens)
        for batch, share in zip(group, output.shares, strict=True):
            name = batch.ids[0].partition("/")[0]
            parts.setdefault(name, []).append((share * tokens, batch.num_label_tokens))
        assert sum(output.shares) == pytest.approx(output.loss)
        return output

    trainer.learner.step = measure  # type: ignore[method-assign]
    trainer.train()
    lines = [line for line in read_log(trainer.folder) if line["event"] == "train"]
    assert [line["iteration"] for line in lines] == [4, 8]
    drawn = [[batches[number].ids[0].partition("/")[0] for number in numbers] for numbers in (range(4), range(4, 8))]
    for line, names in zip(lines, drawn, strict=True):
        assert line["loss_by_dataset"].keys() == set(names)
        for name in set(names):
            taken = [parts[name].pop(0) for _ in range(names.count(name))]
            expected = sum(loss for loss, _ in taken) / sum(count for _, count in taken)
            assert line["loss_by_dataset"][name] == pytest.approx(expected)


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
