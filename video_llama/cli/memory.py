"""The command `video-llama memory`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.options import positive

__all__ = ["main"]

DESCRIPTION = """\
Print what each precision of a configuration needs, counted from its parameters; nothing is loaded.

    video-llama memory 7b
    video-llama memory path/to/folder --num-frames 32
    video-llama memory eval_configs/video_llama_eval_withaudio.yaml
    video-llama memory configs/train/visionbranch_stage1_pretrain.yaml

A configuration that trains something, whole or by adapters, is counted with gradients, the optimizer's state and what
the backward pass keeps.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("config", help="7b, 13b, a folder written by save_pretrained, or a YAML configuration")
    add = parser.add_argument
    add("--num-frames", type=positive, metavar="N", help="frames of each video (default: 8, or the configuration's)")
    add("--context-length", type=positive, metavar="N", help="tokens of a prompt with its answer (default: 1024)")
    batch = "prompts, or training samples, at a time (default: 1, or the configuration's)"
    add("--batch-size", type=positive, metavar="N", help=batch)
    add("--no-audio", action="store_true", help="without the audio branch")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the table of a model, or of the training that a configuration describes."""
    from video_llama.cli.memory_tables import (
        configured_model,
        print_inference,
        print_training,
        read_config,
        trains_something,
    )
    from video_llama.config import load_config

    if not arguments.config.endswith((".yaml", ".yml")):
        print_inference(read_config(arguments.config, use_audio=not arguments.no_audio), arguments)
        return 0
    whole = load_config(arguments.config)
    config, found = configured_model(whole, use_audio=not arguments.no_audio)
    print(found)
    if trains_something(whole):
        print_training(config, whole, arguments)
    else:
        print_inference(config, arguments)
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(run, build_parser(prog).parse_args(argv))
