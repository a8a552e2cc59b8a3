"""The pipelines of transformers answer as `Chat` does."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import pipeline

from tests.ecosystem.conftest import ABOUT_IMAGE, ABOUT_VIDEO, IMAGE, SMALL_MODEL, VIDEO, ask
from video_llama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor

pytestmark = pytest.mark.slow

TASKS = ["any-to-any", "image-text-to-text"]


def build_pipeline(task: str) -> transformers.Pipeline:
    try:
        return pipeline(task, model=str(SMALL_MODEL), dtype=torch.float32)
    except ImportError as error:
        # Earlier versions of transformers want a package for audio that this model does not need.
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_answers_as_chat_and_generate_do(
    task: str, chat_answer: str, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor
) -> None:
    messages = ask("video", VIDEO, ABOUT_VIDEO)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    generated = processor.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True)[0]
    assert generated.strip() == chat_answer
    outputs = build_pipeline(task)(messages, max_new_tokens=40, return_full_text=False)
    assert outputs[0]["generated_text"].strip() == chat_answer


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_goes_on_with_the_beginning_of_an_answer(task: str) -> None:
    begun = {"role": "assistant", "content": [{"type": "text", "text": "A picture of one"}]}
    outputs = build_pipeline(task)([*ask("image", IMAGE, ABOUT_IMAGE), begun], max_new_tokens=5)
    text = outputs[0]["generated_text"][-1]["content"][-1]["text"]
    assert text.startswith("A picture of one")
    assert "cross" in text


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_takes_a_prompt_with_its_image(task: str) -> None:
    outputs = build_pipeline(task)(text="<Image><ImageHere></Image> [/INST]", images=str(IMAGE), max_new_tokens=8)
    assert "cross" in outputs[0]["generated_text"]
