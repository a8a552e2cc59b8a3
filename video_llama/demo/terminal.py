"""Ask on the terminal: questions from the command line, or a conversation when a person is there."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from video_llama.demo.arguments import build_parser
from video_llama.errors import VideoLlamaError

if TYPE_CHECKING:
    from video_llama.chat import Chat, Upload
    from video_llama.model.inference import VideoLlama

__all__ = ["main"]

INPUT_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; bad input ends in one line on stderr and exit code 1."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.question is None and not sys.stdin.isatty():
        parser.error("give --question TEXT, or run on a terminal to have a conversation")
    if arguments.options and not arguments.cfg_path:
        parser.error("--options overrides settings of a YAML file; give --cfg-path too")
    warnings.filterwarnings("ignore", message=r"Passing `repetition_penalty` with `inputs_embeds`")  # as intended
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        _talk(arguments)
    except VideoLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    return 0


def _talk(arguments: argparse.Namespace) -> None:
    from video_llama.processor.kind import media_kind

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
    from video_llama.chat import Chat
    from video_llama.conversation import conv_templates
    from video_llama.model.generation import GenerationOptions

    try:
        options = GenerationOptions(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            num_beams=arguments.num_beams,
            repetition_penalty=arguments.repetition_penalty,
        )
    except ValueError as error:
        raise VideoLlamaError(str(error)) from error
    template = {"vicuna": "v1", "llama_v2": "llama_2", None: None}[arguments.model_type]
    conversation = None if template is None else conv_templates[template].copy()
    return Chat(_load_model(arguments), conversation, options=options)


def _load_model(arguments: argparse.Namespace) -> VideoLlama:
    from video_llama.model.builder import build_model, load_pretrained_model

    device = f"cuda:{arguments.gpu_id}" if arguments.gpu_id is not None else arguments.device
    if arguments.cfg_path:
        from video_llama.config import load_config

        config = load_config(arguments.cfg_path, [*_model_settings(arguments), *arguments.options])
        model = build_model(config.model, device=device)
        num_frames = next((data.vis_processor.train.n_frms for data in config.datasets.values()), None)
        if num_frames is not None:
            model.processor.media_processor = replace(model.processor.media_processor, num_frames=num_frames)
        return model
    return load_pretrained_model(
        arguments.model,
        device=device,
        dtype=arguments.dtype,
        load_in_8bit=arguments.load_in_8bit,
        load_in_4bit=arguments.load_in_4bit,
    )


def _model_settings(arguments: argparse.Namespace) -> list[str]:
    """What the command line says about the model, as settings of a configuration."""
    given = {
        "dtype": None if arguments.dtype == "auto" else arguments.dtype,
        "load_in_8bit": arguments.load_in_8bit or None,
        "load_in_4bit": arguments.load_in_4bit or None,
    }
    return [f"model.{name}={value}" for name, value in given.items() if value is not None]


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
