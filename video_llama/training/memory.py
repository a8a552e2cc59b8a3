"""Count the memory that training needs on one device, from shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from video_llama.checkpoints.memory import build_skeleton, estimate_memory
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.parts import freeze_for_training

__all__ = ["TrainingMemory", "TrainingSample", "estimate_training_memory", "language_model_saved_bytes"]


@dataclass(frozen=True)
class TrainingSample:
    """Sizes of one sample: tokens of prompt, media and answer together, answer tokens, frames, audio segments."""

    num_tokens: int
    num_answer_tokens: int
    num_frames: int = 8
    num_segments: int = 8


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by use.

    Args:
        frozen, trained: weights; those that train are float32.
        gradients, optimizer: of what trains; Adam keeps two moments.
        activations: what the backward pass needs, and logits; or the frame encoder's, if they are more.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return the bytes that a device should have free; the allocator's own overhead comes on top."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations


def estimate_training_memory(
    config: VideoLlamaConfig,
    parts: Collection[str],
    sample: TrainingSample,
    *,
    batch_size: int,
    bytes_per_value: int = 2,
    language_model_bits: int | None = None,
    checkpointing: bool = False,
) -> TrainingMemory:
    """Count the memory of one process; DDP needs it on every device.

    Args:
        config: the model.
        parts: what trains.
        sample: sizes of every sample.
        batch_size: samples of one process at a time.
        bytes_per_value: of frozen weights and of activations.
        language_model_bits: 8 or 4 for a quantized language model.
        checkpointing: the language model's layers are computed again in the backward pass.
    """
    model = build_skeleton(config)
    freeze_for_training(model, parts)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inference = estimate_memory(
        config,
        bytes_per_value=bytes_per_value,
        language_model_bits=language_model_bits,
        num_frames=sample.num_frames,
        context_length=1,
        batch_size=batch_size,
        skeleton=model,
    )
    text = config.get_text_config()
    saved = language_model_saved_bytes(text, sample.num_tokens, bytes_per_value, checkpointing)
    # Logits, their float32 copy, its log-softmax, and the gradient of one of them.
    saved += sample.num_answer_tokens * text.vocab_size * (bytes_per_value + 3 * 4)
    if "video_qformer" in parts:
        states = config.num_query_tokens * sample.num_frames
        values = _qformer_saved_values(config.video_qformer_config, states, config.num_video_query_tokens)
        saved += values * bytes_per_value
    if "audio_qformer" in parts:
        values = _qformer_saved_values(config.audio_qformer_config, sample.num_segments, config.num_audio_query_tokens)
        saved += values * bytes_per_value
    # Weights, gradients and both moments of what trains are float32.
    trained = num_trained * 4
    return TrainingMemory(
        # All weights were counted at the frozen precision, so those that train are taken out here.
        frozen=inference.weights - num_trained * bytes_per_value,
        trained=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=max(batch_size * saved, inference.activations),
    )


def language_model_saved_bytes(text: Any, num_tokens: int, bytes_per_value: int, checkpointing: bool = False) -> int:
    """Return the bytes that the backward pass through a frozen LLaMA keeps for one sequence.

    Gradients pass through the frozen layers to the media, but a linear layer then keeps nothing of its input. What is
    kept of a layer, for each token: the float32 states of its two norms; queries, keys, values and result of the
    attention; gate, activated gate and up of the MLP.
    """
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    attention = 2 * (heads + key_heads) * head_width
    layer = 2 * 4 * text.hidden_size + bytes_per_value * (attention + 3 * text.intermediate_size)
    # Each layer keeps only its input; one layer at a time is computed again in full.
    if checkpointing:
        return num_tokens * (text.num_hidden_layers * text.hidden_size * bytes_per_value + layer)
    return num_tokens * text.num_hidden_layers * layer


def _qformer_saved_values(qformer: Any, num_states: int, num_queries: int) -> int:
    """Return the saved values: per layer the states with keys and values, per query 14 widths and 2 intermediates."""
    states = num_states * (qformer.encoder_hidden_size + 2 * qformer.hidden_size)
    queries = num_queries * (14 * qformer.hidden_size + 2 * qformer.intermediate_size)
    return qformer.num_hidden_layers * (states + queries)
