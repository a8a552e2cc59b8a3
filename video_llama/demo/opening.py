"""From the options of the command line to a model, how it answers and in which template."""

from __future__ import annotations

import argparse
from dataclasses import replace

from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import VideoLlamaError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.media.decode import check_video_reader
from video_llama.schema import ProcessorConfig

__all__ = ["choose_options", "choose_template", "load_model"]


def choose_options(arguments: argparse.Namespace) -> GenerationOptions:
    """How answers are drawn.

    Raises:
        VideoLlamaError: a value that makes no sense.
    """
    try:
        return GenerationOptions(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            num_beams=arguments.num_beams,
            repetition_penalty=arguments.repetition_penalty,
        )
    except ValueError as error:
        raise VideoLlamaError(str(error)) from error


def choose_template(arguments: argparse.Namespace) -> Conversation | None:
    """The template that was asked for; None for the one that belongs to the weights."""
    name = {"vicuna": "v1", "llama_v2": "llama_2", None: None}[arguments.model_type]
    return None if name is None else conv_templates[name].copy()


def load_model(arguments: argparse.Namespace) -> VideoLlama:
    """The model of `--cfg-path` or `--model`, which reads files as the options and the configuration say.

    Raises:
        VideoLlamaError: it cannot be loaded, or there is no such video reader.
    """
    from video_llama.config import load_config
    from video_llama.inference.load import build_model, load_pretrained_model

    config = None
    if arguments.cfg_path:
        config = load_config(arguments.cfg_path, [*model_settings(arguments), *arguments.options])
    sections = config.datasets.values() if config is not None else ()
    reading = next((section.vis_processor.train for section in sections), ProcessorConfig())
    video_reader = arguments.video_reader or reading.video_reader
    if video_reader is not None:
        check_video_reader(video_reader)
    device = f"cuda:{arguments.gpu_id}" if arguments.gpu_id is not None else arguments.device
    if config is not None:
        model = build_model(config.model, device=device)
    else:
        model = load_pretrained_model(
            arguments.model,
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
    """What the command line says about the model, as settings of a configuration."""
    given = {
        "dtype": None if arguments.dtype == "auto" else arguments.dtype,
        "load_in_8bit": arguments.load_in_8bit or None,
        "load_in_4bit": arguments.load_in_4bit or None,
    }
    return [f"model.{name}={value}" for name, value in given.items() if value is not None]
