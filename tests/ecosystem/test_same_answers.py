"""The same answer through every door: of the model as it comes, as TRL saved it, and with its adapter merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from tests.ecosystem.conftest import ABOUT_VIDEO, SMALL_MODEL, VIDEO, ask, rows
from tests.ecosystem.test_adapters import TARGET
from tests.ecosystem.test_pipelines import TASKS
from tests.ecosystem.test_trainers import sft_trainer
from video_llama import (
    Chat,
    VideoLlamaDataCollator,
    VideoLlamaForConditionalGeneration,
    VideoLlamaProcessor,
    load_pretrained_model,
)

pytestmark = pytest.mark.slow

MESSAGES = ask("video", VIDEO, ABOUT_VIDEO)


def generate(model: Any, processor: VideoLlamaProcessor) -> str:
    inputs = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    new = model.eval().generate(**inputs, max_new_tokens=40)
    return str(processor.batch_decode(new, skip_special_tokens=True)[0]).strip()


def ask_chat(folder: Path) -> str:
    chat = Chat(load_pretrained_model(str(folder), half=False))
    chat.upload_video_without_audio(str(VIDEO))
    chat.ask(ABOUT_VIDEO)
    return chat.answer(temperature=0)


def answers(folder: Path) -> dict[str, str]:
    """What a folder answers through each door."""
    whole = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    said = {"chat": ask_chat(folder), "generate": generate(whole, VideoLlamaProcessor.from_pretrained(folder))}
    for task in TASKS:
        try:
            door = pipeline(task, model=str(folder), dtype=torch.float32)
        except ImportError:
            # Earlier versions of transformers want a package for audio that this model does not need.
            continue
        said[task] = door(MESSAGES, max_new_tokens=40, return_full_text=False)[0]["generated_text"].strip()
    return said


@pytest.fixture
def train(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> Callable[..., Any]:
    """Train with TRL, so that answers change."""

    def train(**options: Any) -> Any:
        datasets = pytest.importorskip("datasets")
        arguments = {"dataset_kwargs": {"skip_prepare_dataset": True}, "learning_rate": options.pop("learning_rate")}
        data = datasets.Dataset.from_list(rows()[:1])
        collator = VideoLlamaDataCollator(processor)
        trainer = sft_trainer(
            model, processor, tmp_path / "log", data, data_collator=collator, arguments=arguments, **options
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "trained"))
        return trainer.model

    return train


def test_the_model_as_it_comes(chat_answer: str) -> None:
    assert set(answers(SMALL_MODEL).values()) == {chat_answer}


def test_what_trl_trained_and_saved(
    train: Callable[..., Any], processor: VideoLlamaProcessor, chat_answer: str, tmp_path: Path
) -> None:
    expected = generate(train(learning_rate=1e-3), processor)
    assert expected != chat_answer
    assert set(answers(tmp_path / "trained").values()) == {expected}


def test_a_merged_adapter(
    train: Callable[..., Any], processor: VideoLlamaProcessor, chat_answer: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=8, lora_alpha=32, target_modules=TARGET, task_type="CAUSAL_LM")
    expected = generate(train(learning_rate=2e-2, peft_config=adapter), processor)
    assert expected != chat_answer
    base = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "trained")
    assert generate(loaded, processor) == expected
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    assert set(answers(tmp_path / "merged").values()) == {expected}
