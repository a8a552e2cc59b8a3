"""The options of `demo_video.py`, and the model and answer options they name; light to import, for a quick `--help`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from video_llama.errors import ConfigError

if TYPE_CHECKING:
    from video_llama.conversation import Conversation
    from video_llama.inference.engine import VideoLlama
    from video_llama.inference.generation import GenerationOptions

__all__ = ["DEFAULT_MODEL", "build_parser", "choose_options", "choose_template", "load_model"]

DESCRIPTION = "Ask Video-LLaMA about a video, an image or an audio file."
DEFAULT_MODEL = "video-llama-tiny"
EPILOG = """\
examples:
  the page:           python demo_video.py --model CHECKPOINTS
  one question:       python demo_video.py --model CHECKPOINTS --input clip.mp4 --question "What happens?"
  several turns:      python demo_video.py --model CHECKPOINTS --input clip.mp4 --question "What happens?" "And then?"
  a conversation:     python demo_video.py --model CHECKPOINTS --input clip.mp4
  from a YAML file:   python demo_video.py --cfg-path eval_configs/video_llama_eval_withaudio.yaml --input clip.mp4

CHECKPOINTS is a folder with the published files, a folder written by save_pretrained or
scripts/convert_checkpoint.py, a hub id such as DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned, or video-llama-tiny, the small
model of the package (trained on generated clips, knows nothing of the world).
"""
TEMPLATES = {"vicuna": "v1", "llama_v2": "llama_2"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all options, in the groups that `--help` shows."""
    parser = argparse.ArgumentParser(
        prog="demo_video.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("the model"))
    _add_input_options(parser.add_argument_group("files and questions"))
    _add_answer_options(parser.add_argument_group("how to answer"))
    _add_page_options(parser.add_argument_group("the page (without --input, --question and --terminal)"))
    return parser


def _number(kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of numbers from `least` to `most`, but not infinite, for `add_argument(type=)`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"not {name}: {text}") from error
        if least <= value <= most and abs(value) != math.inf:
            return value
        if most < math.inf:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")

    return read


_positive = _number(int, 1)


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    source, add = group.add_mutually_exclusive_group(), group.add_argument
    model = f"checkpoint folder, file, hub id or packaged model (default: {DEFAULT_MODEL}, without --cfg-path)"
    source.add_argument("--model", metavar="PATH", help=model)
    source.add_argument("--cfg-path", metavar="YAML", help="configuration with a model section (eval_configs/)")
    base = "the language model, if --model is a checkpoint that lies elsewhere; the whole model, if it is an adapter"
    add("--model-base", metavar="PATH", help=base)
    overrides = "override settings of --cfg-path: model.ckpt=…"
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help=overrides)
    add(
        "--model-type",
        "--model_type",
        choices=TEMPLATES,
        help="conversation template (default: the one of the weights)",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--gpu-id", "--gpu_id", type=_number(int, 0), metavar="N", help="the same as --device cuda:N")
    precisions = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=precisions, default="auto", help="precision (default: auto)")
    add("--load-in-8bit", action="store_true", help="language model in 8 bit (needs bitsandbytes)")
    add("--load-in-4bit", action="store_true", help="language model in 4 bit (needs bitsandbytes)")


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input", nargs="+", default=[], metavar="FILE", help="videos, images or audio files")
    add("--allow-urls", action="store_true", help="download inputs that are http or https addresses")
    add("--question", nargs="+", metavar="TEXT", help="questions, answered in order on the terminal")
    add("--terminal", action="store_true", help="a conversation on the terminal, as with --input alone")
    add("--num-frames", type=_positive, metavar="N", help="frames to sample from a video (default: 8)")
    add("--video-reader", choices=["pyav", "decord"], help="decoder of frames (default: pyav)")
    add("--no-audio", action="store_true", help="ignore the audio tracks of videos")


