"""The command `video-llama caption`: one line of JSON for each clip, written as it comes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_llama.cli.caption_report import report_left_out, report_result
from video_llama.cli.command import CommandParser, numbered, run_command
from video_llama.cli.models import choose_options, show_model
from video_llama.cli.options import (
    add_answer_options,
    add_base_option,
    add_precision_options,
    number,
    positive,
    whole_number,
)
from video_llama.errors import ConfigError
from video_llama.utils.extras import require_extra

if TYPE_CHECKING:
    import torch

    from video_llama.captioning import CaptionFile, CorpusSettings, RunProfile
    from video_llama.captioning.inputs import Clip
    from video_llama.inference.generation import GenerationOptions
    from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["main"]

DESCRIPTION = """\
Caption many videos: one line of JSON for each, written as it comes.

    video-llama caption clips/ --model CHECKPOINTS --output captions.jsonl
    video-llama caption clips/ --model CHECKPOINTS --output captions.jsonl --resume
    video-llama caption 'day1/*.mp4' list.csv 'shards/{0000..0099}.tar' --model … --output …
    video-llama caption lecture.mp4 --segment-seconds 60 --model … --output …
    torchrun --nproc_per_node=8 -m video_llama caption clips/ --model … --output captions.jsonl
    video-llama caption clips/ --launcher ray --model … --output captions.jsonl
    video-llama caption clips/ --engine vllm --model FOLDER --output captions.jsonl

