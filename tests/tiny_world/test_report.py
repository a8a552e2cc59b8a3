"""Figures from answers, and the questions they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.tiny_world.evaluation.questions import AskedFile, Question, load_questions
from examples.tiny_world.evaluation.report import accuracy_report, format_table
from video_llama.errors import DatasetError
from video_llama.evaluation.asking import AnsweredQuestion

SEEN = AskedFile(Path("a.mp4"), "video", True, [])
UNSEEN = AskedFile(Path("b.mp4"), "video", False, [])


def answered(file: AskedFile, attribute: str, value: str, answer: str, turn: int = 1) -> AnsweredQuestion:
    return AnsweredQuestion(file, Question(0, turn, attribute, value, "?"), answer)


def rows_of(items: list[AnsweredQuestion]) -> dict[str, dict[str, float]]:
    return {row["name"]: row for row in accuracy_report(items)["rows"]}


def test_right_answers_are_counted_by_attribute_and_by_what_training_showed() -> None:
    items = [
        answered(SEEN, "colour", "red", "It is red."),
        answered(SEEN, "colour", "red", "It is blue."),
        answered(UNSEEN, "colour", "green", "It is green."),
        answered(SEEN, "size", "small", "It is large."),
    ]
    row = rows_of(items)["clips: colour"]
    assert (row["accuracy"], row["seen"], row["unseen"], row["count"]) == (0.6667, 0.5, 1.0, 3)
    assert rows_of(items)["clips: size"]["accuracy"] == 0


def test_later_turns_are_counted_apart_from_first_ones() -> None:
    items = [
        answered(SEEN, "colour", "red", "It is red.", turn=1),
        answered(SEEN, "sound", "noise", "I hear beeps.", turn=2),
        answered(SEEN, "size", "small", "It is small.", turn=2),
    ]
    rows = rows_of(items)
    assert rows["clips: colour"]["count"] == rows["all first questions"]["count"] == 1
    assert rows["second turns"]["accuracy"] == 0.5
    assert rows["second turns: sound"]["accuracy"] == 0


def test_an_answer_that_cannot_be_read_is_wrong_and_counted() -> None:
    report = accuracy_report(
        [answered(SEEN, "colour", "red", "Red or blue."), answered(SEEN, "size", "small", "Small")]
    )
    assert report["unparseable"] == 0.5
    assert report["rows"][0]["accuracy"] == 0


def test_unseen_combinations_say_nothing_of_sounds() -> None:
    items = [answered(UNSEEN, "sound", "noise", "I hear beeps."), answered(UNSEEN, "size", "small", "It is small.")]
    assert rows_of(items)["unseen combinations"] == {"name": "unseen combinations", "accuracy": 1.0, "count": 1}


def test_the_table_has_a_line_for_every_row() -> None:
    report = accuracy_report([answered(SEEN, "colour", "red", "red"), answered(UNSEEN, "colour", "red", "blue")])
    assert "| clips: colour | 50.0% | 100.0% | 0.0% | 2 |" in format_table(report).splitlines()


def write_truth(folder: Path, *entries: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries)
    (folder / "ground_truth.jsonl").write_text(text)


def truth(kind: str, **more: object) -> dict[str, object]:
    question = {"attribute": "colour", "value": "red", "question": "Which colour?", "answer": "Red."}
    questions = [{"dialogue": 0, "turn": 1, **question}, {"dialogue": 1, "turn": 1, **question}]
    questions.append({"dialogue": 1, "turn": 2, **question})
    return {"kind": kind, "file": "videos/a.mp4", "questions": questions, **more}


def test_questions_are_read_as_dialogues_in_the_order_of_their_turns(tmp_path: Path) -> None:
    write_truth(tmp_path / "test", truth("clip", combination="unseen"), truth("sound"), truth("image in shard"))
    files = load_questions(tmp_path)
    assert [(file.modality, file.is_seen) for file in files] == [("video", False), ("audio", True)]
    assert [[question.turn for question in turns] for turns in files[0].dialogues] == [[1], [1, 2]]
    assert files[0].path == tmp_path / "test/videos/a.mp4"


def test_a_limit_is_of_each_kind(tmp_path: Path) -> None:
    write_truth(tmp_path, *[truth("clip")] * 3, *[truth("sound")] * 3)
    assert [file.modality for file in load_questions(tmp_path, limit=2)] == ["video", "video", "audio", "audio"]


def test_a_folder_without_ground_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no ground_truth\.jsonl"):
        load_questions(tmp_path)


@pytest.mark.parametrize("line", ["{", '{"kind": "clip"}', "[]"])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    write_truth(tmp_path, truth("clip"), f"{line}\n")
    with pytest.raises(DatasetError, match="line 2"):
        load_questions(tmp_path)
