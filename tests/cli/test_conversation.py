"""The conversation that is typed, and files and questions as they come on the command line."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.demo.conftest import Run, chats, image, run
from video_llama.cli import chat as command
from video_llama.cli.chat import split_items
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama

__all__ = ["chats", "image", "run"]

Type = Callable[..., SimpleNamespace]


@pytest.fixture
def converse(run: Run, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Run the command on a terminal where these lines are typed; an error that stands for a key is raised."""

    def converse(*lines: str | type[BaseException], arguments: tuple[str | Path, ...] = ("--terminal",)) -> object:
        typed: Iterator[str | type[BaseException]] = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(builtins, "input", read)
        result = run(*arguments)
        result.untyped = list(typed)
        return result

    return converse  # type: ignore[return-value]


@pytest.mark.parametrize("word", ["exit", "quit", "/quit", EOFError])
def test_a_conversation_is_typed_until_the_user_leaves(
    word: str | type[BaseException], converse: Type, chats: list[Chat], image: Path
) -> None:
    result = converse("What is it?", "", "  Why?  ", word, "never asked", arguments=("--input", image))
    assert (result.code, result.untyped) == (0, ["never asked"])
    assert [turn.question for turn in chats[0].turns] == ["What is it?", "Why?"]
    assert result.lines[0] == f"{image}: an image"


def test_files_are_added_by_command_and_by_their_path_alone(
    converse: Type, chats: list[Chat], image: Path, make_audio: Callable[..., Path]
) -> None:
    sound = make_audio()
    result = converse(f"/add {image}", f"'{sound}'", f"/add {image} {sound}", "What?", "/quit")
    assert [upload.source for upload in chats[0].turns[0].uploads] == [str(image), str(sound)] * 2
    assert result.messages == []


def test_a_question_without_a_file_is_said_to_be_about_none(converse: Type, image: Path) -> None:
    result = converse("What?", f"/add {image}", "And now?", "/quit")
    [note] = result.messages
    assert note.startswith("note: no file is attached, so the answer is not about any file")


def test_mistakes_leave_the_conversation_as_it_was(converse: Type, chats: list[Chat]) -> None:
    mistakes = ["/add absent.mp4", "absent.mp4", "https://youtu.be/abc", "/add", "/udo", "/save a.txt", "/undo"]
    result = converse(*mistakes, "/quit")
    assert result.messages == [
        "error: absent.mp4: no such file",
        "error: absent.mp4: no such file",
        "error: https://youtu.be/abc: an address, not a file (add --allow-urls, in Python allow_urls=True, "
        "to download it; or download it first)",
        "error: /add needs a file: /add clip.mp4",
        "error: a.txt: the name must end with .md or .json",
    ]
    assert "Unknown command /udo; did you mean /undo? (/help shows the commands)" in result.lines
    assert "There is nothing to undo." in result.lines
    assert chats[0].turns == []


def test_turns_are_undone_and_cleared(converse: Type, chats: list[Chat], image: Path) -> None:
    result = converse("What?", f"/add {image}", "Why?", "/undo", "/quit")
    assert f"Removed the question 'Why?', {image.name}." in result.lines
    assert [turn.question for turn in chats[0].turns] == ["What?"]
    converse("What?", "/clear", "/quit")
    assert chats[1].turns == []


def test_a_conversation_is_saved_for_people_and_for_programs(
    converse: Type, chats: list[Chat], image: Path, tmp_path: Path
) -> None:
    json_file, markdown = tmp_path / "a.json", tmp_path / "b.md"
    result = converse(
        "What?", f"/save {json_file}", f"/save {markdown}", f"/save {markdown}", "/quit", arguments=("--input", image)
    )
    record = json.loads(json_file.read_text(encoding="utf-8"))
    answer = chats[0].turns[0].answer
    files = [{"name": str(image), "given": "an image"}]
    assert record["turns"] == [{"files": files, "question": "What?", "answer": answer}]
    assert record["options"]["max_new_tokens"] == 6
    assert {"model", "date"} < record.keys()
    assert f"**What?**\n\n{answer}\n" in markdown.read_text(encoding="utf-8")
    assert result.messages == [f"error: {markdown}: exists already; choose another name"]


def test_ctrl_c_stops_an_answer_and_twice_the_program(
    converse: Type, chats: list[Chat], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = VideoLlama.stream

    def interrupted(self: VideoLlama, *arguments: object) -> Iterator[str]:
        yield next(stream(self, *arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoLlama, "stream", interrupted)
    result = converse("What?", "/undo", KeyboardInterrupt, KeyboardInterrupt, "no", arguments=("--input", image))
    assert (result.code, result.untyped) == (130, ["no"])
    # The answer up to then is the answer: the question is done, and can be undone.
    assert any(line.startswith("Removed the question 'What?'") for line in result.lines)
    assert "interrupted" in result.messages


@pytest.mark.parametrize(
    ("items", "files"),
    [
        (["clip.mp4", "What happens?"], ["clip.mp4"]),
        (["What happens?", "clip.mp4", "And then?"], ["clip.mp4"]),
        (["Why?"], []),
        (["a/b", "https://media.example/a", "x.wav"], ["a/b", "https://media.example/a", "x.wav"]),
        (["my holiday.MOV", "Who is in it, Mr. T?"], ["my holiday.MOV"]),
    ],
)
def test_files_and_questions_are_told_apart(items: list[str], files: list[str]) -> None:
    assert split_items(items) == (files, [item for item in items if item not in files])


def test_a_file_without_any_of_the_signs_is_known_by_being_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip").write_bytes(b"")
    assert split_items(["clip", "clap"]) == (["clip"], ["clap"])


def test_files_and_questions_stand_anywhere_between_the_options(
    tiny_checkpoint: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "3"]
    assert command.main([str(image), *options, "What is it?", "Why?"]) == 0
    output = capsys.readouterr()
    assert [line for line in output.out.splitlines() if line.startswith(("> ", str(image)))] == [
        f"{image}: an image",
        "> What is it?",
        "> Why?",
    ]
    assert "model: " in output.err
