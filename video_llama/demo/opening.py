"""From the options of the command line to a model, how it answers and in which template."""

from __future__ import annotations

import argparse
from dataclasses import replace

from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import VideoLlamaError
from video_llama.model.generation import GenerationOptions
from video_llama.model.inference import VideoLlama

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
    """The model of `--cfg-path` or `--model`."""
    from video_llama.model.builder import build_model, load_pretrained_model

    device = f"cuda:{arguments.gpu_id}" if arguments.gpu_id is not None else arguments.device
    if arguments.cfg_path:
        from video_llama.config import load_config

        config = load_config(arguments.cfg_path, [*model_settings(arguments), *arguments.options])
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


def model_settings(arguments: argparse.Namespace) -> list[str]:
    """What the command line says about the model, as settings of a configuration."""
    given = {
        "dtype": None if arguments.dtype == "auto" else arguments.dtype,
        "load_in_8bit": arguments.load_in_8bit or None,
        "load_in_4bit": arguments.load_in_4bit or None,
    }
    return [f"model.{name}={value}" for name, value in given.items() if value is not None]
