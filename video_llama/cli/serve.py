"""The command `video-llama serve`: vLLM's server, whose options it passes on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from video_llama.cli.command import CommandParser, run_command

__all__ = ["main"]

DESCRIPTION = """\
Serve a model through vLLM, with OpenAI's interface. All options of `vllm serve` may follow; docs/serving.md names those
that matter.

    video-llama serve video-llama-tiny --port 8000
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the model; the options are vLLM's."""
    parser = CommandParser(prog=prog, description=DESCRIPTION, allow_abbrev=False, passes_on=True)
    parser.add_argument("model", metavar="MODEL", help="a saved folder, a hub id, or video-llama-tiny")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Serve until the server is stopped."""
    from video_llama.integrations.vllm.serve import serve

    logging.getLogger("video_llama").setLevel(logging.INFO)
    serve(arguments.model, arguments.options)
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    arguments, options = build_parser(prog).parse_known_args(argv)
    arguments.options = options
    return run_command(run, arguments)
