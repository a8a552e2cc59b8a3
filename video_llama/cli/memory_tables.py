"""The tables of `video-llama memory`: sizes from a name, a saved folder or a configuration, and what they need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from video_llama.checkpoints.hub import local_path
from video_llama.checkpoints.language_model import read_language_config
from video_llama.checkpoints.load import configured_sizes
from video_llama.checkpoints.memory import estimate_memory
from video_llama.checkpoints.original_layout import find_config, is_transformers_folder
from video_llama.config import Config, ModelConfig
from video_llama.constants import DEFAULT_NUM_FRAMES
from video_llama.errors import CheckpointError, ConfigError, translate_foreign
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig
from video_llama.model.parts import AUDIO_PARTS, adapted_parts, trained_parts
from video_llama.training.memory import TrainingSample, estimate_training_memory

__all__ = ["configured_model", "print_inference", "print_training", "read_config", "trains_something"]

SIZES: dict[str, dict[str, Any]] = {
    "7b": {},
    "13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
    },
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bytes_per_value": 4},
    "half (bfloat16, float16)": {},
    "half, language model 8 bit": {"language_model_bits": 8},
    "half, language model 4 bit": {"language_model_bits": 4},
}
# Of a training sample, besides media and text: system prompt, introduction of the media.
TEMPLATE_TOKENS = 64
GIB = 2**30


def read_config(source: str, use_audio: bool) -> VideoLlamaConfig:
    """Return a published size by name, or the configuration of a saved folder."""
    if source.lower() in SIZES:
        return VideoLlamaConfig(text_config=SIZES[source.lower()] or None, use_audio=use_audio)
    folder = local_path(source)
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError):
        model_type = None
    if model_type != VideoLlamaConfig.model_type:
        raise ConfigError(
            f"{source}: neither one of {', '.join(SIZES)} nor a folder with a Video-LLaMA's config.json "
            "nor a YAML configuration"
        )
    with translate_foreign(CheckpointError, folder / "config.json", "copy or download it again"):
        config = VideoLlamaConfig.from_pretrained(folder)
    config.use_audio = config.use_audio and use_audio
    return config


def configured_model(config: Config, use_audio: bool) -> tuple[VideoLlamaConfig, str]:
    """Return the sizes that a YAML configuration describes, and how its language model was found.

    Raises:
        ConfigError: the language model is not there, and its name gives no size.
    """
    model = config.model
    use_audio = use_audio and model.equip_audio_branch
    if model.ckpt is not None and is_transformers_folder(local_path(model.ckpt)):
        return read_config(model.ckpt, use_audio), f"sizes of {model.ckpt}"
    folders = [path if path.is_dir() else path.parent for path in map(local_path, filter(None, checkpoints(model)))]
    beside = find_config(folders)
    sizes = VideoLlamaConfig.get_config_dict(beside)[0] if beside else configured_sizes(model)
    text, found = language_model_config(model.llama_model)
    sizes |= {"text_config": text, "use_audio": use_audio, "image_token_id": None, "audio_token_id": None}
    if AUDIO_PARTS & trained_parts(model):
        # The audio branch trains on images.
        sizes["imagebind_vision_config"] = ImageBindTrunkConfig.vision_huge()
    return VideoLlamaConfig(**sizes), found


def checkpoints(model: ModelConfig) -> list[str | None]:
    return [model.ckpt, model.ckpt_2, model.vit_ckpt]


def language_model_config(source: str | None) -> tuple[Any, str]:
    """Return the configuration in its folder, else LLaMA-2 of the size in its name; and words on which it was."""
    if source is not None and (local_path(source) / "config.json").is_file():
        return read_language_config(local_path(source)), f"language model of {source}"
    size = next((size for size in SIZES if source is not None and size in source.lower()), None)
    if size is None:
        wrong = "is not set" if source is None else f"{source} is not there, and its name gives no size"
        raise ConfigError(f"model.llama_model {wrong} (7b, 13b)")
    return SIZES[size] or None, f"{source} is not there: counted as LLaMA-2 of {size}"


def print_inference(config: VideoLlamaConfig, arguments: argparse.Namespace) -> None:
    print("| precision | language model | vision | audio | KV cache | activations | together |")
    print("|---|---|---|---|---|---|---|")
    for name, precision in PRECISIONS.items():
        estimate = estimate_memory(
            config,
            num_frames=arguments.num_frames or DEFAULT_NUM_FRAMES,
            context_length=arguments.context_length or 1024,
            batch_size=arguments.batch_size or 1,
            **precision,
        )
        parts = (estimate.language_model, estimate.vision, estimate.audio, estimate.kv_cache, estimate.activations)
        print_line(name, parts, estimate.total)


def print_training(config: VideoLlamaConfig, training: Config, arguments: argparse.Namespace) -> None:
    model, run, lora = training.model, training.run, training.lora
    parts, adapted = trained_parts(model), adapted_parts(lora, model)
    frames = [section.vis_processor.train.n_frms or DEFAULT_NUM_FRAMES for section in training.datasets.values()]
    media = config.num_video_query_tokens + (config.num_audio_query_tokens if config.use_audio else 0)
    sample = TrainingSample(
        num_tokens=arguments.context_length or model.max_txt_len + media + TEMPLATE_TOKENS,
        num_answer_tokens=model.max_txt_len,
        num_frames=arguments.num_frames or max(frames, default=DEFAULT_NUM_FRAMES),
    )
    batch_size = arguments.batch_size or run.batch_size_train
    print(
        f"training of one process: {batch_size} samples of {sample.num_tokens} tokens, {sample.num_answer_tokens} of "
        f"them learned, and {sample.num_frames} frames"
    )
    print("| precision | frozen weights | trained weights | gradients | optimizer | activations | together |")
    print("|---|---|---|---|---|---|---|")
    for name, precision in PRECISIONS.items():
        # A quantized language model does not train whole.
        if "language_model" in parts and "language_model_bits" in precision:
            continue
        for checkpointing in (False, True):
            estimate = estimate_training_memory(
                config,
                parts,
                sample,
                batch_size=batch_size,
                checkpointing=checkpointing,
                lora=lora if adapted else None,
                adapted=adapted,
                **precision,
            )
            uses = (estimate.frozen, estimate.trained, estimate.gradients, estimate.optimizer, estimate.activations)
            print_line(f"{name}, use_grad_checkpoint" if checkpointing else name, uses, estimate.total)


def print_line(name: str, parts: Sequence[int], total: int) -> None:
    unit, label = (GIB, "GiB") if total >= GIB / 10 else (2**20, "MiB")
    print(f"| {name} | {' | '.join(f'{part / unit:.2f}' for part in (*parts, total))} {label} |")


def trains_something(config: Config) -> bool:
    return bool(trained_parts(config.model) or adapted_parts(config.lora, config.model))
