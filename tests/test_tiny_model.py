"""The small model that comes with the package: found by its name, and right about a world it has not seen."""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama import Chat, load_pretrained_model
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.cli import demo_video
from video_llama.config import load_config
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import build_model

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "video_llama/demo/samples/stars.mp4"
NAME = "video-llama-tiny"


@pytest.fixture(scope="module")
def no_network() -> Iterator[None]:
    """Any connection is an error."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*arguments: object) -> None:
            raise AssertionError("the network was used")

        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def model(no_network: None) -> VideoLlama:
    return load_pretrained_model(NAME, device="cpu", half=False, verbose=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, pictures and sounds of a seed that nothing was trained on."""
    folder = tmp_path_factory.mktemp("fresh") / "corpus"
    make_corpus(folder, WorldSettings(num_clips=16, seed=90_210, image_size=128, splits=(0, 0, 1)))
    return folder


@pytest.fixture(scope="module")
def evaluate(corpus: Path, model: VideoLlama, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the script; the rows of its report by name."""
    script = importlib.import_module("video_llama.cli.evaluate")
    file = tmp_path_factory.mktemp("figures") / "figures.json"

    def run(*arguments: str) -> dict[str, dict[str, float]]:
        assert script.main(["--model", NAME, "--data", str(corpus), "--json", str(file), *arguments]) == 0
        return {row["name"]: row for row in json.loads(file.read_text())["rows"]}

    return run


def test_the_model_is_small_and_says_what_it_is() -> None:
    folder = PACKAGED_MODELS / NAME
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    assert "knows nothing of the world" in (folder / "README.md").read_text(encoding="utf-8")


def test_it_describes_the_sample_clip_and_remembers_it_over_several_turns(model: VideoLlama) -> None:
    chat = Chat(model)
    upload = chat.upload_video(SAMPLE)
    assert upload.sound == "heard"
    answers = []
    for question in ("What happens in the video?", "And what colour is it?", "And what did you hear?"):
        chat.ask(question)
        answers.append(chat.answer())
    assert "two large yellow stars" in answers[0].lower()
    assert "left" in answers[0]
    assert "yellow" in answers[1]
    assert "beeps" in answers[2]


def test_it_says_that_there_is_no_sound_track(model: VideoLlama) -> None:
    chat = Chat(model)
    chat.upload_video_without_audio(SAMPLE)
    chat.ask("What do you hear?")
    assert "no sound track" in chat.answer()


def test_the_sound_of_a_clip_alone_is_heard(model: VideoLlama) -> None:
    chat = Chat(model)
    chat.upload_audio(SAMPLE)
    chat.ask("What do you hear?")
    assert "beeps" in chat.answer()


@pytest.mark.slow
def test_encoders_and_q_formers_in_bfloat16_change_no_answer(corpus: Path, model: VideoLlama) -> None:
    clips = [SAMPLE, *sorted(corpus.rglob("*.mp4"))[:7]]
    halved = load_pretrained_model(NAME, device="cpu", half=False, verbose=False)
    halved.model.video_branch.to(torch.bfloat16)
    halved.model.audio_branch.to(torch.bfloat16)
    for question in ("Please describe this in detail.", "What do you hear?"):
        answers = [one.caption(clips, question, batch_size=8, max_new_tokens=40) for one in (model, halved)]
        assert answers[0] == answers[1]


@pytest.mark.slow
def test_it_answers_rightly_on_fresh_clips_pictures_and_sounds(evaluate: Any) -> None:
    rows = evaluate()
    for name in ("clips: colour", "clips: shape", "clips: size", "clips: count", "stills: colour", "stills: shape"):
        assert rows[name]["accuracy"] >= 0.9, name
    assert rows["clips: motion"]["accuracy"] >= 0.85
    assert rows["clips: sound"]["accuracy"] >= 0.9
    assert rows["sounds: sound"]["accuracy"] >= 0.9
    assert rows["all first questions"]["accuracy"] >= 0.9
    assert rows["second turns"]["accuracy"] >= 0.9


@pytest.mark.slow
def test_without_the_order_of_frames_it_cannot_tell_the_motion_but_the_colour(evaluate: Any) -> None:
    rows = evaluate("--ablate", "shuffle_frames", "--limit", "16")
    assert rows["clips: motion"]["accuracy"] <= 0.5
    assert rows["clips: colour"]["accuracy"] >= 0.85


def test_the_tiny_configuration_finds_it_too(no_network: None) -> None:
    config = load_config(ROOT / "eval_configs/tiny.yaml")
    assert build_model(config.model, device="cpu").has_audio


def test_the_demo_prints_answers_frames_and_sound(capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["What happens in the video?", "And what did you hear?"]
    assert demo_video.main(["--model", NAME, "--input", str(SAMPLE), "--question", *questions]) == 0
    output = capsys.readouterr().out
    assert "8 frames, one every 0.5 s; audio: all of its 4 s" in output
    assert "audio: all of its 4 s" in output
    assert "stars" in output
    assert "beeps" in output
