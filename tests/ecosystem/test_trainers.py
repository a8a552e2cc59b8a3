"""The `Trainer` of transformers, TRL's `SFTTrainer` and a plain loop of accelerate train the model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tests.ecosystem.conftest import ABOUT_IMAGE, IMAGE, SMALL_MODEL, VIDEO, rows
from video_llama import VideoLlamaDataCollator, VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from video_llama.constants import IGNORE_INDEX
from video_llama.errors import ConfigError, DatasetError

pytestmark = pytest.mark.slow

STEPS = 4
ANSWER = "Three small blue rings."


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": 3, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "remove_unused_columns": False,
        **changes,
    }  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learnt_text(processor: VideoLlamaProcessor, batch: Any) -> list[str]:
    """What the labels of each row say."""
    return [processor.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]


# The collator


def test_the_collator_learns_answers_only_and_keeps_all_media(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor
) -> None:
    batch = VideoLlamaDataCollator(processor)(rows())
    assert all(
        text.strip().startswith(ANSWER) and len(text) < len(ANSWER) + 8 for text in learnt_text(processor, batch)
    )
    assert batch["pixel_values"].shape[:2] == (2, processor.media_processor.num_frames)
    assert batch["frame_mask"][1].tolist() == [True] + [False] * (processor.media_processor.num_frames - 1)
    assert len(batch["audio_values"]) == 1
    assert model(**batch).loss.isfinite()


def test_the_collator_takes_columns_flags_nulls_and_request_settings(processor: VideoLlamaProcessor) -> None:
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A.", "loss": False}]
    more = [{"role": "user", "content": "And?", "loss": None}, {"role": "assistant", "content": "B."}]
    row = {"messages": [*turns, *more], "videos": [str(VIDEO)], "images": None}
    batch = VideoLlamaDataCollator(processor, num_frames=2, pad_to_multiple_of=64, load_audio_from_video=True)([row])
    assert learnt_text(processor, batch)[0].strip().startswith("B.")
    assert batch["pixel_values"].shape[1] == 2
    assert batch["input_ids"].shape[1] % 64 == 0


def test_the_collator_refuses_rows_without_anything_to_learn_and_unknown_settings(
    processor: VideoLlamaProcessor,
) -> None:
    with pytest.raises(DatasetError, match="row 0"):
        VideoLlamaDataCollator(processor)([{"text": "hello"}])
    with pytest.raises(DatasetError, match="max_txt_len"):
        VideoLlamaDataCollator(processor, max_txt_len=5)(rows())
    with pytest.raises(ConfigError, match="not both"):
        VideoLlamaDataCollator(processor, num_frames=4, fps=1)
    with pytest.raises(TypeError, match="nummer"):
        VideoLlamaDataCollator(processor, nummer=4)


# transformers and accelerate


def test_the_trainer_learns_saves_resumes_and_evaluates(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    arguments = settings(tmp_path, save_strategy="steps", save_steps=2)
    common = {"train_dataset": rows(), "data_collator": VideoLlamaDataCollator(processor)}
    trainer = Trainer(model, TrainingArguments(**arguments), processing_class=processor, **common)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] / 2
    folder = tmp_path / f"checkpoint-{STEPS}"
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert VideoLlamaProcessor.from_pretrained(folder).conv_template == processor.conv_template
    assert trainer.evaluate(rows())["eval_loss"] < losses(trainer)[0]
    begun = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    again = Trainer(begun, TrainingArguments(**arguments, gradient_checkpointing=True), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[2:] == pytest.approx(losses(trainer)[2:], rel=1e-3)


def test_a_plain_loop_of_accelerate_learns(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor
) -> None:
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(rows(), batch_size=3, collate_fn=VideoLlamaDataCollator(processor))
    prepared = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
    net, optimizer, batches = prepared
    seen = []
    for _ in range(STEPS):
        for batch in batches:
            loss = net(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert seen[-1] < seen[0] / 2


# TRL


def sft_trainer(model: Any, processor: VideoLlamaProcessor, output: Path, data: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    arguments = options.pop("arguments", {})
    config = trl.SFTConfig(**settings(output, bf16=False, max_length=None, **arguments))
    return trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=processor, **options)


def test_trl_learns_answers_about_video_image_and_audio_with_our_collator(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    collator = VideoLlamaDataCollator(processor)
    expected = model.train()(**collator(rows())).loss.item()
    data = datasets.Dataset.from_list(rows())
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = sft_trainer(model, processor, tmp_path, data, data_collator=collator, arguments=skip)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0] / 2
    trainer.save_model(str(tmp_path / "trained"))
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_trl_learns_completions_with_our_collator_as_it_learns_answers(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows()]
    collator = VideoLlamaDataCollator(processor)
    expected = collator(rows())
    data = datasets.Dataset.from_list(split)
    batch = collator([data[number] for number in range(len(data))])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in batch.items())
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1}
    trainer = sft_trainer(model, processor, tmp_path, data, data_collator=collator, arguments=options)
    trainer.train()
    whole = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32).train()
    assert losses(trainer) == [pytest.approx(whole(**expected).loss.item(), rel=1e-3)]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="TRL asks for transformers 5.18")
def test_trl_learns_answers_about_images_with_its_own_collator(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    with Image.open(IMAGE) as file:
        image = file.convert("RGB")
    question, answer = {"role": "user", "content": ABOUT_IMAGE}, {"role": "assistant", "content": ANSWER}
    data = datasets.Dataset.from_list([{"images": [image], "messages": [question, answer]}] * 3)
    trainer = sft_trainer(model, processor, tmp_path, data, arguments={"assistant_only_loss": True})
    batch = trainer.data_collator([data[0], data[1]])
    assert all(text.strip().startswith(ANSWER) for text in learnt_text(processor, batch))
    item = [{"type": "image", "image": image}, {"type": "text", "text": ABOUT_IMAGE}]
    ours = VideoLlamaDataCollator(processor)([{"messages": [{"role": "user", "content": item}, answer]}])
    assert torch.equal(batch["input_ids"][:1], ours["input_ids"])
    assert torch.equal(batch["labels"][:1], ours["labels"])
    assert torch.equal(batch["pixel_values"][:1], ours["pixel_values"])
    expected = model.train()(**ours).loss.item()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0] / 2


def test_our_model_is_what_trl_expects(model: VideoLlamaForConditionalGeneration) -> None:
    assert model.base_model is not model
    assert "labels" in inspect.signature(model.forward).parameters


def test_the_collator_refuses_a_weight_that_no_loss_has(processor: VideoLlamaProcessor) -> None:
    [row, *_] = rows()
    answer = {**row["messages"][-1], "weight": 0.5}
    with pytest.raises(DatasetError, match=r"row 0: 'weight' of a message is 0\.5"):
        VideoLlamaDataCollator(processor)([{**row, "messages": [*row["messages"][:-1], answer]}])
