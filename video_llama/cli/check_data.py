"""The command `video-llama check-data`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from video_llama.cli.command import CommandParser, numbered, run_command
from video_llama.cli.options import whole_number
from video_llama.errors import ConfigError

if TYPE_CHECKING:
    from video_llama.data.checking import DatasetCheck
    from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["main"]

DESCRIPTION = """\
Check the datasets of a training configuration: counts, absent files, media that cannot be decoded, texts that are
too long, and a few samples as the model sees them.

    video-llama check-data configs/train/visionbranch_stage2_finetune.yaml
    video-llama check-data my.yaml --decode all --bad bad.jsonl --options model.max_txt_len=512

Of the model only the tokenizer is read. The exit status is 1 if more samples are bad than run.max_bad_samples allows,
so that the run would stop.
"""
# Bad samples that are printed for each dataset; --bad writes all.
NUM_NAMED = 5


def number_or_all(text: str) -> int | None:
    """Return the number, or None for `all`."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return int(text)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("config", metavar="CONFIG", help="a training configuration (YAML)")
    parser.add_argument(
        "--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the YAML"
    )
    split = "which split (default: train)"
    parser.add_argument("--split", choices=["train", "validation"], default="train", help=split)
    decode = "samples of each dataset to read (default: 200)"
    parser.add_argument("--decode", type=number_or_all, default=200, metavar="N|all", help=decode)
    show = "samples of each dataset to print (default: 3)"
    parser.add_argument("--show", type=whole_number(0), default=3, metavar="N", help=show)
    workers = "processes that read (default: 2)"
    parser.add_argument("--workers", type=whole_number(0), default=2, metavar="N", help=workers)
    parser.add_argument("--bad", type=Path, metavar="FILE", help="write ids and reasons of all bad samples (JSONL)")
    return parser


class _Bars:
    """One progress bar at a time; each goes away when the next begins."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, task: str, total: int) -> Callable[[int], object]:
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(total=total, desc=task, leave=False)
        update: Callable[[int], object] = self._bar.update
        return update

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def report(check: DatasetCheck, processor: VideoLlamaProcessor, max_txt_len: int) -> str:
    """Return the result for a dataset as text."""
    from video_llama.constants import Modality
    from video_llama.data.checking import OUTCOMES, describe_tokens

    lines = [f"datasets.{check.name}: {numbered(check.num_examples, 'example')}, {check.num_decoded} of them read"]
    if check.is_stream:
        lines[0] += " (the first rows of a stream)"
    kinds = ", ".join(f"{check.media[kind]} with {kind}" for kind in get_args(Modality) if check.media[kind])
    lines.append(f"         {kinds or '0 with media'}; {check.media['none']} without any media")
    lines += [f"  {check.count(outcome):8d} bad: {what}" for outcome, what in OUTCOMES.items()]
    lines += [
        f"  {check.num_cut:8d} cut at model.max_txt_len: {max_txt_len}; the longest text has {check.longest} tokens",
        f"  {check.share_of_bad:8.2%} bad",
    ]
    if check.num_changed:
        lines.insert(
            -1,
            f"  {check.num_changed:8d} of {check.num_words} words of captions changed by the text processor "
            "(clean_captions: False takes them as they are)",
        )
    if check.num_silent:
        advice = "are left out (skip_silent)" if check.skips_silent else "are bad; skip_silent: True leaves them out"
        lines.insert(-1, f"  {check.num_silent:8d} without the audio track that they name: they {advice}")
    lines += [f"    {bad.id}: {bad.reason}" for bad in check.bad[:NUM_NAMED]]
    if len(check.bad) > NUM_NAMED:
        lines.append(f"    and {len(check.bad) - NUM_NAMED} more (--bad FILE writes all)")
    media = {processor.image_token_id: "frames", processor.audio_token_id: "sound"}
    for sample in check.samples:
        lines += ["", f"  {sample.id}"]
        for item in sample.media:
            lines.append(f"    {item.name} {tuple(item.values.shape)}  {item.message}".rstrip())
        text = describe_tokens(sample, processor.tokenizer, media)
        lines += [f"    | {line}" for line in text.replace("\n", "↵\n").splitlines()]
    return "\n".join(lines)


def write_bad(path: Path, checks: Sequence[DatasetCheck]) -> None:
    """Write ids and reasons of all bad samples."""
    from video_llama.utils.jsonl import append_jsonl

    path.touch()
    for check in checks:
        for bad in check.failures():
            append_jsonl(path, dataclasses.asdict(bad))


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and return the exit status."""
    from video_llama.config import load_config
    from video_llama.data.checking import check_datasets, share_of_bad_samples
    from video_llama.inference.load import build_model_processor
    from video_llama.utils.files import check_output_file, write_whole

    if arguments.bad is not None:
        check_output_file(arguments.bad, "--bad")
    config = load_config(arguments.config, arguments.options)
    processor = build_model_processor(config.model)
    bars = _Bars()
    checks = []
    for check in check_datasets(
        config,
        processor,
        training=arguments.split == "train",
        num_decoded=arguments.decode,
        num_shown=arguments.show,
        num_workers=arguments.workers,
        start=bars.start,
    ):
        bars.close()
        sys.stdout.write(f"{report(check, processor, config.model.max_txt_len)}\n\n")
        checks.append(check)
    if not checks:
        raise ConfigError(f"{arguments.config}: no dataset has a {arguments.split} split")
    if arguments.bad is not None:
        write_whole(arguments.bad, partial(write_bad, checks=checks))
    share, limit = share_of_bad_samples(config, checks), config.run.max_bad_samples
    sys.stdout.write(f"{share:.2%} of the samples of a run are bad; run.max_bad_samples allows {limit:.2%}\n")
    return int(share > limit)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(run, build_parser(prog).parse_args(argv))
