"""The parts of the model that can train, by the names of their parameters, and which of them a configuration trains."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any

from torch import nn

from video_llama.config import LoraConfig, ModelConfig
from video_llama.errors import ConfigError
from video_llama.model.encoder_graph import CHUNK_SIZE
from video_llama.model.frozen import requires_gradients
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.schema import FREEZING_KEYS

__all__ = [
    "ADAPTERS",
    "AUDIO_PARTS",
    "NOTHING_TRAINS",
    "adapted_parts",
    "adapter_containers",
    "adapter_layers",
    "adapter_parameters",
    "branch_of",
    "enable_checkpointing",
    "freeze_for_training",
    "has_frame_qformer",
    "part_of_parameter",
    "trained_parts",
]

# Beginnings of the names of parameters in saved folders. The norm behind the frame encoder belongs to it, as in the
# original, where `freeze_vit` covers both.
_PREFIXES = {
    "frame_encoder": ("video_branch.vision_encoder.", "video_branch.vision_norm."),
    "frame_qformer": ("video_branch.qformer.", "video_branch.query_tokens"),
    "video_qformer": (
        "video_branch.video_qformer.",
        "video_branch.connector.",
        "video_branch.frame_position_embedding.",
        "video_branch.video_query_tokens",
    ),
    "video_projection": ("video_branch.projection.",),
    "audio_qformer": (
        "audio_branch.audio_qformer.",
        "audio_branch.segment_position_embedding.",
        "audio_branch.audio_query_tokens",
    ),
    "audio_projection": ("audio_branch.projection.",),
    "language_model": ("language_model.",),
}
AUDIO_PARTS = frozenset({"audio_qformer", "audio_projection"})
ADAPTERS = "lora"
"""What stands for all adapters where parts are named (`run.part_lr`)."""
NOTHING_TRAINS = (
    "everything is frozen: name what trains in model.unfreeze, set model.frozen_video_Qformer and "
    "frozen_llama_proj, or frozen_audio_Qformer, to False, or train adapters (lora.target)"
)


def trained_parts(section: ModelConfig) -> frozenset[str]:
    """Return the parts that a model section trains whole, by `unfreeze` or by the original's keys.

    Raises:
        ConfigError: the two contradict each other, the audio branch should train but is not built, or the language
            model is quantized.
    """
    by_keys = {part for part, key in FREEZING_KEYS.items() if key is not None and not getattr(section, key)}
    parts = frozenset(by_keys)
    if section.unfreeze is not None:
        parts = frozenset(section.unfreeze)
        for part in sorted(by_keys - parts - {"audio_projection"}):
            raise ConfigError(
                f"model.{FREEZING_KEYS[part]} is False, but model.unfreeze does not name {part}: leave out one of the "
                "two keys"
            )
    if "frame_qformer" in parts and not has_frame_qformer(section):
        raise ConfigError(f"frame_qformer would train, but model.connector {section.connector['name']!r} has none")
    for part in sorted(parts & AUDIO_PARTS):
        if not section.equip_audio_branch:
            key = "unfreeze" if section.unfreeze is not None else FREEZING_KEYS[part]
            raise ConfigError(f"model.{key} trains the {part}, but equip_audio_branch is False")
    if "language_model" in parts and (section.load_in_8bit or section.load_in_4bit or section.low_resource):
        raise ConfigError(
            "a language model in 8 or 4 bit does not train whole: take language_model out of model.unfreeze and train "
            "adapters (lora.target: language_model), or leave model.load_in_8bit, load_in_4bit and low_resource out"
        )
    return parts


def has_frame_qformer(section: ModelConfig) -> bool:
    """Return whether the connector of a model section has a Q-Former for each frame, as the published one does."""
    return bool(section.connector.get("name", "qformer") == "qformer")


def part_of_parameter(name: str) -> str | None:
    """Return the part that a parameter belongs to, by its name in the model or in files; None for what never trains."""
    saved = to_saved_name(name)
    return next((part for part, prefixes in _PREFIXES.items() if saved.startswith(prefixes)), None)


def branch_of(part: str) -> str | None:
    """Return the branch, by its name in the model, that a part is in; None for the language model."""
    branch = _PREFIXES[part][0].partition(".")[0]
    return None if branch == "language_model" else branch


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that PEFT has put into a model, by name."""
    # Each lists the attributes that hold what it adds, so PEFT itself is not needed here.
    return {name: module for name, module in model.named_modules() if getattr(module, "adapter_layer_names", ())}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that PEFT has put into a model, whether they train or not."""
    for layer in adapter_layers(model).values():
        for held in adapter_containers(layer):
            yield from held.parameters()


def adapter_containers(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield what a layer of PEFT has added, each by the names of the adapters: an `nn.ModuleDict`, for instance."""
    names: Any = layer.adapter_layer_names
    for name in names:
        with contextlib.suppress(AttributeError):
            # Names may be dotted, and some name what only other settings add.
            held = attrgetter(name)(layer)
            if isinstance(held, nn.Module):
                yield held


def freeze_for_training(model: VideoLlamaForConditionalGeneration, parts: Collection[str]) -> None:
    """Set `requires_grad` so that only the given parts train (Zhang, Li and Bing 2023, section 2.3), and adapters.

    Adapters in the model stay as their owner set them.

    Raises:
        ConfigError: the audio branch should train, but the model has none; or nothing trains.
    """
    if model.audio_branch is None and AUDIO_PARTS & set(parts):
        raise ConfigError("the audio branch cannot train: the model was built without it")
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    is_trained = False
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(part_of_parameter(name) in parts)
        is_trained = is_trained or parameter.requires_grad
    if not is_trained:
        raise ConfigError(NOTHING_TRAINS)


def enable_checkpointing(model: VideoLlamaForConditionalGeneration) -> None:
    """Compute activations again in the backward pass instead of keeping them, where gradients pass.

    That is the language model always, and the encoders of frames where something in them trains.
    """
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    branch = model.video_branch
    parts: list[Any] = [*branch.encoder_parts]
    if any(map(requires_gradients, parts[:2])):
        branch.vision_encoder.set_grad_checkpointing(True)
        # A layer that is computed through `checkpoint` cannot be captured as a CUDA graph in a validation.
        if branch.chunk_size == "auto":
            model.set_chunk_size(2 * CHUNK_SIZE)
    # Behind the encoder and its norm, the frame Q-Former of the published connector.
    for qformer in parts[2:]:
        if any(map(requires_gradients, parts)):
            qformer.gradient_checkpointing_enable({"use_reentrant": False})


def adapted_parts(lora: LoraConfig, section: ModelConfig) -> frozenset[str]:
    """Return the parts that get adapters.

    Raises:
        ConfigError: a part trains whole as well, or the audio Q-Former is named and not built.
    """
    targets = set(lora.target or ())
    if "qformers" in targets:
        targets.remove("qformers")
        targets.add("video_qformer")
        if has_frame_qformer(section):
            targets.add("frame_qformer")
        if section.equip_audio_branch:
            targets.add("audio_qformer")
    if "audio_qformer" in targets and not section.equip_audio_branch:
        raise ConfigError("lora.target names audio_qformer, but model.equip_audio_branch is False")
    twice = sorted(targets & trained_parts(section))
    if twice:
        raise ConfigError(f"{', '.join(twice)} would train whole and by adapters: take it out of one of the two")
    return frozenset(targets)