An input is a video (or image or audio file), a folder, a pattern, a list (.txt, .csv) or a webdataset shard. Under
torchrun or accelerate launch, and with --num-shards, each process captions its part and writes a file of its own:
captions-00000-of-00008.jsonl. On a cluster of Ray one command captions on all GPUs and writes one file. The exit status
is 0 if all clips were captioned, else 1.
"""
TERMINATED = 143


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, patterns, lists, shards")
    add("--output", type=Path, required=True, metavar="FILE", help="captions as JSON lines")
    add("--prompt", metavar="TEXT", help="the question about every clip")
    add("--resume", action="store_true", help="continue after a stop; finished clips stay as they are")
    audio = add("--audio", action=argparse.BooleanOptionalAction, default=True)
    # Given above, Python 3.10 would add a default of its own.
    audio.help = "use audio tracks, if the model has an audio branch (default: --audio)"
    windows = "caption long videos window by window, each of S seconds"
    add("--segment-seconds", type=number(0.1), metavar="S", help=windows)
    add("--num-frames", type=positive, metavar="N", help="frames of each clip or window")
    add("--video-reader", metavar="NAME", help="decoder of frames: pyav or decord (default: pyav)")
    add("--allow-urls", action="store_true", help="download inputs that are http or https addresses (also of lists)")

    model = parser.add_argument_group("the model")
    model.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder, file or hub id")
    add_base_option(model)
    add_precision_options(model)
    add_answer_options(parser.add_argument_group("how to answer"))
    _add_speed_options(parser.add_argument_group("speed"))
    return parser


def _add_speed_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    clips = "clips answered together (default: what fits a GPU; 8 on a CPU)"
    add("--batch-size", type=positive, metavar="N", help=clips)
    workers = "processes that decode ahead (default: for a GPU, all cores; for a CPU, 2)"
    add("--workers", type=whole_number(), metavar="N", help=workers)
    timeout = "a clip or window that a worker decodes longer gets an error (default: 600)"
    add("--decode-timeout", type=number(0.1), default=600.0, metavar="S", help=timeout)
    add("--num-shards", type=positive, default=1, metavar="N", help="parts the work is split into (default: 1)")
    launcher = "caption on all nodes of a Ray cluster, with the clips' paths and the model on each (default: here)"
    add("--launcher", choices=["ray"], help=launcher)
    engine = "what runs the model (default: the package itself); vllm needs --model to be a saved folder"
    add("--engine", choices=["vllm"], help=engine)
    add("--engine-options", metavar="JSON", help="with --engine vllm: further arguments of vllm.LLM")
    add("--shard-id", type=whole_number(), default=0, metavar="I", help="the part of this process, from 0 (default: 0)")
    static = "keys and values of fixed size, and on a GPU one CUDA graph a token (default: on a GPU, where it can be)"
    add("--static-cache", action=argparse.BooleanOptionalAction, help=static)
    fuse = "also fuse that step with torch.compile (takes seconds at the start)"
    add("--compile", action="store_true", help=fuse)
    add("--profile", type=Path, metavar="FILE", help="where the time went, as JSON, at the end")


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


def check_launcher(num_parts: int) -> None:
    """Check that a run on a cluster is possible.

    Raises:
        ConfigError: Ray is not installed, or the work is split otherwise, too.
    """
    if num_parts > 1:
        raise ConfigError("--launcher ray divides the work itself: start it once, without torchrun and --num-shards")
    require_extra("ray", "--launcher ray")


def check_engine(arguments: argparse.Namespace, options: GenerationOptions) -> None:
    """Check that a run with the chosen engine is possible.

    Raises:
        ConfigError: vLLM is not installed, or cannot take an option.
    """
    from video_llama.integrations.vllm.options import check_options, parse_engine_options

    if arguments.engine is None:
        if arguments.engine_options is not None:
            raise ConfigError("--engine-options belongs to --engine vllm")
        return
    example = '--engine-options \'{"tensor_parallel_size": 2, "quantization": "bitsandbytes"}\''
    refused = {
        "--launcher ray": (arguments.launcher, "use --num-shards on several machines"),
        "torchrun": (int(os.environ.get("WORLD_SIZE", 1)) > 1, f"vLLM starts its processes itself: {example}"),
        "--device": (arguments.device, "vLLM runs on what it was built for; CUDA_VISIBLE_DEVICES chooses GPUs"),
        "--model-base": (arguments.model_base, "make one folder first: video-llama convert"),
        "--load-in-8bit": (arguments.load_in_8bit, f"quantization is vLLM's: {example}"),
        "--load-in-4bit": (arguments.load_in_4bit, f"quantization is vLLM's: {example}"),
    }
    for name, (is_given, hint) in refused.items():
        if is_given:
            raise ConfigError(f"--engine vllm cannot be used with {name}: {hint}")
    check_options(options)
    parse_engine_options(arguments.engine_options)
    require_extra("vllm", "--engine vllm")


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
    """Caption what is missing; return 1 if some clips could not be captioned."""
    from video_llama.captioning import CaptionFile, CorpusSettings, RunProfile, file_of_shard, find_clips, take_shard
    from video_llama.inference.captioning import DEFAULT_PROMPT
    from video_llama.media.decode import check_video_reader
    from video_llama.utils.files import check_output_file

    if arguments.video_reader is not None:
        check_video_reader(arguments.video_reader)
    if arguments.profile is not None:
        check_output_file(arguments.profile, "--profile")
    num_parts, part = whole_part(arguments.num_shards, arguments.shard_id)
    options = choose_options(arguments, static_cache=arguments.static_cache, compile=arguments.compile)
    check_engine(arguments, options)
    device = arguments.device
    if arguments.launcher == "ray":
        check_launcher(num_parts)
    else:
        device = device_of_process(device)
    left_out: list[Path] = []
    clips = take_shard(find_clips(arguments.inputs, left_out.append), num_parts, part)
    if part == 0:
        report_left_out(left_out)
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
    for name in ("video_reader", "model_base", "engine_options"):
        if getattr(arguments, name) is not None:
            begun_with[name] = getattr(arguments, name)
    with CaptionFile(arguments.output, num_parts, part, begun_with, arguments.resume) as file:
        todo = sum(not file.is_complete(clip.id) for clip in clips)
        where = ""
        if num_parts > 1:
            where = f" (part {part} of {num_parts})"
        sys.stderr.write(f"{numbered(len(clips), 'clip')}{where}, {len(clips) - todo} done before, to {file.path}\n")
        if todo:
            profile = RunProfile()
            caption = _caption_here
            if arguments.launcher == "ray":
                caption = _caption_on_cluster
            elif arguments.engine == "vllm":
                caption = _caption_with_vllm
            caption(arguments, device, clips, file, settings, todo, profile)
            sys.stderr.write(f"{profile.summary()}\n")
            if arguments.profile is not None:
                profile.save(file_of_shard(arguments.profile, num_parts, part))
    return report_result(clips, file)


@contextmanager
def _show_progress(todo: int) -> Iterator[Callable[[int], None]]:
    """Yield what is to be called after each record, with the number of missing windows that it reveals."""
    from tqdm import tqdm

    bar: Any
    with tqdm(total=todo, unit="clip", position=int(os.environ.get("LOCAL_RANK", 0)), smoothing=0.05) as bar:

        def advance(new_windows: int) -> None:
            bar.total += new_windows
            bar.update()

        yield advance


def _what_to_load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load_pretrained_model`, without the device."""
    names = ("model_base", "dtype", "load_in_8bit", "load_in_4bit", "allow_urls")
    load = {"model_path": arguments.model} | {name: getattr(arguments, name) for name in names}
    if not arguments.audio:
        load["audio"] = False
    return load


