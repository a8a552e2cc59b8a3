#!/usr/bin/env python
"""What captioning and training cost on many clips, on paper: operations and bytes from the sizes of the model.

    python benchmarks/estimate_scaling.py                             # 10 million captions, training on 2.5 million
    python benchmarks/estimate_scaling.py --model 13b --frames 32 --decode-seconds 0.5

GPU figures are a vendor's peak times an assumed utilisation: nothing here ran on a GPU. docs/scaling.md explains.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.workload import ClipFlops, Workload, caption_flops, training_flops
from video_llama.checkpoints.memory import build_skeleton, estimate_memory
from video_llama.cli.memory_tables import read_config
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.parts import freeze_for_training

STORED = {"float32": (4.0, 0), "bfloat16": (2.0, 0), "int8": (1.0, 4)}  # bytes of a value, and of each token's scale
ENTRY_BYTES = 256  # checksum, header, the sentence on the sampled frames
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class GPU:
    """Vendors' figures.

    Args:
        teraflops: dense bfloat16 peak.
        gigabytes_per_second: of memory.
    """

    teraflops: float
    gigabytes_per_second: float


GPUS = {
    "L4": GPU(121, 300),
    "RTX 4090": GPU(165, 1008),
    "A100 80 GB": GPU(312, 2039),
    "H100 SXM": GPU(989, 3350),
}


def feature_bytes(config: VideoLlamaConfig, work: Workload, encoding: str) -> float:
    """What the feature cache keeps of one clip: frames and sound are an entry each."""
    value, scale = STORED[encoding]
    frame_tokens, width = work.num_frames * config.num_query_tokens, config.qformer_config.hidden_size
    stored = frame_tokens * (width * value + scale) + ENTRY_BYTES
    if work.num_segments:
        stored += work.num_segments * (config.audio_config.output_size * value + scale) + ENTRY_BYTES
    return stored


def caption_seconds(
    config: VideoLlamaConfig, flops: ClipFlops, work: Workload, gpu: GPU, use: float, batch_size: int
) -> float:
    """Seconds of one GPU for a clip: products at a share of its peak; in writing, each step reads all weights once for
    the whole batch, and each clip's own keys and values."""
    speed, bandwidth = gpu.teraflops * 1e12 * use, gpu.gigabytes_per_second * 1e9 * use
    memory = estimate_memory(config, context_length=work.prompt_tokens(config) + work.num_answer_tokens)
    step = (memory.language_model / batch_size + memory.kv_cache) / bandwidth
    reading = (flops.encoders + flops.branches + flops.prompt) / speed
    return reading + max(work.num_answer_tokens * step, flops.answer / speed)


def restart_interval(save_seconds: float, hours_between_failures: float) -> float:
    """Seconds between two checkpoints that lose least (Young 1974): the square root of 2 * save * time to failure."""
    return math.sqrt(2 * save_seconds * hours_between_failures * SECONDS_PER_HOUR)


def print_clip(name: str, flops: ClipFlops) -> None:
    parts = (flops.encoders, flops.branches, flops.prompt, flops.answer, flops.backward, flops.total)
    print(f"| {name} | {' | '.join(f'{part / 1e12:.2f}' for part in parts)} |")


def print_operations(config: VideoLlamaConfig, captions: Workload, samples: Workload) -> None:
    print("\noperations for one clip, in units of 10^12\n")
    print("| work | frozen encoders | small Q-Formers | read | write | backward | together |")
    print("|---|---|---|---|---|---|---|")
    print_clip("caption", caption_flops(config, captions))
    print_clip("train, encoded", training_flops(config, samples))
    print_clip("train, cached", training_flops(config, samples, is_cached=True))


def print_features(config: VideoLlamaConfig, work: Workload, arguments: argparse.Namespace) -> None:
    print("\nfeature cache\n")
    print("| encoding | of a clip | training corpus | captioned corpus |")
    print("|---|---|---|---|")
    for encoding in STORED:
        size = feature_bytes(config, work, encoding)
        corpora = (f"{size * number / 1e12:.2f} TB" for number in (arguments.training_clips, arguments.captions))
        print(f"| {encoding} | {size / 1e3:.0f} kB | {' | '.join(corpora)} |")


