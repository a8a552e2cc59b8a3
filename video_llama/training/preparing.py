"""A loaded model as the configuration trains it: adapters put in, the rest frozen, activations computed again."""

from __future__ import annotations

from typing import Any

from video_llama.checkpoints.adapters import add_lora, check_adapters, without_wrapper
from video_llama.config import Config
from video_llama.errors import ConfigError
from video_llama.model.parts import (
    adapted_parts,
    adapter_layers,
    enable_checkpointing,
    freeze_for_training,
    trained_parts,
)
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["prepare_model"]


def prepare_model(model: Any, config: Config, *, is_sharded: bool) -> VideoLlamaForConditionalGeneration:
    """Return a model, changed in place, of which only what a configuration names requires gradients, and adapters.

    Args:
        model: the whole model, or what PEFT has made of it, whose adapter stays as its owner set it.
        is_sharded: several processes share its weights.

    Raises:
        ConfigError: what should train is not there or cannot be saved, or nothing trains.
    """
    section = config.model
    adapted = adapted_parts(config.lora, section)
    plain = without_wrapper(model)
    if adapted:
        add_lora(plain, config.lora, adapted)
    check_adapters(plain)
    freeze_for_training(plain, trained_parts(section))
    if is_sharded:
        if adapter_layers(plain):
            raise ConfigError("adapters (lora) do not train with FSDP or DeepSpeed: start the run with torchrun")
        # Processes may have different numbers of frames, but all must run the encoders equally often.
        plain.set_chunk_size(None)
    if section.use_grad_checkpoint:
        enable_checkpointing(plain)
    return plain
