"""The command `demo_video.py`, by the original's name: the page, or with --input, --question or --terminal a chat."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from video_llama.cli import chat, demo
from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.options import add_answer_options, add_model_options, check_model_options

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `video-llama chat` and `video-llama demo` together."""
    description = "Ask Video-LLaMA about a video, an image or an audio file."
    examples = chat.EPILOG.replace("video-llama chat", "python demo_video.py")
    parser = CommandParser(prog="demo_video.py", description=description, epilog=examples)
    add_model_options(parser.add_argument_group("the model"))
    inputs = parser.add_argument_group("files and questions")
    chat.add_input_options(inputs)
    inputs.add_argument("--terminal", action="store_true", help="a conversation on the terminal, as with files alone")
    add_answer_options(parser.add_argument_group("how to answer"))
    demo.add_page_options(parser.add_argument_group("the page (without --input, --question and --terminal)"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.terminal or arguments.items or arguments.input or arguments.question is not None:
        chat.check_arguments(parser, arguments)
        return run_command(chat.run, arguments)
    if arguments.allow_urls:
        parser.error("--allow-urls goes with --input; the page takes uploads only")
    check_model_options(parser, arguments)
    return run_command(demo.run, arguments)
