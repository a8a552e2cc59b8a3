"""Training against the record: learning rates, weight decay, and 20 optimizer steps of every stage and branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.reference_model import load_inputs, load_reference_model
from tests.parity.test_inventory_parity import STAGE_CONFIGS, STAGES
from tests.parity.test_model_parity import frames_second
from video_llama.checkpoints.load import build_processor
from video_llama.checkpoints.weight_mapping import to_original_name
from video_llama.config import Config, load_config
from video_llama.data.batches import Batch
from video_llama.data.sample_processor import MediaInput
from video_llama.data.tokenization import build_caption_sample, collate_text
from video_llama.inference.engine import VideoLlama
from video_llama.model.parts import freeze_for_training, trained_parts
from video_llama.registry import SCHEDULES
from video_llama.training.optim import split_by_weight_decay
from video_llama.training.trainer import Trainer


def test_learning_rates_are_those_of_the_record(reference_json: Callable[[str], Any]) -> None:
    schedules = reference_json("common/lr_schedule.json")["schedules"]
    assert schedules
    for name, record in schedules.items():
        settings = {key: value for key, value in record["run"].items() if key != "weight_decay"}
        schedule = SCHEDULES.build(settings.pop("lr_sched", "linear_warmup_cosine_lr"), **settings)
        per_epoch, warmup = settings["iters_per_epoch"], settings.get("warmup_steps", 0)
        for epoch, step, lr in record["lr"]:
            ours = schedule.lr(epoch * per_epoch + step)
            if warmup > per_epoch and epoch > 0 and step < warmup:
                # The original counts warm-up steps within the epoch, and so warms up again in each: a mistake.
                continue
            assert ours == pytest.approx(lr, rel=1e-9), (name, epoch, step)


def test_a_warm_up_longer_than_an_epoch_runs_once() -> None:
    schedule = SCHEDULES.build(
        "linear_warmup_cosine_lr",
        init_lr=1.0,
        min_lr=0.0,
        warmup_lr=0.0,
        warmup_steps=15,
        max_epoch=2,
        iters_per_epoch=10,
    )
    assert [schedule.lr(step) for step in range(15)] == pytest.approx([step / 15 for step in range(15)])
    assert schedule.lr(15) < 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_weight_decay_is_split_as_in_the_record(
    stage: str, reference: Path, reference_json: Callable[[str], Any]
) -> None:
    record = reference_json("common/weight_decay_split.json")["configs"][stage]
    model = load_reference_model(reference)
    freeze_for_training(model, trained_parts(load_config(STAGE_CONFIGS / f"{stage}.yaml").model))
    decay, no_decay = split_by_weight_decay(model.named_parameters())
    assert {to_original_name(name) for name in decay} == set(record["decay"])
    assert {to_original_name(name) for name in no_decay} == set(record["no_decay"])


def run_config(record: dict[str, Any], folder: Path) -> Config:
    """The recorded run as a configuration."""
    audio = record["train_flag"] == 1
    config = Config()
    config.model.equip_audio_branch = True
    config.model.frozen_audio_Qformer = not audio
    config.model.frozen_video_Qformer = config.model.frozen_llama_proj = audio
    for key, value in record["run"].items():
        setattr(config.run, key, value)
    config.run.beta2 = record["adamw"]["betas"][1]
    config.run.output_dir = str(folder)
    config.run.device, config.run.amp = "cpu", False
    return config


def recorded_batch(
    record: dict[str, Any], step: int, files: dict[str, dict[str, Tensor]], wrapper: VideoLlama
) -> Batch:
    entry = record["batches"][step % len(record["batches"])]
    audio = record["train_flag"] == 1
    config, tokenizer = wrapper.model.config, wrapper.processor.tokenizer
    kind = "audio" if audio else "image"
    token_id, length = wrapper.processor.placeholder_ids[kind], wrapper.processor.placeholder_lengths[kind]
    if "text_input" in entry:
        samples = [
            build_caption_sample(
                caption,
                tokenizer,
                placeholder=(token_id, length),
                end_sym=record["end_sym"],
                max_txt_len=record["max_txt_len"],
            )
            for caption in entry["text_input"]
        ]
        text = collate_text(samples, tokenizer.pad_token_id)
    else:
        text = {
            name: files["full/inputs"][entry[name].split(": ")[1]] for name in ("input_ids", "labels", "attention_mask")
        }
        theirs = config.text_config.vocab_size  # the original's placeholder is the id behind its vocabulary
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == theirs, token_id)
    frames = frames_second(files["train/inputs"][entry.get("image") or entry["images"]])
    media = [MediaInput("audio_pixel_values" if audio else "pixel_values", item) for item in frames]
    return Batch(step, text, media, [str(number) for number in range(len(frames))])


def is_noise(name: str, record: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> bool:
    """Whether the true gradient is zero, so that AdamW blows rounding errors up to whole steps."""
    if name.endswith("key.bias"):
        return True
    # Attention to a single segment does not depend on queries and keys.
    batches = (
        frames_second(files["train/inputs"][entry.get("image") or entry["images"]]) for entry in record["batches"]
    )
    sees_one = record["train_flag"] == 1 and all(frames.shape[1] == 1 for frames in batches)
    return sees_one and "crossattention.attention" in name and ("query" in name or "key" in name)


@pytest.mark.slow
def test_twenty_steps_of_every_stage_and_branch_end_at_the_recorded_parameters(
    reference: Path, reference_json: Callable[[str], Any], tmp_path: Path
) -> None:
    if not (reference / "train").is_dir():
        pytest.skip("this folder of reference data has no training runs")
    files = {name: load_inputs(reference / f"{name}.safetensors") for name in ("train/inputs", "full/inputs")}
    final = load_file(reference / "train/final_params.safetensors")
    runs = reference_json("train/runs.json")["runs"]
    assert {run["kind"] for run in runs} >= {"stage1_vision", "stage2_vision"}  # the compact copy has no more
    for record in runs:
        model = load_reference_model(reference)
        wrapper = VideoLlama(model, build_processor(model.config, reference / "tokenizer", "v1"))
        trainer = Trainer(run_config(record, tmp_path / record["kind"]), model=wrapper, datasets=[])
        steps = [trainer.step([recorded_batch(record, i, files, wrapper)]) for i in range(len(record["losses"]))]
        assert [step.lr for step in steps] == pytest.approx(record["lr"], rel=1e-9)
        assert [step.loss for step in steps] == pytest.approx(record["losses"], rel=1e-4), record["kind"]
        compared = 0
        for name, parameter in model.named_parameters():
            recorded = final.get(f"{record['kind']}/{to_original_name(name)}")
            assert (recorded is not None) == parameter.requires_grad, name
            if recorded is not None and not is_noise(name, record, files):
                torch.testing.assert_close(
                    parameter.detach(), recorded, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
                compared += 1
        assert compared
