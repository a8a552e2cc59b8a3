"""The command `video-llama`, which is also `python -m video_llama`.

Each subcommand is one file, imported when it is called: `video-llama --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import video_llama
from video_llama.cli.command import CommandParser

__all__ = ["COMMANDS", "main"]

# Name: (module with a function `main(argv, prog)`, what it does).
COMMANDS = {
    "chat": ("video_llama.cli.chat", "ask about videos, images and audio files on the terminal"),
    "demo": ("video_llama.cli.demo", "serve the page in the browser"),
    "caption": ("video_llama.cli.caption", "caption many files: one line of JSON for each"),
    "train": ("video_llama.cli.train", "train on captions or dialogues"),
    "evaluate": ("video_llama.cli.evaluate", "compare answers with the annotated ones"),
    "compare": ("video_llama.cli.compare", "train several configurations alike, and compare them in a table"),
    "check-data": ("video_llama.cli.check_data", "check the datasets of a training configuration"),
    "convert": ("video_llama.cli.convert", "published files to a folder for transformers, and back"),
    "memory": ("video_llama.cli.memory", "count the memory that a model or a training needs"),
    "download": ("video_llama.cli.download", "fetch the published files of a model to one folder"),
    "info": ("video_llama.cli.info", "print versions, devices, extras and where weights were found"),
    "serve": ("video_llama.cli.serve", "serve a model through vLLM, with OpenAI's interface"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        command = importlib.import_module(COMMANDS[arguments[0]][0])
        status: int = command.main(arguments[1:], f"video-llama {arguments[0]}")
        return status
    parser = build_parser()
    if arguments and not arguments[0].startswith("-"):
        near = "".join(f"; did you mean {match}?" for match in get_close_matches(arguments[0], COMMANDS, 1))
        parser.error(f"unknown command {arguments[0]}{near}")
    # Without a command, as with --help.
    parser.parse_args(arguments or ["--help"])
    return 0


def build_parser() -> CommandParser:
    """Return the parser of what stands before the subcommand; the subcommands parse their own options."""
    parser = CommandParser(
        prog="video-llama",
        description="Video-LLaMA on the command line: ask about videos, images and audio; caption, train, serve.",
        epilog="video-llama COMMAND --help explains a command",
    )
    parser.add_argument("--version", action="version", version=f"video_llama {video_llama.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser
