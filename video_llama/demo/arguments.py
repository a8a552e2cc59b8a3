"""The command line of `demo_video.py`; light to import, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import math

__all__ = ["DEFAULT_MODEL", "build_parser"]

DESCRIPTION = "Ask Video-LLaMA about a video, an image or a sound."
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


def build_parser() -> argparse.ArgumentParser:
    """All options of the demo, in the groups that `--help` shows."""
    parser = argparse.ArgumentParser(
        prog="demo_video.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("the model"))
    _add_input_options(parser.add_argument_group("what to look at and ask"))
    _add_answer_options(parser.add_argument_group("how to answer"))
    _add_page_options(parser.add_argument_group("the page (without --input, --question and --terminal)"))
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number: {text}") from error


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a whole number: {text}") from error


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, as {value} is")
    return value


def _size(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size from 0 on, not {text}")
    return value


def _port(text: str) -> int:
    value = _whole(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must lie from 1 to 65535, which {value} does not")
    return value


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="PATH",
        help=f"checkpoint folder, file, hub id or packaged model ({DEFAULT_MODEL}, unless --cfg-path is given)",
    )
    source.add_argument("--cfg-path", metavar="YAML", help="configuration with a model section (eval_configs/)")
    group.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of --cfg-path: model.ckpt=…"
    )
    group.add_argument(
        "--model-type",
        choices=["vicuna", "llama_v2"],
        help="conversation template; by default the one that belongs to the weights",
    )
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default a GPU if there is one")
    group.add_argument("--gpu-id", type=_not_negative, metavar="N", help="the same as --device cuda:N")
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="precision (auto)"
    )
    group.add_argument("--load-in-8bit", action="store_true", help="language model in 8 bit (needs bitsandbytes)")
    group.add_argument("--load-in-4bit", action="store_true", help="language model in 4 bit (needs bitsandbytes)")


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input", nargs="+", default=[], metavar="FILE", help="videos, images or sound files")
    group.add_argument("--question", nargs="+", metavar="TEXT", help="questions, answered in order on the terminal")
    group.add_argument("--terminal", action="store_true", help="a conversation on the terminal, as with --input alone")
    group.add_argument("--num-frames", type=_positive, metavar="N", help="frames to look at in a video (8)")
    group.add_argument("--video-reader", metavar="NAME", help="what decodes frames: pyav or decord (pyav)")
    group.add_argument("--no-audio", action="store_true", help="do not listen to videos")


def _add_answer_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=_whole, default=300, metavar="N", help="longest answer (300)")
    group.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="0 is greedy (0)")
    group.add_argument("--top-p", type=_number, default=0.9, metavar="P", help="with a temperature: nucleus size (0.9)")
    group.add_argument("--num-beams", type=_whole, default=1, metavar="N", help="beam search width (1)")
    group.add_argument(
        "--repetition-penalty", type=_number, default=1.0, metavar="R", help="above 1 repeats less (1.0)"
    )


def _add_page_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="who may connect: this machine (127.0.0.1)"
    )
    group.add_argument("--port", type=_port, metavar="N", help="the first free one from 7860 on")
    group.add_argument("--share", action="store_true", help="a public address through Gradio's servers, for anybody")
    group.add_argument("--auth-file", metavar="FILE", help="ask for a password: lines of user:password")
    group.add_argument("--max-upload-mb", type=_positive, default=200, metavar="N", help="largest upload (200)")
    group.add_argument("--max-minutes", type=_positive, default=60, metavar="N", help="longest video or sound (60)")
    group.add_argument(
        "--kv-cache-gib",
        type=_size,
        metavar="G",
        help="memory for what conversations have computed (half of what is free; the oldest is forgotten)",
    )
    group.add_argument("--concurrency", type=_positive, default=1, metavar="N", help="requests worked on at once (1)")
