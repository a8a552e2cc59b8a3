"""Sections that look at the device itself and at the encoders."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Bench, Figures, cpu_name, nvidia_smi
from benchmarks.workload import Workload, encoder_flops

PAPER_RATE = 600e12
"""Operations per second that large bfloat16 products reach on an H100, by the plan."""


def card(bench: Bench, figures: Figures) -> None:
    """What the device can do at most, and what it stands in."""
    figures["cpu"], figures["cores"] = cpu_name(), os.cpu_count()
    if bench.on_gpu:
        figures["nvidia_smi"] = nvidia_smi()
        figures["cuda"] = torch.version.cuda
        figures["memory_gib"] = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    figures["copy_tb_s"] = bench.copy_bandwidth / 1e12
    figures["matmul_tflop_s"] = bench.matmul_rate / 1e12


def model(bench: Bench, figures: Figures) -> None:
    """Make the model: random bfloat16 weights on the device."""
    figures["seconds"] = bench.once(lambda: bench.model)
    weights = list(bench.model.model.parameters())
    figures["weights_gib"] = sum(weight.nbytes for weight in weights) / 2**30
    figures["parameters_e9"] = sum(weight.numel() for weight in weights) / 1e9


@torch.inference_mode()
def encoders(bench: Bench, figures: Figures) -> None:
    """Frames through ViT and Q-Former and segments through ImageBind, beside transformers' own at the same sizes."""
    model = bench.model.model
    branch, audio, config = model.video_branch, model.audio_branch, model.config
    for number in bench.sizes.frames:
        pixels = _frames(bench, number)
        row: Figures = {}
        figures[f"{number} frames"] = row
        row["first_call_s"] = bench.once(partial(branch.encode_frames, pixels))
        _rate(bench, row, bench.seconds(partial(branch.encode_frames, pixels)), number)
        model.set_chunk_size(64)  # a number stands for parts of that size, without graphs
        row["without_graphs_ms"] = bench.seconds(partial(branch.encode_frames, pixels)) * 1e3
        model.set_chunk_size("auto")
        text = torch.full((len(pixels), 2), 5, device=bench.device)
        given = {"pixel_values": pixels, "qformer_input_ids": text}
        row["peer_ms"] = bench.seconds(partial(bench.peer.get_video_features, **given)) * 1e3
        row["speed_up"] = row["peer_ms"] / row["ms"]
    attention = {part: getattr(bench.peer, part).config._attn_implementation for part in ("vision_model", "qformer")}
    figures["peer"] = f"InstructBlipVideo, attention {attention}"
    shape = (1, 8, 1, *config.audio_config.input_size)
    sound = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
    seconds = bench.seconds(lambda: audio.encode_segments(sound))
    flops = encoder_flops(config, Workload(num_frames=0, num_segments=8))
    figures["8 segments"] = {"ms": seconds * 1e3, "tflop_s": flops / seconds / 1e12}
    pixels = _frames(bench, bench.sizes.frames[-2])
    profile = bench.kernels(partial(branch.encode_frames, pixels))
    figures["profile_of_frames"] = pixels.shape[0] * pixels.shape[1]
    figures["kernels"] = profile.pop("top")
    figures["profile"] = {"ours": profile}


def _frames(bench: Bench, number: int) -> Any:
    """Random frames as clips of eight: (clips, frames, 3, side, side), bfloat16."""
    side = bench.model.model.config.vision_config.image_size
    at_once = min(number, 8)
    return torch.randn(number // at_once, at_once, 3, side, side, device=bench.device, dtype=torch.bfloat16)


def _rate(bench: Bench, row: Figures, seconds: float, num_frames: int) -> None:
    flops = encoder_flops(bench.model.model.config, Workload(num_frames=num_frames, num_segments=0))
    row["ms"] = seconds * 1e3
    row["frames_s"] = num_frames / seconds
    row["tflop_s"] = flops / seconds / 1e12
    row["of_600"] = flops / seconds / PAPER_RATE
    row["of_matmul"] = flops / seconds / bench.matmul_rate
