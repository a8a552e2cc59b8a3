"""The section that trains: both stages, with the frozen encoders run each time and with their outputs cached."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.harness import Bench, Figures
from benchmarks.workload import Workload, training_flops
from video_llama.config import Config
from video_llama.data.batches import Batch
from video_llama.data.sample_processor import MediaInput
from video_llama.model.parts import freeze_for_training
from video_llama.training.memory import TrainingSample, estimate_training_memory
from video_llama.training.trainer import Trainer

NUM_FRAMES = 8
PEAK_RATE = 989e12
"""Operations per second of an H100 or H200 in dense bfloat16, by the vendor."""
GIB = 2**30


def training(bench: Bench, figures: Figures) -> None:
    """Steps as a run makes them, without reading data."""
    bench.forget()
    before = bench.allocated() - sum(weight.nbytes for weight in bench.model.model.parameters())
    ways = {"": False, ", compiled": True} if bench.on_gpu else {"": False}  # compiling takes a CPU long
    for way, compiled in ways.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        _stages(bench, figures, make_trainer(bench, compiled), way, before)


def _stages(bench: Bench, figures: Figures, trainer: Any, way: str, before: int) -> None:
    """Both stages, encoded and from cached features."""
    config = bench.model.model.config
    parts = ("video_qformer", "video_projection")
    for stage, batch_size, num_tokens, num_answers in bench.sizes.stages:
        words = num_tokens - num_answers - config.num_video_query_tokens
        work = Workload(NUM_FRAMES, 0, words, num_answers)
        sample = TrainingSample(num_tokens, num_answers, NUM_FRAMES, 0)
        estimate = estimate_training_memory(config, parts, sample, batch_size=batch_size).total
        for is_cached in (False, True):
            batch = make_batch(bench, batch_size, num_tokens, num_answers, is_cached)
            row: Figures = {}
            name = f"{stage}, {'cached' if is_cached else 'encoded'}{way}"
            figures[name] = row
            row["first_call_s"] = bench.once(partial(trainer.step, [batch]))
            bench.allocated()
            peak = bench.peak(partial(trainer.step, [batch])) - before
            seconds = bench.seconds(partial(trainer.step, [batch]), repeats=5, warmup=1)
            flops = batch_size * training_flops(config, work, is_cached).total
            row["ms_step"] = seconds * 1e3
            row["steps_s"], row["samples_s"] = 1 / seconds, batch_size / seconds
            row["tflop_s"] = flops / seconds / 1e12
            row["of_989"] = flops / seconds / PEAK_RATE
            row["of_matmul"] = flops / seconds / bench.matmul_rate
            row["peak_gib"], row["estimate_gib"] = peak / GIB, estimate / GIB
            row["peak_to_estimate"] = peak / estimate
            profile = bench.kernels(partial(trainer.step, [batch]))
            row["device_ms"], row["launched"] = profile["device_ms"], profile["launched"]
            row["host_alone_ms"] = max(0.0, row["ms_step"] - profile["device_ms"])
            figures[f"{name}: kernels"] = profile["top"]
        encoded, cached = (figures[f"{stage}, {kind}{way}"]["ms_step"] for kind in ("encoded", "cached"))
        figures[f"{stage}, cached{way}"]["faster_than_encoded"] = encoded / cached
        if not way:
            plain = figures[f"{stage}, cached"]["ms_step"]
            figures[f"{stage}, cached"]["deterministic_costs"] = _deterministic(bench, trainer, batch) / plain


def make_trainer(bench: Bench, compiled: bool = False) -> Any:
    """A trainer of the vision branch of the model, without data; what trains becomes float32."""
    model = bench.model
    parts = ("video_qformer", "video_projection")
    freeze_for_training(model.model, parts)
    for weight in model.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    config = Config()
    config.model.frozen_video_Qformer = config.model.frozen_llama_proj = False
    config.run.device, config.run.amp = bench.device.type, bench.on_gpu
    config.run.compile = compiled
    config.run.output_dir = str(bench.output / f"run_{os.getpid()}")
    config.run.max_epoch, config.run.iters_per_epoch = 1, 1_000
    return Trainer(config, model=model, datasets=[])


def make_batch(bench: Bench, size: int, num_tokens: int, num_answers: int, is_cached: bool) -> Batch:
    """Random frames, or random features in the place of what the encoders make of them, and random text."""
    config = bench.model.model.config
    side, width = config.vision_config.image_size, config.qformer_config.hidden_size
    generator = torch.Generator().manual_seed(size)
    shape = (NUM_FRAMES, config.num_query_tokens, width) if is_cached else (NUM_FRAMES, 3, side, side)

    def values() -> Tensor:
        if is_cached:
            return torch.randn(shape, generator=generator).to(torch.bfloat16)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    media = [MediaInput("pixel_values", values(), is_encoded=is_cached) for _ in range(size)]
    ids = torch.randint(3, config.text_config.vocab_size, (size, num_tokens), generator=generator)
    ids[:, 1 : 1 + config.num_video_query_tokens] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -num_answers:] = ids[:, -num_answers:]
    text = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return Batch(0, text, media, [str(number) for number in range(size)])


def _deterministic(bench: Bench, trainer: Any, batch: Batch) -> float:
    """Milliseconds of a step with deterministic algorithms (cuBLAS keeps the workspace it began with)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return bench.seconds(partial(trainer.step, [batch]), repeats=5, warmup=2) * 1e3
    finally:
        torch.use_deterministic_algorithms(False)
