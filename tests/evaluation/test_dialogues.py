"""Every question of one's own dialogues, in the prompts that a chat has, and what the answers are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama import load_pretrained_model
from video_llama.cli import evaluate as script
from video_llama.errors import ConfigError
from video_llama.evaluation.dialogues import answer_examples, load_dialogues
from video_llama.evaluation.text_metrics import exact_match, token_f1
from video_llama.inference.completion import generate_text
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.prompt_parts import media_prefix


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogues") / "corpus"
    make_corpus(folder, WorldSettings(num_clips=6, seed=11, image_size=64, splits=(0, 0, 1)))
    return folder / "test"


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def answer(words: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **keys}


@pytest.fixture(scope="module")
def annotations(split: Path, model: VideoLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = sorted((split / "webvid" / "videos").rglob("*.mp4"))
    image = min((split / "cc_sbu_align" / "image").iterdir())
    read = model.processor.media_processor.process_video
    clip, other = str(videos[0]), next(str(path) for path in videos[1:] if read(path, audio=True)[1] is not None)
    dialogues = [
        ("turns", [
            user({"type": "video", "path": clip}, text("What is in the video?")), answer("Two red rings."),
            user(text("Where do they go?")), answer("They move up."),
            user({"type": "image", "path": str(image)}, text("And here?")), answer("Blue stars."),
        ]),
        ("text", [user(text("How many corners has a square?")), answer("Four.")]),
        ("both", [
            user({"type": "video", "path": other}, {"type": "audio", "path": other}, text("What do you hear?")),
            answer("Not this one.", loss=False), user(text("What colour?")), answer("red"), user(text("Sure?")),
        ]),
        ("absent", [user({"type": "video", "path": "/nowhere.mp4"}, text("What?")), answer("Nothing.")]),
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("annotations") / "mine.jsonl"
    rows = (json.dumps({"id": id_, "messages": messages}) for id_, messages in dialogues)
    file.write_text("".join(row + "\n" for row in rows))
    return file


def asked(model: VideoLlama, media: list[Any], turns: list[tuple[list[Any], str | None]]) -> str:
    """The answer of a chat in which these turns were."""
    conversation = model.new_conversation()
    for question, said in turns:
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], said)
    prompt = model.prepare(conversation, [model.encode(item) for item in media])
    [answered] = generate_text(model, [prompt], GenerationOptions(max_new_tokens=12, min_new_tokens=0))
    return answered


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (16, 0), (2, 1)])
def test_every_question_is_asked_after_the_annotated_answers_before_it(
    batch_size: int, num_workers: int, model: VideoLlama, annotations: Path
) -> None:
    examples = load_dialogues("messages", annotations, None)
    results = answer_examples(model, examples, batch_size, max_new_tokens=12, num_workers=num_workers)
    found = {(item.id, item.turn): item for item in results.answers}
    assert list(results.unusable) == ["messages/absent"], results.unusable
    assert found.keys() == {
        ("messages/turns", 1), ("messages/turns", 2), ("messages/turns", 3), ("messages/text", 1), ("messages/both", 2),
    }  # fmt: skip
    assert "no such file" in results.unusable["messages/absent"]
    processor = model.processor.media_processor
    rows = {row["id"]: row["messages"] for row in map(json.loads, annotations.read_text().splitlines())}
    clip = processor.process_video(rows["turns"][0]["content"][0]["path"], audio=False)[0]
    image = processor.process_image(rows["turns"][4]["content"][0]["path"])
    turns: list[tuple[list[Any], str | None]] = [
        ([*media_prefix([clip]), "What is in the video?"], "Two red rings."),
        (["Where do they go?"], "They move up."),
        ([*media_prefix([image]), "And here?"], None),
    ]
    for number, media in ((1, [clip]), (2, [clip]), (3, [clip, image])):
        expected = asked(model, media, [*turns[: number - 1], (turns[number - 1][0], None)])
        assert found["messages/turns", number].answer == expected
    frames, sound = processor.process_video(rows["both"][0]["content"][0]["path"], audio=True)
    question = [*media_prefix([frames], sound), "What do you hear?"]
    expected = asked(model, [frames, sound], [(question, "Not this one."), (["What colour?"], None)])
    assert found["messages/both", 2].answer == expected
    assert found["messages/text", 1].answer == asked(model, [], [(["How many corners has a square?"], None)])
    assert found["messages/turns", 2].question == "Where do they go?"
    assert found["messages/turns", 2].reference == "They move up."


def test_answers_are_compared_by_their_words() -> None:
    assert exact_match("The red ring.", "red ring")
    assert not exact_match("red rings", "red ring")
    # Three of the model's four words are among the five of the reference: 2 * 3 / (4 + 5).
    assert token_f1("Two red rings move", "two big red rings fall") == pytest.approx(2 / 3)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "red") == 0
    assert token_f1("", "the") == 1


def test_the_script_writes_figures_by_turn_and_every_answer(
    annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.json"
    options = ["--model", "video-llama-tiny", "--device", "cpu", "--dataset", "messages", "--data", str(annotations)]
    options += ["--workers", "0", "--max-new-tokens", "8", "--json", str(file)]
    assert script.main(options) == 0
    report = json.loads(file.read_text())
    assert (report["dialogues"], report["questions"], len(report["answers"])) == (3, 5, 5)
    assert {turn: row["questions"] for turn, row in report["by_turn"].items()} == {"1": 2, "2": 2, "3": 1}
    for name, value in report["metrics"].items():
        assert value == pytest.approx(sum(item[name] for item in report["answers"]) / 5, abs=1e-4)
    shown = capsys.readouterr().out
    assert "5 questions of 3 dialogues; 1 could not be asked" in shown
    assert "messages/absent" in shown
    assert script.main([*options, "--ablate", "swap_audio"]) == 1
    assert script.main([*options, "--prompt", "What?"]) == 1


def test_a_dataset_of_other_samples_is_refused(split: Path) -> None:
    with pytest.raises(ConfigError, match="not messages; evaluate it by captions"):
        load_dialogues("webvid", split / "webvid" / "annotations", split / "webvid" / "videos")
