"""What all commands have in common: how options are read, and how a command ends.

An error is one line on stderr. The exit status is 0 for success, 1 for an error, 2 for wrong options, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import IO, Any, NoReturn

from video_llama.errors import VideoLlamaError

__all__ = ["FAILED", "INTERRUPTED", "CommandParser", "numbered", "report_error", "run_command"]

FAILED, INTERRUPTED = 1, 130
# The status of a program that a closed pipe ended, as the shell counts it (128 + SIGPIPE).
_PIPE_CLOSED = 141

logger = logging.getLogger(__name__)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and gives long options room beside their explanations."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class CommandParser(argparse.ArgumentParser):
    """A parser of options whose errors come first, without the usage, and name the nearest option.

    Args:
        passes_on: options that it does not know are for another program.
        arguments, settings: as for `argparse.ArgumentParser`.
    """

    def __init__(self, *arguments: Any, passes_on: bool = False, **settings: Any) -> None:
        self._passes_on = passes_on
        settings.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*arguments, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse looks: a misspelt option would be reported as the one that is missing.
        if not self._passes_on:
            self._check_spelling(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Python 3.10 raises what later versions drop; `exit`, which comes next, looks whether the reader has gone.
        with contextlib.suppress(BrokenPipeError):
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # `--help | head`: what argparse printed is still in the buffer.
        if status == 0 and _is_stdout_closed():
            status = _PIPE_CLOSED
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (all options: {self.prog} --help)\n")

    def _check_spelling(self, args: Sequence[str]) -> None:
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for text in args:
            if text == "--":
                return
            name = text.partition("=")[0]
            # argparse takes what has a space for a value, and the beginning of an option for the option.
            if not name.startswith("--") or " " in text or any(option.startswith(name) for option in known):
                continue
            near = "".join(f"; did you mean {match}?" for match in get_close_matches(name, known, 1))
            self.error(f"unknown option {name}{near}")


def run_command(
    run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, interrupted: str = "interrupted"
) -> int:
    """Run a command and return its exit status; errors of input are one line on stderr.

    Args:
        run: what the command does; returns the exit status.
        arguments: its options.
        interrupted: what is said after Ctrl-C.
    """
    # A waiting OpenMP thread that spins makes token-by-token decoding several times slower on a busy machine. This must
    # be set before torch is imported, which commands do when they run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # In pipes and logs, the bars of other libraries are noise. They read this when they are imported.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A penalty on the answer alone, without the prompt, is what is wanted.
    warnings.filterwarnings("ignore", message=r"Passing `repetition_penalty` with `inputs_embeds`")
    level = logging.INFO if getattr(arguments, "verbose", False) else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    try:
        status = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:
        # A pipe between processes can break as well, which is an error like others.
        if not _is_stdout_closed():
            return report_error(str(error))
        return _PIPE_CLOSED
    except (VideoLlamaError, OSError) as error:
        # OSError: what the system refuses, such as space on the disk.
        return report_error(str(error))
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{interrupted}\n")
        return INTERRUPTED
    return status


def numbered(number: int, noun: str) -> str:
    """Return "1 clip" or "2 clips"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def report_error(message: str) -> int:
    """Print an error in one line; where it arose is in the log at level DEBUG. Return the exit status."""
    logger.debug("where it happened", exc_info=True)
    sys.stderr.write(f"error: {message}\n")
    return FAILED


def _is_stdout_closed() -> bool:
    """Whether the reader of standard output has gone; if so, what is still to be written is dropped."""
    try:
        sys.stdout.flush()
        if not _has_lost_its_reader(sys.stdout):
            return False
    except BrokenPipeError:
        pass
    # Python flushes once more at its end, and would report the error again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _has_lost_its_reader(stream: IO[str]) -> bool:
    """Whether a pipe has no reader, which a flush cannot tell where output has no buffer (PYTHONUNBUFFERED)."""
    # Windows has no `poll`; a stream that is no file has no number.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLERR)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