def print_gpus(config: VideoLlamaConfig, captions: Workload, samples: Workload, arguments: argparse.Namespace) -> None:
    flops, use = caption_flops(config, captions), arguments.utilisation
    print(
        f"\n{arguments.captions:,} captions, batches of {arguments.batch_size}; {use:.0%} of vendors' peaks assumed\n"
    )
    print("| GPU | clips/s | GPU-hours | decoding cores for each GPU | MB/s of video for each GPU |")
    print("|---|---|---|---|---|")
    for name, gpu in GPUS.items():
        rate = 1 / caption_seconds(config, flops, captions, gpu, use, arguments.batch_size)
        hours = arguments.captions / rate / SECONDS_PER_HOUR
        cores, traffic = rate * arguments.decode_seconds, rate * arguments.clip_megabytes
        print(f"| {name} | {rate:.1f} | {hours:,.0f} | {cores:.1f} | {traffic:.0f} |")
    print(f"\ntraining, one epoch of {arguments.training_clips:,} clips\n")
    print("| GPU | clips/s encoded | GPU-hours | decoding cores | clips/s cached | GPU-hours | MB/s of features |")
    print("|---|---|---|---|---|---|---|")
    for name, gpu in GPUS.items():
        cells = []
        for is_cached in (False, True):
            rate = gpu.teraflops * 1e12 * use / training_flops(config, samples, is_cached).total
            cells += [f"{rate:.1f}", f"{arguments.training_clips / rate / SECONDS_PER_HOUR:,.0f}"]
            feeding = feature_bytes(config, samples, "bfloat16") / 1e6 if is_cached else arguments.decode_seconds
            cells.append(f"{rate * feeding:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def print_restarts(config: VideoLlamaConfig, arguments: argparse.Namespace) -> None:
    model = build_skeleton(config)
    freeze_for_training(model, ("video_qformer", "video_projection"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = 3 * 4 * trained  # weights and both moments of Adam, float32
    seconds = saved / (arguments.disk_megabytes * 1e6)
    interval = restart_interval(seconds, arguments.hours_between_failures)
    overhead = seconds / interval + interval / (2 * arguments.hours_between_failures * SECONDS_PER_HOUR)
    print(f"\na training checkpoint: {trained / 1e6:.1f} million values, three times in float32: {saved / 1e6:.0f} MB")
    print(
        f"restarts: {seconds:.1f} s to save at {arguments.disk_megabytes:.0f} MB/s and a failure each "
        f"{arguments.hours_between_failures:.0f} hours: save every {interval / 60:.0f} minutes, lose {overhead:.2%}"
    )
    shards, size = (
        math.ceil(arguments.captions / arguments.shard_clips),
        arguments.shard_clips * arguments.clip_megabytes,
    )
    print(f"shards: {shards:,} of {arguments.shard_clips:,} clips, {size / 1e3:.0f} GB each")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="7b, 13b, or a folder written by save_pretrained (7b)")
    parser.add_argument("--captions", type=int, default=10_000_000, metavar="N", help="clips to caption (10 million)")
    parser.add_argument("--training-clips", type=int, default=2_500_000, metavar="N", help="an epoch (2.5 million)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of a clip (8)")
    parser.add_argument("--segments", type=int, default=8, metavar="N", help="of sound when captioning (8); 0: none")
    parser.add_argument("--text-tokens", type=int, default=100, metavar="N", help="of a prompt, besides media (100)")
    parser.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="of a caption (64)")
    parser.add_argument("--label-tokens", type=int, default=32, metavar="N", help="of a training caption (32)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips answered together (32)")
    parser.add_argument("--utilisation", type=float, default=0.4, metavar="X", help="assumed share of peaks (0.4)")
    parser.add_argument("--decode-seconds", type=float, default=0.2, metavar="S", help="of a core for a clip (0.2)")
    parser.add_argument("--clip-megabytes", type=float, default=2.0, metavar="MB", help="assumed size of a clip (2)")
    parser.add_argument("--shard-clips", type=int, default=10_000, metavar="N", help="clips in a shard (10 000)")
    parser.add_argument("--disk-megabytes", type=float, default=200.0, metavar="MB", help="written in a second (200)")
    parser.add_argument("--hours-between-failures", type=float, default=24.0, metavar="H", help="assumed (24)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    config = read_config(arguments.model, use_audio=arguments.segments > 0)
    captions = Workload(arguments.frames, arguments.segments, arguments.text_tokens, arguments.answer_tokens)
    samples = Workload(arguments.frames, 0, arguments.text_tokens, arguments.label_tokens)
    print(f"{arguments.model}: {arguments.frames} frames, {captions.prompt_tokens(config)} tokens of prompt")
    print_operations(config, captions, samples)
    print_features(config, samples, arguments)
    print_gpus(config, captions, samples, arguments)
    print_restarts(config, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
