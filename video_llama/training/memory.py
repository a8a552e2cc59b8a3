"""Count the memory that training needs on one device, from shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from video_llama.checkpoints.adapters import lora_layers
from video_llama.checkpoints.memory import build_skeleton, estimate_memory
from video_llama.config import LoraConfig
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_configuration import block_sizes
from video_llama.model.parts import part_of_parameter

__all__ = ["TrainingMemory", "TrainingSample", "estimate_training_memory", "language_model_saved_bytes"]

LM = "language_model"
_LARGE = (LM, "frame_encoder")


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
    lora: LoraConfig | None = None,
    adapted: Collection[str] = (),
) -> TrainingMemory:
    """Count the memory of one process; DDP needs it on every device.

    Args:
        config: the model.
        parts: what trains whole, by the names of `model/parts.py`.
        sample: sizes of every sample.
        batch_size: samples of one process at a time.
        bytes_per_value: of frozen weights and of activations.
        language_model_bits: 8 or 4 for a quantized language model.
        checkpointing: the layers of the language model, and of encoders that train, are computed again in the backward
            pass.
        lora, adapted: the adapters, and the parts that get them.
    """
    model = build_skeleton(config)
    num_whole = sum(value.numel() for name, value in model.named_parameters() if part_of_parameter(name) in parts)
    layers = {} if lora is None else lora_layers(model, lora, adapted)
    num_trained = num_whole
    if lora is not None:
        num_trained += sum(lora.r * (layer.in_features + layer.out_features) for layer in layers.values())
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
    inputs = 0
    if LM in parts or (LM in adapted and bytes_per_value == 4):
        inputs = 2 * text.hidden_size + text.intermediate_size
    elif LM in adapted:
        # Autocast gives each adapter a copy of its layer's input, also where layers share it.
        inside = [layer for name, layer in layers.items() if part_of_parameter(f"{name}.weight") == LM]
        inputs = sum(layer.in_features for layer in inside) // text.num_hidden_layers
    saved = language_model_saved_bytes(text, sample.num_tokens, bytes_per_value, checkpointing, inputs=inputs)
    saved += _branches_saved_bytes(config, {*parts, *adapted}, sample, bytes_per_value, checkpointing)
    # Logits, their float32 copy, its log-softmax, and the gradient of one of them.
    saved += sample.num_answer_tokens * text.vocab_size * (bytes_per_value + 3 * 4)
    activations = max(batch_size * saved, inference.activations)
    if bytes_per_value < 4:
        # Autocast keeps what it has cast of the large parts until the end of the step.
        large = [value for name, value in model.named_parameters() if part_of_parameter(name) in {*_LARGE} & {*parts}]
        activations += bytes_per_value * sum(value.numel() for value in large)
    # Weights, gradients and both moments of what trains are float32.
    trained = num_trained * 4
    return TrainingMemory(
        # All weights were counted at the frozen precision, so those that train are taken out here.
        frozen=inference.weights - num_whole * bytes_per_value,
        trained=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
    )


def _branches_saved_bytes(
    config: VideoLlamaConfig, learning: set[str], sample: TrainingSample, bytes_per_value: int, checkpointing: bool
) -> int:
    """Return what the backward pass through the media of one sample keeps, where these parts learn."""
    saved = 0
    encoders = learning & {"frame_encoder", "frame_qformer"}
    if encoders:
        tokens = config.vision_config.num_tokens
        if config.connector is None:
            values = _qformer_saved_values(config.qformer_config, tokens, config.num_query_tokens)
            # Gradients end at the first part that learns.
            saved += sample.num_frames * values * bytes_per_value
        if "frame_encoder" in encoders:
            vision = block_sizes(config.vision_config)
            saved += vit_saved_bytes(vision, sample.num_frames * tokens, bytes_per_value, checkpointing)
    if encoders or "video_qformer" in learning:
        states = config.frame_tokens_shape[0] * sample.num_frames
        values = _qformer_saved_values(config.video_qformer_config, states, config.num_video_query_tokens)
        saved += values * bytes_per_value
    if "audio_qformer" in learning:
        values = _qformer_saved_values(config.audio_qformer_config, sample.num_segments, config.num_audio_query_tokens)
        saved += values * bytes_per_value
    return saved


def vit_saved_bytes(vision: Any, num_tokens: int, bytes_per_value: int, checkpointing: bool = False) -> int:
    """Return the bytes that the backward pass through the frame encoder keeps.

    Of a block that are, for each token: the float32 states in front of its two norms, what the norms return, queries,
    keys, values and result of the attention, and the MLP's states before and after its activation function.
    """
    width = vision.hidden_size
    block = 2 * 4 * width + bytes_per_value * (6 * width + 2 * vision.intermediate_size)
    if checkpointing:
        return num_tokens * (vision.num_hidden_layers * width * 4 + block)
    return num_tokens * vision.num_hidden_layers * block


def language_model_saved_bytes(
    text: Any, num_tokens: int, bytes_per_value: int, checkpointing: bool = False, inputs: int = 0
) -> int:
    """Return the bytes that the backward pass through a LLaMA keeps for one sequence.

    Gradients pass through frozen layers to the media, but a linear layer then keeps nothing of its input. What is
    kept of a layer, for each token: the float32 states of its two norms; queries, keys, values and result of the
    attention; gate, activated gate and up of the MLP. Where layers learn, whole or by adapters, their `inputs` come on
    top: so many values for each token.
    """
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    attention = 2 * (heads + key_heads) * head_width
    layer = 2 * 4 * text.hidden_size + bytes_per_value * (attention + 3 * text.intermediate_size + inputs)
    # Each layer keeps only its input; one layer at a time is computed again in full.
    if checkpointing:
        return num_tokens * (text.num_hidden_layers * text.hidden_size * bytes_per_value + layer)
    return num_tokens * text.num_hidden_layers * layer


def _qformer_saved_values(qformer: Any, num_states: int, num_queries: int) -> int:
    """Return the saved values: per layer that attends to them the states with keys and values, and of each layer, per
    query, 14 widths and 2 intermediates."""
    num_cross = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    states = num_states * (qformer.encoder_hidden_size + 2 * qformer.hidden_size)
    queries = num_queries * (14 * qformer.hidden_size + 2 * qformer.intermediate_size)
    return num_cross * states + qformer.num_hidden_layers * queries
