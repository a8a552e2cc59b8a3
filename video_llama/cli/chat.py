"""The command `video-llama chat`: questions from the command line, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from video_llama.cli.command import CommandParser, run_command
from video_llama.cli.models import choose_options, choose_template, load_model
from video_llama.cli.options import add_answer_options, add_model_options, add_reading_options, check_model_options
from video_llama.cli.terminal import Terminal, is_existing_file

if TYPE_CHECKING:
    from video_llama.inference.chat import Chat

__all__ = ["add_input_options", "check_arguments", "main", "run"]

EPILOG = """\
examples:
  one question:       video-llama chat clip.mp4 "What happens?" --model CHECKPOINTS
  several turns:      video-llama chat clip.mp4 "What happens?" "And then?" --model CHECKPOINTS
  a conversation:     video-llama chat clip.mp4 --model CHECKPOINTS
  from a YAML file:   video-llama chat clip.mp4 --cfg-path eval_configs/video_llama_eval_withaudio.yaml

CHECKPOINTS is a folder with the published files, a folder written by save_pretrained or `video-llama convert`, a hub
id such as DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned, or video-llama-tiny, the small model of the package (trained on
generated clips, knows nothing of the world).
"""
# What a question with spaces does not end with, but a file with spaces in its name does.
_MEDIA_NAME = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|gif|jpe?g|png|webp|heic|wav|mp3|m4a|flac|ogg)$", re.IGNORECASE)


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
    both = 'files and questions, as they come: clip.mp4 "What happens?"; without a question, they are typed'
    add("items", nargs="*", metavar="FILE_OR_QUESTION", help=both)
    add("--input", nargs="+", default=[], metavar="FILE", help="videos, images or audio files")
    add("--allow-urls", action="store_true", help="download inputs that are http or https addresses")
    add("--question", nargs="+", metavar="TEXT", help="questions, answered in order on the terminal")
    add_reading_options(group)


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error where options contradict each other or the input."""
    check_model_options(parser, arguments)
    files, questions = split_items(arguments.items)
    arguments.input = [*files, *arguments.input]
    if questions:
        arguments.question = [*questions, *(arguments.question or ())]
    if arguments.question is None and not sys.stdin.isatty():
        parser.error('no question: chat clip.mp4 "What happens?"; on a terminal, questions can be typed')
    if any(not question.strip() for question in arguments.question or ()):
        parser.error("argument --question: it is empty; type a question")


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files and the questions among what was typed."""
    # A folder is refused with the files, where it would be a strange question.
    files = [item for item in items if is_existing_file(item) or os.path.isdir(item) or _is_like_a_file(item)]
    return files, [item for item in items if item not in files]


def _is_like_a_file(text: str) -> bool:
    """Return whether a text can only be meant as a file or an address, although no such file may be there."""
    if re.search(r"\s", text):
        return bool(_MEDIA_NAME.search(text))
    return bool(re.search(r"/|\\|\.\w{2,5}$", text))


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
            _attach(chat, file.path, kind, file.name, arguments)

    def attach(name: str) -> None:
        with open_source(name, arguments.allow_urls) as file:
            _attach(chat, file.path, media_kind(file.path), file.name, arguments)

    terminal = Terminal(chat, attach, model=arguments.model or arguments.cfg_path)
    if not arguments.question:
        terminal.run()
    for question in arguments.question or ():
        print(f"> {question}")
        terminal.ask(question)
    return 0


def _attach(chat: Chat, path: str, kind: str, name: str, arguments: argparse.Namespace) -> None:
    """Add a file to the conversation, and print how much of it the model gets."""
    if kind == "image":
        decoded = chat.decode_img(path)
    elif kind == "audio":
        decoded = chat.decode_audio(path)
    else:
        decoded = chat.decode_video(path, num_frames=arguments.num_frames, listen=not arguments.no_audio)
    upload = chat.add(replace(decoded, source=name))
    print(f"{name}: {upload.summary}", flush=True)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser(prog)
    # Files and questions may stand between options.
    arguments = parser.parse_intermixed_args(argv)
    check_arguments(parser, arguments)
    return run_command(run, arguments)
