"""Options that several commands have, written once; light to import, for a quick `--help`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = [
    "DEFAULT_MODEL",
    "TEMPLATES",
    "add_answer_options",
    "add_base_option",
    "add_model_options",
    "add_precision_options",
    "add_reading_options",
    "check_model_options",
    "number",
    "positive",
    "whole_number",
]

DEFAULT_MODEL = "video-llama-tiny"
# The templates by the names that the original gives them.
TEMPLATES = {"vicuna": "v1", "llama_v2": "llama_2"}


def whole_number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of whole numbers from `least` to `most`, for `add_argument(type=)`."""
    return _reader(int, "a whole number", least, most)


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers from `least` to `most`, for `add_argument(type=)`."""
    return _reader(float, "a number", least, most)


def _reader(kind: type[int] | type[float], name: str, least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not {name}: {text}") from error
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
        if least <= value <= most:
            return value
        if most < math.inf:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")

    return read


positive = whole_number(1)


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Add which model answers, from a path or a configuration, and how it is loaded."""
    source, add = group.add_mutually_exclusive_group(), group.add_argument
    model = f"checkpoint folder, file, hub id or packaged model (default: {DEFAULT_MODEL}, without --cfg-path)"
    source.add_argument("--model", metavar="PATH", help=model)
    source.add_argument("--cfg-path", metavar="YAML", help="configuration with a model section (eval_configs/)")
    add_base_option(group)
    overrides = "override settings of --cfg-path: model.ckpt=…"
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help=overrides)
    template = "conversation template (default: the one of the weights)"
    add("--model-type", "--model_type", choices=TEMPLATES, help=template)
    add("--gpu-id", "--gpu_id", type=whole_number(0), metavar="N", help="the same as --device cuda:N")
    add_precision_options(group)


def add_base_option(group: argparse._ActionsContainer) -> None:
    """Add where the rest of a model is that is in several places."""
    base = "the language model, if --model is a checkpoint without it; the whole model, if it is an adapter"
    group.add_argument("--model-base", metavar="PATH", help=base)


def add_precision_options(group: argparse._ArgumentGroup) -> None:
    """Add the device, the precision and the quantisation of a model."""
    add = group.add_argument
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    precisions = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=precisions, default="auto", help="precision (default: auto)")
    add("--load-in-8bit", action="store_true", help="language model in 8 bit (needs bitsandbytes)")
    add("--load-in-4bit", action="store_true", help="language model in 4 bit (needs bitsandbytes)")


def add_reading_options(group: argparse._ArgumentGroup) -> None:
    """Add how files are read."""
    add = group.add_argument
    add("--num-frames", type=positive, metavar="N", help="frames to sample from a video (default: 8)")
    add("--video-reader", choices=["pyav", "decord"], help="decoder of frames (default: pyav)")
    add("--no-audio", action="store_true", help="ignore the audio tracks of videos")


def add_answer_options(group: argparse._ArgumentGroup) -> None:
    """Add how answers are drawn."""
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=whole_number(),
        default=300,
        metavar="N",
        help="most new tokens of an answer (default: 300)",
    )
    add("--temperature", type=number(), default=0.0, metavar="T", help="sampling temperature; 0 = greedy (default: 0)")
    add("--top-p", type=number(), default=0.9, metavar="P", help="nucleus size, with a temperature (default: 0.9)")
    add("--num-beams", type=whole_number(), default=1, metavar="N", help="beam search width (default: 1)")
    penalty = "above 1, the answer repeats itself less (default: 1.0)"
    add("--repetition-penalty", type=number(), default=1.0, metavar="R", help=penalty)


def check_model_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error where options of `add_model_options` contradict each other; fill in the default model."""
    if not arguments.model and not arguments.cfg_path:
        arguments.model = DEFAULT_MODEL
    if arguments.options and not arguments.cfg_path:
        parser.error("--options overrides settings of a YAML file; give --cfg-path too")
    if arguments.model_base and arguments.cfg_path:
        parser.error("--model-base goes with --model; in a YAML file the language model is model.llama_model")
    if arguments.gpu_id is not None and arguments.device not in (None, "cuda", f"cuda:{arguments.gpu_id}"):
        parser.error(f"--gpu-id {arguments.gpu_id} and --device {arguments.device} contradict each other; give one")
