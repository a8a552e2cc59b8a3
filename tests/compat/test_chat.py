"""The original's `Chat` and `registry`, on the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import video_llama.compat  # noqa: F401
from video_llama import conv_templates, load_pretrained_model
from video_llama.compat.chat import Chat
from video_llama.compat.registry import registry
from video_llama.errors import ConfigError, VideoLlamaError
from video_llama.inference.engine import VideoLlama
from video_llama.prompt_parts import Placeholder

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
STARS, CROSS = SAMPLES / "stars.mp4", SAMPLES / "cross.jpg"
GREEDY: dict[str, Any] = {"temperature": 0.01, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)


@pytest.fixture
def chat(model: VideoLlama) -> Chat:
    return Chat(model, model.processor.media_processor, device="cpu")


def test_files_before_a_question_are_one_message_with_it(chat: Chat, model: VideoLlama) -> None:
    state, media = model.new_conversation(), list[Any]()
    chat.upload_img(CROSS, state, media)
    chat.upload_video_without_audio(STARS, state, media)
    chat.ask("What happens in the video?", state)
    [[role, content]] = state.messages
    assert role == state.roles[0]
    assert content.count(Placeholder("image")) == len(media) == 2
    # The same message as a conversation that was written at once.
    written = model.new_conversation()
    frames = [model.processor.media_processor.process_image(CROSS)]
    frames.append(model.processor.media_processor.process_video(STARS, audio=False)[0])
    written.ask("What happens in the video?")
    assert chat.answer(state, media, **GREEDY)[0] == model.generate(frames, None, written, max_new_tokens=40)


def test_what_max_length_does_not_hold_loses_its_oldest_turns(
    chat: Chat, model: VideoLlama, caplog: pytest.LogCaptureFixture
) -> None:
    state, media = model.new_conversation(), list[Any]()
    chat.upload_img(CROSS, state, media)
    chat.ask("What is in the image?", state)
    chat.answer(state, media, **GREEDY)
    first = len(model.prepare(state.up_to_answer(), media).keys)
    chat.ask("What colour is it?", state)
    assert chat.answer(state, media, max_length=first + 40, **GREEDY)[0]
    assert "its first 1 turn(s) are left out" in caplog.text
    # The caller's conversation keeps all turns; one question alone that is too long is an error.
    assert len(state.messages) == 4
    chat.ask("And?", state)
    with pytest.raises(VideoLlamaError, match="max_length=10 leaves none"):
        chat.answer(state, media, max_length=10, **GREEDY)


def test_unknown_names_are_errors_and_added_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="unknown runner 'runner_iter'; there is one, 'runner_base'"):
        registry.get_runner_class("runner_iter")
    with pytest.raises(ConfigError, match="unknown model 'minigpt4'"):
        registry.get_model_class("minigpt4")
    section = OmegaConf.create({"name": "alpro_video_eval", "n_frms": 4, "image_size": 64, "frames": 5})
    processor = registry.get_processor_class("alpro_video_eval").from_config(section)
    assert (processor.num_frames, processor.image_size) == (4, 64)
    assert "no effect of keys that are none of a configuration: frames" in caplog.text


def test_a_conversation_in_another_template_is_answered_in_that_of_the_weights(chat: Chat, model: VideoLlama) -> None:
    answers = []
    for name in ("default", model.processor.conv_template):
        state, media = conv_templates[name].copy(), list[Any]()
        state.system = " "
        chat.upload_video(STARS, state, media)
        chat.ask("What happens in the video?", state)
        answers.append(chat.answer(state, media, **GREEDY)[0])
        assert state.messages[-1] == [state.roles[1], answers[-1]]
    assert answers[0] == answers[1]