def _prepare_reading(
    arguments: argparse.Namespace,
    settings: CorpusSettings,
    processor: VideoLlamaProcessor,
    device: torch.device,
    processes: int = 1,
) -> CorpusSettings:
    """Let the processor read clips as the options say; return the settings with the number of workers."""
    from video_llama.captioning import default_workers

    media = replace(processor.media_processor, allow_urls=arguments.allow_urls)
    if arguments.video_reader is not None:
        media = replace(media, video_reader=arguments.video_reader)
    processor.media_processor = media
    workers = arguments.workers
    if workers is None:
        workers = default_workers(device, processes)
    return replace(settings, num_workers=max(0, workers))


def _caption_here(
    arguments: argparse.Namespace,
    device: str | None,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    todo: int,
    profile: RunProfile,
) -> None:
    """Load the model and caption what the file lacks."""
    from video_llama.captioning import caption_corpus
    from video_llama.inference.load import load_pretrained_model

    model = load_pretrained_model(**_what_to_load(arguments), device=device)
    show_model(model)
    # Loading is not a part of what scales with the clips.
    profile.begin()
    settings = _prepare_reading(arguments, settings, model.processor, model.device, local_processes())
    with _show_progress(todo) as advance:
        caption_corpus(model, clips, file, settings, advance, profile)


def _caption_with_vllm(
    arguments: argparse.Namespace,
    device: str | None,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    todo: int,
    profile: RunProfile,
) -> None:
    """Caption what the file lacks with vLLM."""
    import torch

    from video_llama.captioning.corpus import build_reader, caption_with
    from video_llama.integrations.vllm.captioner import VllmCaptioner
    from video_llama.integrations.vllm.options import parse_engine_options

    captioner = VllmCaptioner(
        arguments.model,
        settings.prompt,
        settings.options,
        settings.batch_size,
        audio=settings.audio,
        dtype=arguments.dtype,
        engine_options=parse_engine_options(arguments.engine_options),
    )
    processor = captioner.processor
    settings = _prepare_reading(arguments, settings, processor, torch.device(captioner.device_type))
    with captioner, _show_progress(todo) as advance:
        profile.begin()
        caption_with(captioner, build_reader(processor, settings), clips, file, settings, advance, profile)


def _caption_on_cluster(
    arguments: argparse.Namespace,
    device: str | None,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    todo: int,
    profile: RunProfile,
) -> None:
    """Caption what the file lacks with Ray."""
    from video_llama.integrations.ray.captioner import ModelSource
    from video_llama.integrations.ray.driver import caption_on_cluster

    source = ModelSource(_what_to_load(arguments), arguments.video_reader)
    with _show_progress(todo) as advance:
        caption_on_cluster(clips, file, settings, source, advance, profile, device, arguments.workers)


class Terminated(BaseException):
    """A SIGTERM, by which schedulers end a job."""


def _terminate(signal_number: int, frame: Any) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser(prog).parse_args(argv)
    # Workers are forked after the tokenizer's first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return run_command(run, arguments, interrupted="stopped; continue with --resume")
    except Terminated:
        sys.stderr.write("\nterminated; continue with --resume\n")
        return TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
