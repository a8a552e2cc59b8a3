"""The demo on the terminal: answers, options, and one line for everything that can be wrong."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.demo.conftest import Run
from video_llama.cli import demo_video
from video_llama.cli.demo_video import build_parser
from video_llama.cli.models import model_settings
from video_llama.conversation import conv_templates
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama

ROOT = Path(__file__).parents[2]

# The command as a whole


def test_the_command_explains_itself_without_loading_torch() -> None:
    code = "import sys, runpy; sys.argv = ['demo_video.py', '--help']\n"
    code += "try: runpy.run_path('demo_video.py', run_name='__main__')\n"
    code += "except SystemExit as end: sys.exit(end.code or ('torch' in sys.modules) * 7)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    for words in ("--question", "--input", "--no-audio", "examples:", "hub id"):
        assert words in shown.stdout


def test_every_option_has_an_explanation() -> None:
    for action in build_parser()._actions:
        assert action.help, action.dest


@pytest.mark.slow
def test_the_command_answers_and_fails_as_a_process(tiny_checkpoint: Path, image: Path) -> None:
    command = [sys.executable, "demo_video.py", "--model", str(tiny_checkpoint), "--question", "What is it?"]
    command += ["--max-new-tokens", "4", "--input", str(image)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answered = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (answered.returncode, answered.stdout.splitlines()[:2]) == (0, [f"{image}: an image", "> What is it?"])
    failed = subprocess.run([*command, "absent.mp4"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", "error: absent.mp4: no such file\n")


# Answers


def test_a_video_with_audio_is_read_and_answered(run: Run, chats: list[Chat], make_video: Callable[..., Path]) -> None:
    clip = make_video("clip.mp4", audio=True)
    result = run("--input", clip, "--question", "What happens?")
    assert (result.code, result.messages) == (0, [])
    assert result.lines[0] == f"{clip}: 8 frames, one every 0.1 s; audio: all of its 1.2 s"
    assert result.lines[1] == "> What happens?"
    assert "\n".join(result.lines[2:]) == chats[0].turns[0].answer


def test_a_silent_video_and_one_whose_audio_is_not_read_differ(run: Run, make_video: Callable[..., Path]) -> None:
    silent = run("--input", make_video("silent.mp4"), "--question", "What?")
    ignored = run("--input", make_video("loud.mp4", audio=True), "--no-audio", "--question", "What?")
    assert silent.lines[0].endswith("audio: no sound track")
    assert ignored.lines[0].endswith("audio: not listened to")


@pytest.mark.parametrize("name", ["still.png", "tone.wav"])
def test_files_are_known_by_content_and_not_by_name(
    name: str, run: Run, image: Path, make_audio: Callable[..., Path], tmp_path: Path
) -> None:
    path = image if name == "still.png" else make_audio(name, seconds=3.0)
    misnamed = path.rename(tmp_path / "misnamed.mp4")
    result = run("--input", misnamed, "--question", "What is it?")
    expected = "an image" if name == "still.png" else "audio: all of its 3 s"
    assert (result.code, result.lines[0]) == (0, f"{misnamed}: {expected}")


def test_several_questions_are_turns_of_one_conversation(run: Run, chats: list[Chat], image: Path) -> None:
    result = run("--input", image, "--question", "What is it?", "Why?")
    assert [line for line in result.lines if line.startswith("> ")] == ["> What is it?", "> Why?"]
    assert [turn.question for turn in chats[0].turns] == ["What is it?", "Why?"]
    assert all(turn.answer for turn in chats[0].turns)


def test_several_files_stand_in_one_conversation(
    run: Run, chats: list[Chat], image: Path, make_audio: Callable[..., Path]
) -> None:
    sound = make_audio()
    run("--input", image, sound, "--question", "Do they fit?")
    assert [upload.source for upload in chats[0].turns[0].uploads] == [str(image), str(sound)]


def test_a_warning_is_shown_when_old_turns_no_longer_fit(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(VideoLlama, "max_length", property(lambda self: 200))
    result = run("--input", image, "--question", "Who is this? " * 5, "And who? " * 5, "And why? " * 5)
    assert result.code == 0
    assert "its first 1 turn(s) are left out" in caplog.text


# Options


def test_options_reach_the_chat(run: Run, chats: list[Chat], make_video: Callable[..., Path]) -> None:
    sampling = ["--max-new-tokens", "3", "--temperature", "0.7", "--top-p", "0.5", "--num-beams", "2"]
    looking = ["--num-frames", "3", "--model-type", "vicuna", "--dtype", "bfloat16", "--repetition-penalty", "1.5"]
    assert run("--input", make_video(), *sampling, *looking, "--question", "What?").code == 0
    chat = chats[0]
    options = chat.options
    assert (options.max_new_tokens, options.temperature, options.top_p) == (3, 0.7, 0.5)
    assert (options.num_beams, options.repetition_penalty) == (2, 1.5)
    assert chat.turns[0].uploads[0].frames.pixel_values.shape[0] == 3
    assert (chat.template.sep_style, chat.model.model.dtype) == (conv_templates["v1"].sep_style, torch.bfloat16)


def test_a_configuration_names_the_model_and_its_frames(
    run: Run, chats: list[Chat], tiny_checkpoint: Path, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    config = tmp_path / "demo.yaml"
    config.write_text(
        f"model: {{arch: video_llama, ckpt: {tiny_checkpoint}, dtype: float32}}\n"
        "datasets: {webvid: {data_type: video, vis_processor: {train: {name: alpro_video_eval, n_frms: 5}}}}\n"
    )
    arguments = ["--cfg-path", config, "--input", make_video("clip.mp4", audio=True), "--question", "What?"]
    result = run(*arguments, "--options", "model.equip_audio_branch=False", "--dtype", "bfloat16", model=None)
    assert result.code == 0
    assert result.lines[0].endswith("audio: the model has no audio branch")
    assert chats[0].turns[0].uploads[0].frames.pixel_values.shape[0] == 5
    assert chats[0].model.model.dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["command line", "configuration"])
def test_the_video_reader_that_is_asked_for_decodes(
    run: Run, tiny_checkpoint: Path, make_video: Callable[..., Path], tmp_path: Path, where: str
) -> None:
    config = tmp_path / "demo.yaml"
    reader = "decord" if where == "configuration" else "pyav"
    config.write_text(
        f"model: {{arch: video_llama, ckpt: {tiny_checkpoint}}}\n"
        f"datasets: {{webvid: {{vis_processor: {{train: {{video_reader: {reader}}}}}}}}}\n"
    )
    option = ["--video-reader", "decord"] if where == "command line" else []
    refused = run("--cfg-path", config, "--input", make_video("a.avi"), "--question", "What?", *option, model=None)
    assert refused.code == 1
    assert "decord gives wrong frames of avi files" in refused.messages[-1]


# What can be wrong


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"Dear diary,\n", "a text file, not a video"),
        (bytes(range(256)) * 40, "not a media file, or damaged beyond reading"),
    ],
    ids=["absent", "empty", "text", "noise"],
)
def test_a_file_that_cannot_be_used_is_one_line_and_the_model_is_not_even_loaded(
    content: bytes | None, cause: str, run: Run, chats: list[Chat], tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    result = run("--input", path, "--question", "What happens?")
    assert (result.code, result.lines, len(result.messages), chats) == (1, [], 1, [])
    assert result.messages[0].startswith(f"error: {path}: {cause}")


def test_a_truncated_video_is_one_line(run: Run, make_video: Callable[..., Path]) -> None:
    path = make_video("clip.mp4", num_frames=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    result = run("--input", path, "--question", "What happens?")
    assert (result.code, len(result.messages)) == (1, 1)
    assert result.messages[0].startswith(f"error: {path}: the file is truncated: ")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("absent", "error: absent: no such file or folder; it should be a folder with VL_"),
        ("nobody/nothing", "error: nobody/nothing: neither a local folder nor reachable on the Hugging Face Hub"),
        ("tiny", "error: tiny: no such file or folder (did you mean video-llama-tiny?)"),
        ("video-llama-tny", "error: video-llama-tny: no such file or folder (did you mean video-llama-tiny?)"),
        ("{root}/tests/dmo", "error: {root}/tests/dmo: no such file or folder (did you mean {root}/tests/demo?)"),
        ("{root}/tests/demo", "error: {root}/tests/demo: no VL*.pth"),
        ("{root}/README.md", "error: {root}/README.md: not a checkpoint; give a folder"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(model: str, message: str, run: Run) -> None:
    result = run("--question", "What?", model=model.format(root=ROOT))
    assert (result.code, len(result.messages)) == (1, 1)
    assert result.messages[0].startswith(message.format(root=ROOT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "toaster"], "error: unknown device 'toaster'"),
        (["--gpu-id", "99"], "error: device cuda:99 is not available"),
        (["--max-new-tokens", "0"], "error: max_new_tokens and num_beams must be at least 1"),
        (["--temperature", "-1"], "error: temperature must be finite and not negative"),
        (["--repetition-penalty", "0"], "error: repetition_penalty must be above 0"),
        (["--load-in-8bit", "--load-in-4bit"], "error: choose one of load_in_8bit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(arguments: list[str], message: str, run: Run) -> None:
    result = run("--question", "What?", *arguments)
    assert (result.code, len(result.messages)) == (1, 1)
    assert result.messages[0].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "a", "--terminal"], "no question: chat clip.mp4"),
        (["--model", "a", "--input", "a.mp4"], "no question: chat clip.mp4"),
        (["--model", "a", "--cfg-path", "b"], "--cfg-path: not allowed with argument --model"),
        (["--model", "a", "--question", "What?", "--options", "model.ckpt=b"], "give --cfg-path too"),
        (["--model", "a", "--question", "What?", "--num-frames", "0"], "--num-frames: must be at least 1, not 0"),
        (["--model", "a", "--input", "a.mp4", "--question", "Why?", " "], "--question: it is empty; type a question"),
        (["--port", "70000"], "--port: must be from 1 to 65535, not 70000"),
        (["--port", "0"], "--port: must be from 1 to 65535"),
        (["--port", "abc"], "--port: not a whole number: abc"),
        (["--temperature", "warm"], "--temperature: not a number: warm"),
        (["--gpu-id", "-1"], "--gpu-id/--gpu_id: must be at least 0, not -1"),
        (["--gpu-id", "7", "--device", "cpu"], "--gpu-id 7 and --device cpu contradict each other; give one"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_give(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(SystemExit) as end:
        demo_video.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_quantisation_asked_for_on_the_command_line_goes_before_the_configuration() -> None:
    arguments = argparse.Namespace(dtype="auto", load_in_8bit=False, load_in_4bit=True)
    assert model_settings(arguments) == ["model.load_in_4bit=True"]


def test_the_page_never_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo_video.main(["--allow-urls"])
    assert "--allow-urls goes with --input; the page takes uploads only" in capsys.readouterr().err


def test_an_address_says_which_option_allows_it_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_video.main(["--model", "absent", "--input", "http://media.example/a.mp4", "--question", "What?"]) == 1
    assert "http://media.example/a.mp4: an address, not a file (add --allow-urls" in capsys.readouterr().err
