"""The command `demo_video.py`: the page, questions from the command line, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from video_llama.demo.arguments import DEFAULT_MODEL, build_parser, choose_options, choose_template, load_model
from video_llama.errors import VideoLlamaError
from video_llama.utils.extras import require_extra

if TYPE_CHECKING:
    from video_llama.inference.chat import Chat, Upload

__all__ = ["main"]

INPUT_ERROR, INTERRUPTED = 1, 130
_MAX_TIMES_SHOWN = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; bad input ends in one line on stderr and exit code 1."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not arguments.model and not arguments.cfg_path:
        arguments.model = DEFAULT_MODEL
    on_terminal = arguments.terminal or arguments.input or arguments.question is not None
    _check_arguments(parser, arguments, on_terminal)
    # A penalty on the answer alone, without the prompt, is what is wanted.
    warnings.filterwarnings("ignore", message=r"Passing `repetition_penalty` with `inputs_embeds`")
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


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace, on_terminal: bool) -> None:
    """Exit with a usage error where options contradict each other or the input."""
    if on_terminal and arguments.question is None and not sys.stdin.isatty():
        parser.error("give --question TEXT, or run on a terminal to have a conversation")
    if arguments.allow_urls and not on_terminal:
        parser.error("--allow-urls goes with --input; the page takes uploads only")
    if arguments.options and not arguments.cfg_path:
        parser.error("--options overrides settings of a YAML file; give --cfg-path too")
    if arguments.model_base and arguments.cfg_path:
        parser.error("--model-base goes with --model; in a YAML file the language model is model.llama_model")
    if any(not question.strip() for question in arguments.question or ()):
        parser.error("argument --question: it is empty; type a question")
    if arguments.gpu_id is not None and arguments.device not in (None, "cuda", f"cuda:{arguments.gpu_id}"):
        parser.error(f"--gpu-id {arguments.gpu_id} and --device {arguments.device} contradict each other; give one")


def _talk(arguments: argparse.Namespace) -> None:
    from video_llama.inference.chat import Chat
    from video_llama.media.containers import media_kind
    from video_llama.media.sources import open_source

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
