#!/usr/bin/env python
"""Caption many videos: one line of JSON for each, written as it comes.

    python scripts/caption_videos.py clips/ --model CHECKPOINTS --output captions.jsonl
    python scripts/caption_videos.py clips/ --model CHECKPOINTS --output captions.jsonl --resume
    python scripts/caption_videos.py 'day1/*.mp4' list.csv 'shards/{0000..0099}.tar' --model … --output …
    python scripts/caption_videos.py lecture.mp4 --segment-seconds 60 --model … --output …
    torchrun --nproc_per_node=8 scripts/caption_videos.py clips/ --model … --output captions.jsonl

An input is a video (or image or audio file), a folder, a pattern, a list (.txt, .csv) or a webdataset shard. Under
torchrun or accelerate launch, and with --num-shards, each process captions its part and writes a file of its own:
captions-00000-of-00008.jsonl. The exit status is 0 if all clips were captioned, else 1.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# A waiting OpenMP thread that spins makes token-by-token decoding several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers are forked after the tokenizer's first use.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from video_llama.errors import ConfigError, VideoLlamaError

SOME_FAILED, INTERRUPTED, TERMINATED = 1, 130, 143


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0.1, not {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, patterns, lists, shards")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="captions as JSON lines")
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder, file or hub id")
    parser.add_argument(
        "--model-base",
        metavar="PATH",
        help="the language model, if it is not in the folder of --model; the whole model, if that is an adapter",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the question about every clip")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="clips answered together (what fits a GPU; 8 on a CPU)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode ahead (for a GPU, all cores; for a CPU, 2)"
    )
    parser.add_argument(
        "--decode-timeout",
        type=seconds,
        default=600.0,
        metavar="S",
        help="a clip or window that a worker decodes longer gets an error (600)",
    )
    parser.add_argument("--resume", action="store_true", help="continue after a stop; finished clips stay as they are")
    parser.add_argument("--num-shards", type=positive, default=1, metavar="N", help="parts the work is split into (1)")
    parser.add_argument("--shard-id", type=int, default=0, metavar="I", help="the part of this process, from 0 (0)")
    parser.add_argument(
        "--audio",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use audio tracks (if the model can)",
    )
    parser.add_argument("--segment-seconds", type=seconds, metavar="S", help="caption long videos window by window")
    parser.add_argument("--num-frames", type=positive, metavar="N", help="frames of each clip or window")
    parser.add_argument("--video-reader", metavar="NAME", help="decoder of frames: pyav or decord (pyav)")
    parser.add_argument("--max-new-tokens", type=positive, default=300, metavar="N", help="longest caption (300)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beam search width (1)")
    parser.add_argument(
        "--static-cache",
        action=argparse.BooleanOptionalAction,
        help="keys and values of fixed size, and on a GPU one CUDA graph a token (on a GPU, where it can be)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also fuse that step with torch.compile (takes seconds at the start)",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where the time went, as JSON, at the end")
    parser.add_argument(
        "--allow-urls", action="store_true", help="download inputs that are http or https addresses (also of lists)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="by default a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="precision (auto)"
    )
    parser.add_argument("--load-in-8bit", action="store_true", help="language model in 8 bit (needs bitsandbytes)")
    parser.add_argument("--load-in-4bit", action="store_true", help="language model in 4 bit (needs bitsandbytes)")
    return parser


def whole_part(num_shards: int, shard_id: int) -> tuple[int, int]:
    """Return (parts, number of this one): each shard is divided among the processes of torchrun or accelerate launch.

    Raises:
        ConfigError: there is no such shard, or the environment contradicts itself.
    """
    try:
        processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE and RANK are set, but not to numbers ({error})") from error
    if not 0 <= shard_id < num_shards:
        raise ConfigError(f"there is no shard {shard_id} of {num_shards}; they are numbered from 0")
    if not 0 <= rank < processes:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {processes}")
    return num_shards * processes, shard_id * processes + rank


def local_processes() -> int:
    """Return how many processes of the launcher run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def device_of_process(device: str | None) -> str | None:
    """Return the device of this process: on a machine with GPUs one of its own, which becomes the current one.

    Raises:
        ConfigError: one GPU is named for several processes.
    """
    import torch

    rank, processes = os.environ.get("LOCAL_RANK"), local_processes()
    if rank is None:
        return device
    if device is not None and device.startswith("cuda:") and processes > 1:
        raise ConfigError(
            f"--device {device} would put all {processes} processes on one GPU; leave it out, and each takes its own"
        )
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    gpus = torch.cuda.device_count()
    if processes > gpus and int(rank) == 0:
        logging.warning("%d processes share %d GPU(s): each loads the whole model", processes, gpus)
    chosen = int(rank) % gpus
    torch.cuda.set_device(chosen)
    return f"cuda:{chosen}"


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from video_llama.captioning import (
        CaptionFile,
        CorpusSettings,
        RunProfile,
        caption_corpus,
        default_workers,
        file_of_shard,
        find_clips,
        take_shard,
    )
    from video_llama.inference.captioning import DEFAULT_PROMPT
    from video_llama.inference.generation import GenerationOptions
    from video_llama.inference.load import load_pretrained_model
    from video_llama.media.decode import check_video_reader
    from video_llama.utils.files import make_folder

    if arguments.video_reader is not None:
        check_video_reader(arguments.video_reader)
    if arguments.profile is not None:
        make_folder(arguments.profile.parent, "--profile")
    num_parts, part = whole_part(arguments.num_shards, arguments.shard_id)
    device = device_of_process(arguments.device)
    clips = take_shard(find_clips(arguments.inputs), num_parts, part)
    try:
        options = GenerationOptions(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            num_beams=arguments.num_beams,
            static_cache=arguments.static_cache,
            compile=arguments.compile,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    settings = CorpusSettings(
        arguments.prompt or DEFAULT_PROMPT,
        options,
        arguments.batch_size,
        num_frames=arguments.num_frames,
        audio=arguments.audio,
        window_seconds=arguments.segment_seconds,
        decode_seconds=arguments.decode_timeout,
    )
    precision = {name: getattr(arguments, name) for name in ("dtype", "load_in_8bit", "load_in_4bit")}
    begun_with = {"model": arguments.model, **precision, **settings.of_captions()}
    for name in ("video_reader", "model_base"):
        if getattr(arguments, name) is not None:
            begun_with[name] = getattr(arguments, name)
    with CaptionFile(arguments.output, num_parts, part, begun_with, arguments.resume) as file:
        todo = sum(not file.is_complete(clip.id) for clip in clips)
        where = f" (part {part} of {num_parts})" if num_parts > 1 else ""
        print(f"{len(clips)} clips{where}, {len(clips) - todo} of them done, to {file.path}", file=sys.stderr)
        failed = sum(file.has_failed(clip.id) for clip in clips)
        if todo:
            model = load_pretrained_model(
                arguments.model,
                arguments.model_base,
                device=device,
                dtype=arguments.dtype,
                load_in_8bit=arguments.load_in_8bit,
                load_in_4bit=arguments.load_in_4bit,
                audio=None if arguments.audio else False,
                allow_urls=arguments.allow_urls,
            )
            workers = arguments.workers
            if workers is None:
                workers = default_workers(model.device, local_processes())
            settings = replace(settings, num_workers=max(0, workers))
            if arguments.video_reader is not None:
                media = replace(model.processor.media_processor, video_reader=arguments.video_reader)
                model.processor.media_processor = media
            with tqdm(total=todo, unit="clip", position=int(os.environ.get("LOCAL_RANK", 0)), smoothing=0.05) as bar:

                def advance(new_windows: int) -> None:
                    bar.total += new_windows
                    bar.update()

                profile = RunProfile()
                failed = caption_corpus(model, clips, file, settings, advance, profile)
            print(profile.summary(), file=sys.stderr)
            if arguments.profile is not None:
                profile.save(file_of_shard(arguments.profile, num_parts, part))
    if failed:
        print(f"{failed} of {len(clips)} clips could not be captioned; their lines have an error", file=sys.stderr)
    return SOME_FAILED if failed else 0


class Terminated(BaseException):
    """A SIGTERM, by which schedulers end a job."""


def terminate(signal_number: int, frame: Any) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    arguments: Any = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore", message=r"Passing `repetition_penalty` with `inputs_embeds`")  # as intended
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return run(arguments)
    except VideoLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return SOME_FAILED
    except KeyboardInterrupt:
        print("\nstopped; continue with --resume", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("\nterminated; continue with --resume", file=sys.stderr)
        return TERMINATED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