def _add_answer_options(group: argparse._ArgumentGroup) -> None:
    add, number = group.add_argument, _number(float)
    add("--max-new-tokens", type=_number(int), default=300, metavar="N", help="longest answer (default: 300)")
    add("--temperature", type=number, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (default: 0)")
    add("--top-p", type=number, default=0.9, metavar="P", help="nucleus size, with a temperature (default: 0.9)")
    add("--num-beams", type=_number(int), default=1, metavar="N", help="beam search width (default: 1)")
    penalty = "above 1, the answer repeats itself less (default: 1.0)"
    add("--repetition-penalty", type=number, default=1.0, metavar="R", help=penalty)


def _add_page_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    host = "address to listen on (default: 127.0.0.1, this machine only)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=host)
    add("--port", type=_number(int, 1, 65535), metavar="N", help="default: the first free one from 7860 on")
    add("--share", action="store_true", help="make the page public through a Gradio tunnel")
    add("--auth-file", metavar="FILE", help="ask for a password: lines of user:password")
    add("--max-upload-mb", type=_positive, default=200, metavar="N", help="largest upload (default: 200)")
    add("--max-minutes", type=_positive, default=60, metavar="N", help="longest video or audio file (default: 60)")
    cache = "memory for the keys and values of all conversations (default: half of what is free)"
    add("--kv-cache-gib", type=_number(float, 0), metavar="G", help=cache)
    add("--concurrency", type=_positive, default=1, metavar="N", help="requests processed at once (default: 1)")


def choose_options(arguments: argparse.Namespace) -> GenerationOptions:
    """Return how answers are drawn.

    Raises:
        ConfigError: a value is out of range.
    """
    from video_llama.inference.generation import GenerationOptions

    names = ("max_new_tokens", "temperature", "top_p", "num_beams", "repetition_penalty")
    try:
        return GenerationOptions(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_template(arguments: argparse.Namespace) -> Conversation | None:
    """Return the template of `--model-type`; None for the one that belongs to the weights."""
    from video_llama.conversation import conv_templates

    if arguments.model_type is None:
        return None
    return conv_templates[TEMPLATES[arguments.model_type]].copy()


def load_model(arguments: argparse.Namespace) -> VideoLlama:
    """Load the model of `--cfg-path` or `--model`, with files read as the options and the configuration say.

    Raises:
        VideoLlamaError: it cannot be loaded, or there is no such video reader.
    """
    from video_llama.config import load_config
    from video_llama.inference.load import build_model, load_pretrained_model
    from video_llama.media.decode import check_video_reader
    from video_llama.schema import ProcessorConfig

    config, reading = None, ProcessorConfig()
    if arguments.cfg_path:
        config = load_config(arguments.cfg_path, [*model_settings(arguments), *arguments.options])
        # The first dataset section says how files are read; options of the command line go before it.
        reading = next((section.vis_processor.train for section in config.datasets.values()), reading)
    video_reader = arguments.video_reader or reading.video_reader
    if video_reader is not None:
        check_video_reader(video_reader)
    device = arguments.device
    if arguments.gpu_id is not None:
        device = f"cuda:{arguments.gpu_id}"
    if config is not None:
        model = build_model(config.model, device=device)
    else:
        model = load_pretrained_model(
            arguments.model,
            arguments.model_base,
            device=device,
            dtype=arguments.dtype,
            load_in_8bit=arguments.load_in_8bit,
            load_in_4bit=arguments.load_in_4bit,
        )
    media = model.processor.media_processor
    model.processor.media_processor = replace(
        media, num_frames=reading.n_frms or media.num_frames, video_reader=video_reader or media.video_reader
    )
    return model


def model_settings(arguments: argparse.Namespace) -> list[str]:
    """Return what the command line says about the model as settings of a configuration."""
    settings = []
    if arguments.dtype != "auto":
        settings.append(f"model.dtype={arguments.dtype}")
    for name in ("load_in_8bit", "load_in_4bit"):
        if getattr(arguments, name):
            settings.append(f"model.{name}=True")
    return settings
