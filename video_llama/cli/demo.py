"""The command `video-llama demo`: the page in the browser."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.models import choose_options, choose_template, load_model
from video_llama.cli.options import (
    add_answer_options,
    add_model_options,
    add_reading_options,
    check_model_options,
    number,
    positive,
    whole_number,
)
from video_llama.utils.extras import require_extra

__all__ = ["add_page_options", "main", "run"]

# For visitors to be shown that the device failed.
_LAST_ANSWER_SECONDS = 2.0


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description="Serve the page in the browser, for this machine or for others.")
    add_page_options(parser.add_argument_group("the page"))
    add_reading_options(parser.add_argument_group("how files are read, where visitors choose nothing"))
    add_model_options(parser.add_argument_group("the model"))
    add_answer_options(parser.add_argument_group("how to answer, where visitors choose nothing"))
    return parser


def add_page_options(group: argparse._ArgumentGroup) -> None:
    """Add where the page is, and what visitors may do."""
    add = group.add_argument
    host = "address to listen on (default: 127.0.0.1, this machine only)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=host)
    add("--port", type=whole_number(1, 65535), metavar="N", help="default: the first free one from 7860 on")
    add("--share", action="store_true", help="make the page public through a Gradio tunnel")
    add("--auth-file", metavar="FILE", help="ask for a password: lines of user:password")
    add("--max-upload-mb", type=positive, default=200, metavar="N", help="largest upload (default: 200)")
    add("--max-minutes", type=positive, default=60, metavar="N", help="longest video or audio file (default: 60)")
    cache = "memory for the keys and values of all conversations (default: half of what is free)"
    add("--kv-cache-gib", type=number(0), metavar="G", help=cache)
    add("--concurrency", type=positive, default=1, metavar="N", help="requests processed at once (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or another signal ends the process.

    Raises:
        VideoLlamaError: the address is not available, or the model cannot be loaded.
        DeviceError: the device failed for good, and no question can be answered any more.
    """
    from video_llama.media.decode import check_video_reader

    if arguments.video_reader is not None:
        check_video_reader(arguments.video_reader)
    require_extra("gradio", "the page (video-llama chat answers on the terminal)")
    # What follows takes seconds to import.
    sys.stderr.write("starting the page …\n")
    from video_llama.demo.limits import Limits
    from video_llama.demo.server import DemoServer, ServerSettings, read_auth, warn_public_address
    from video_llama.demo.sessions import Defaults

    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        auth=read_auth(arguments.auth_file),
        concurrency=arguments.concurrency,
        title=Path(arguments.model or arguments.cfg_path).name,
    )
    limits = Limits(
        upload_mb=arguments.max_upload_mb, seconds=60 * arguments.max_minutes, kv_cache_gib=arguments.kv_cache_gib
    )
    defaults = Defaults(
        choose_options(arguments), choose_template(arguments), arguments.num_frames, not arguments.no_audio
    )
    # Signals that would end the process at once, and leave the visitors' files behind, end it like `sys.exit`.
    # Windows has no SIGHUP, and nohup ignores it.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)
    server = DemoServer(lambda: load_model(arguments), settings, limits, defaults)
    try:
        address = server.start()
        warn_public_address(settings)
        print(f"The page is at {address} (Ctrl-C ends it); loading the model …", flush=True)
        model = server.model.result()
        print("The model is ready.", flush=True)
        # Waits until there is one.
        model.failure.exception()
        time.sleep(_LAST_ANSWER_SECONDS)
        model.failure.result()
    finally:
        server.close()
    return 0


def _exit(number: int, frame: object) -> None:
    # Once is enough.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser(prog)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"{rest[0]}: files are added on the page (video-llama chat takes them on the command line)")
    check_model_options(parser, arguments)
    return run_command(run, arguments)
