"""The command `demo_video.py`: the page, questions from the command line, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from video_llama.demo.arguments import DEFAULT_MODEL, build_parser
from video_llama.errors import VideoLlamaError
from video_llama.utils.extras import require_extra

if TYPE_CHECKING:
    from video_llama.inference.chat import Chat, Upload

__all__ = ["main"]

INPUT_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; bad input ends in one line on stderr and exit code 1."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not arguments.model and not arguments.cfg_path:
        arguments.model = DEFAULT_MODEL
    on_terminal = arguments.terminal or arguments.input or arguments.question is not None
    if on_terminal and arguments.question is None and not sys.stdin.isatty():
        parser.error("give --question TEXT, or run on a terminal to have a conversation")
    if arguments.options and not arguments.cfg_path:
        parser.error("--options overrides settings of a YAML file; give --cfg-path too")
    if any(not question.strip() for question in arguments.question or ()):
        parser.error("argument --question: it is empty; type a question")
    if arguments.gpu_id is not None and arguments.device not in (None, "cuda", f"cuda:{arguments.gpu_id}"):
        parser.error(f"--gpu-id {arguments.gpu_id} and --device {arguments.device} contradict each other; give one")
    warnings.filterwarnings("ignore", message=r"Passing `repetition_penalty` with `inputs_embeds`")  # as intended
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if arguments.video_reader is not None:
            from video_llama.media.decode import check_video_reader

            check_video_reader(arguments.video_reader)
        if on_terminal:
            _talk(arguments)
        else:
            require_extra("gradio", "the page (--input FILE answers on the terminal)")
            from video_llama.demo.server import serve

            serve(arguments)
    except VideoLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    return 0


def _talk(arguments: argparse.Namespace) -> None:
    from video_llama.media.containers import media_kind

    kinds = [media_kind(path) for path in arguments.input]  # before the model, which takes a while to load
    chat = _open_chat(arguments)
    for path, kind in zip(arguments.input, kinds, strict=True):
        print(describe_upload(_upload(chat, path, kind, arguments)), flush=True)
    for question in arguments.question if arguments.question is not None else _typed_questions():
        chat.ask(question)
        if arguments.question is not None:
            print(f"> {question}")
        _print_answer(chat, sys.stdout)


def _open_chat(arguments: argparse.Namespace) -> Chat:
    from video_llama.demo.opening import choose_options, choose_template, load_model
    from video_llama.inference.chat import Chat

    options = choose_options(arguments)
    return Chat(load_model(arguments), choose_template(arguments), options=options)


def _upload(chat: Chat, path: str, kind: str, arguments: argparse.Namespace) -> Upload:
    if kind == "image":
        return chat.upload_img(path)
    if kind == "audio":
        return chat.upload_audio(path)
    upload = chat.upload_video_without_audio if arguments.no_audio else chat.upload_video
    return upload(path, num_frames=arguments.num_frames)


def describe_upload(upload: Upload) -> str:
    """One line on what the model saw and heard of a file."""
    seen = heard = ""
    if upload.frames is not None and upload.frames.kind == "image":
        return f"{upload.source}: an image"
    if upload.frames is not None:
        times = [f"{seconds:.1f}" for seconds in upload.frames.times_seconds]
        seen = f"{len(times)} frame{'s' * (len(times) > 1)} at {_shortened(times)} seconds; sound: "
    if upload.audio is not None:
        heard = f"heard {len(upload.audio.start_seconds)} segments of its {upload.audio.duration_seconds:.1f} seconds"
    return f"{upload.source}: {seen}{heard or upload.sound}"


def _shortened(texts: list[str], longest: int = 16) -> str:
    return ", ".join(texts if len(texts) <= longest else [*texts[: longest - 2], "…", texts[-1]])


def _typed_questions() -> Iterable[str]:
    print("Type a question; an empty line ends the conversation.")
    while question := _read_line():
        yield question


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_answer(chat: Chat, output: TextIO) -> None:
    for piece in chat.stream_answer():
        print(piece, end="", flush=True, file=output)
    print(file=output)
