"""The command `video-llama chat`: questions from the command line, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.models import choose_options, choose_template, load_model
from video_llama.cli.options import add_answer_options, add_model_options, add_reading_options, check_model_options

if TYPE_CHECKING:
    from video_llama.inference.chat import Chat, Upload

__all__ = ["add_input_options", "check_arguments", "main", "run"]

EPILOG = """\
examples:
  one question:       video-llama chat clip.mp4 "What happens?" --model CHECKPOINTS
  several turns:      video-llama chat --input clip.mp4 --question "What happens?" "And then?" --model CHECKPOINTS
  a conversation:     video-llama chat clip.mp4 --model CHECKPOINTS
  from a YAML file:   video-llama chat clip.mp4 --cfg-path eval_configs/video_llama_eval_withaudio.yaml

CHECKPOINTS is a folder with the published files, a folder written by save_pretrained or `video-llama convert`, a hub
id such as DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned, or video-llama-tiny, the small model of the package (trained on
generated clips, knows nothing of the world).
"""
_MAX_TIMES_SHOWN = 16


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    description = "Ask Video-LLaMA about videos, images and audio files on the terminal."
    parser = CommandParser(prog=prog, description=description, epilog=EPILOG)
    add_input_options(parser.add_argument_group("files and questions"))
    add_model_options(parser.add_argument_group("the model"))
    add_answer_options(parser.add_argument_group("how to answer"))
    return parser


def add_input_options(group: argparse._ArgumentGroup) -> None:
    """Add what is asked about, and the questions."""
    add = group.add_argument
    add("--input", nargs="+", default=[], metavar="FILE", help="videos, images or audio files")
    add("--allow-urls", action="store_true", help="download inputs that are http or https addresses")
    add("--question", nargs="+", metavar="TEXT", help="questions, answered in order on the terminal")
    add_reading_options(group)


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error where options contradict each other or the input."""
    check_model_options(parser, arguments)
    if arguments.question is None and not sys.stdin.isatty():
        parser.error("give --question TEXT, or run on a terminal to have a conversation")
    if any(not question.strip() for question in arguments.question or ()):
        parser.error("argument --question: it is empty; type a question")


def run(arguments: argparse.Namespace) -> int:
    """Answer the questions, or those that are typed."""
    from video_llama.inference.chat import Chat
    from video_llama.media.containers import media_kind
    from video_llama.media.decode import check_video_reader
    from video_llama.media.sources import open_source

    if arguments.video_reader is not None:
        check_video_reader(arguments.video_reader)

    with contextlib.ExitStack() as opened:
        # Bad files and options are reported before the model is loaded, which takes a while. An address is downloaded
        # once for both.
        files = [opened.enter_context(open_source(name, arguments.allow_urls)) for name in arguments.input]
        kinds = [media_kind(file.path) for file in files]
        options = choose_options(arguments)
        chat = Chat(load_model(arguments), choose_template(arguments), options=options)
        for file, kind in zip(files, kinds, strict=True):
            upload = replace(_upload(chat, file.path, kind, arguments), source=file.name)
            print(describe_upload(upload), flush=True)
    for question in arguments.question or _typed_questions():
        chat.ask(question)
        if arguments.question:
            print(f"> {question}")
        for piece in chat.stream_answer():
            print(piece, end="", flush=True)
        print()
    return 0


def _upload(chat: Chat, path: str, kind: str, arguments: argparse.Namespace) -> Upload:
    if kind == "image":
        return chat.upload_img(path)
    if kind == "audio":
        return chat.upload_audio(path)
    if arguments.no_audio:
        return chat.upload_video_without_audio(path, num_frames=arguments.num_frames)
    return chat.upload_video(path, num_frames=arguments.num_frames)


def describe_upload(upload: Upload) -> str:
    """Return one line on the frames and the audio that the model gets of a file."""
    audio = upload.sound
    if upload.audio is not None:
        segments, seconds = len(upload.audio.start_seconds), upload.audio.duration_seconds
        audio = f"heard {segments} segments of its {seconds:.1f} seconds"
    if upload.frames is None:
        return f"{upload.source}: {audio}"
    if upload.frames.kind == "image":
        return f"{upload.source}: an image"
    times = [f"{seconds:.1f}" for seconds in upload.frames.times_seconds]
    frames = "1 frame" if len(times) == 1 else f"{len(times)} frames"
    return f"{upload.source}: {frames} at {_shortened(times)} seconds; sound: {audio}"


def _shortened(texts: list[str], longest: int = _MAX_TIMES_SHOWN) -> str:
    if len(texts) > longest:
        texts = [*texts[: longest - 2], "…", texts[-1]]
    return ", ".join(texts)


def _typed_questions() -> Iterator[str]:
    print("Type a question; an empty line ends the conversation.")
    with contextlib.suppress(EOFError):
        while question := input("> ").strip():
            yield question


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser(prog)
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    return run_command(run, arguments)
