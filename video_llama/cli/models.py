"""The model, the template and the answer options that `video_llama.cli.options` names."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from video_llama.cli.command import numbered
from video_llama.cli.options import TEMPLATES
from video_llama.errors import ConfigError

if TYPE_CHECKING:
    from video_llama.conversation import Conversation
    from video_llama.inference.engine import VideoLlama
    from video_llama.inference.generation import GenerationOptions

__all__ = ["choose_options", "choose_template", "describe_model", "load_model", "model_settings", "show_model"]


def choose_options(arguments: argparse.Namespace, **others: Any) -> GenerationOptions:
    """Return how answers are drawn, by the options of `add_answer_options` and others.

    Raises:
        ConfigError: a value is out of range.
    """
    from video_llama.inference.generation import GenerationOptions

    names = ("max_new_tokens", "temperature", "top_p", "num_beams", "repetition_penalty")
    try:
        return GenerationOptions(**{name: getattr(arguments, name) for name in names}, **others)
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
    show_model(model)
    media = model.processor.media_processor
    model.processor.media_processor = replace(
        media, num_frames=reading.n_frms or media.num_frames, video_reader=video_reader or media.video_reader
    )
    return model


def show_model(model: VideoLlama) -> None:
    """Print in one line which model answers, its size and precision, and where it runs."""
    # On stderr, since answers and figures are what the output is for.
    sys.stderr.write(f"model: {describe_model(model)}\n")


def describe_model(model: VideoLlama) -> str:
    """Return in one line which model answers, its size and precision, and where it runs."""
    import torch

    where = str(model.device)
    if model.device.type == "cpu":
        where = f"cpu ({numbered(torch.get_num_threads(), 'thread')})"
    return f"{model.summary} on {where}"


def model_settings(arguments: argparse.Namespace) -> list[str]:
    """Return what the command line says about the model as settings of a configuration."""
    settings = []
    if arguments.dtype != "auto":
        settings.append(f"model.dtype={arguments.dtype}")
    for name in ("load_in_8bit", "load_in_4bit"):
        if getattr(arguments, name):
            settings.append(f"model.{name}=True")
    return settings
