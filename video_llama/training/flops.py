"""Count the floating-point operations of a batch from the sizes in a configuration: a product and its sum are two.

Only matrix products count, as in torch's FlopCounterMode, against which a test checks the formulas. Attention counts
whole, though a causal kernel may leave out half of it.
"""

from __future__ import annotations

from typing import Any

from video_llama.data.batches import Batch
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig, VideoLlamaVisionConfig
from video_llama.model.encoder_configuration import AudioEncoderConfig, FrameEncoderConfig, block_sizes

__all__ = [
    "audio_branch_flops",
    "batch_flops",
    "frame_flops",
    "language_model_flops",
    "peak_flops",
    "qformer_flops",
    "trunk_flops",
    "video_branch_flops",
    "vit_flops",
]

# Vendors' figures of dense products in half precision, in units of 10^12 operations per second, by words of torch's
# name of a GPU.
_HOPPER = {"B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989}
_AMPERE = {"A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125}
PEAKS = {**_HOPPER, **_AMPERE, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}


def peak_flops(device_name: str) -> float | None:
    """Return the operations per second that a GPU does at most, in half precision; None if it is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, e.g. "NVIDIA H100 80GB HBM3".
    """
    words = f" {device_name.replace('-', ' ')} "
    for name, peak in PEAKS.items():
        if f" {name} " in words:
            return peak * 1e12
    return None


def batch_flops(config: VideoLlamaConfig, batch: Batch) -> float:
    """Return the operations to learn from a batch.

    Padding does not count, nor what is computed once more (checkpointing). Encoders run forward only, and count for the
    media that are not encoded yet. The frozen language model passes gradients on to its inputs: as many operations
    again, and twice as many in the attention, of whose products both factors have gradients. What trains takes
    gradients for inputs and weights.
    """
    text, flops = config.get_text_config(), 0.0
    lengths = batch.text["attention_mask"].sum(dim=1).tolist()
    answers = (batch.text["labels"][:, 1:] >= 0).sum(dim=1).tolist()
    for length, num_answers in zip(lengths, answers, strict=True):
        # Frozen weights count twice (forward, gradient of the inputs). Attention counts three times, since both factors
        # of its products have gradients: three passes, less one without attention (0 keys).
        forward = language_model_flops(text, length, length, num_logits=num_answers)
        flops += 3 * forward - language_model_flops(text, length, 0, num_logits=num_answers)
    for item in batch.media:
        number = len(item.values)
        if item.name == "pixel_values":
            branch, encoder = video_branch_flops(config, number), frame_flops(config)
        elif isinstance(config.audio_config, AudioEncoderConfig):
            tokens = config.audio_config.num_output_tokens
            branch, encoder = audio_branch_flops(config, number * tokens), encoder_flops(config.audio_config)
        else:
            trunk = config.audio_config if item.name == "audio_values" else config.imagebind_vision_config
            branch, encoder = audio_branch_flops(config, number), trunk_flops(trunk)
        flops += 3 * branch
        if not item.is_encoded:
            flops += number * encoder
    return flops


def video_branch_flops(config: VideoLlamaConfig, num_frames: int) -> float:
    """Return the operations of the Q-Former over all frames, and of the projection."""
    states = num_frames * config.frame_tokens_shape[0]
    return _branch_flops(config, config.video_qformer_config, config.num_video_query_tokens, states)


def audio_branch_flops(config: VideoLlamaConfig, num_segments: int) -> float:
    """Return the operations of the Q-Former over all segments, and of the projection."""
    return _branch_flops(config, config.audio_qformer_config, config.num_audio_query_tokens, num_segments)


def _branch_flops(config: VideoLlamaConfig, qformer: Any, queries: int, states: int) -> float:
    projection = 2.0 * queries * qformer.hidden_size * config.get_text_config().hidden_size
    return qformer_flops(qformer, queries, states) + projection


def frame_flops(config: VideoLlamaConfig) -> float:
    """Return the operations of ViT and BLIP-2's Q-Former for one frame."""
    vision = config.vision_config
    encoder = encoder_flops(vision) if isinstance(vision, FrameEncoderConfig) else vit_flops(vision)
    if config.connector is not None:
        return encoder
    tokens = vision.num_tokens
    return encoder + qformer_flops(config.qformer_config, config.num_query_tokens, tokens)


def vit_flops(vision: VideoLlamaVisionConfig) -> float:
    """Return the operations for one frame: layers * (2 n (4 d d + 2 d m) + 4 n n d), and the patches."""
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    stem = 2.0 * patches * 3 * vision.patch_size**2 * width
    return stem + vision.num_hidden_layers * _block_flops(patches + 1, width, vision.intermediate_size, patches + 1)


def encoder_flops(encoder: FrameEncoderConfig | AudioEncoderConfig) -> float:
    """Return the operations of the blocks of another encoder for one frame or segment, as those of a usual transformer.

    An estimate: of an audio encoder only the tokens that are kept are known.
    """
    sizes = block_sizes(encoder)
    tokens = encoder.num_tokens if isinstance(encoder, FrameEncoderConfig) else encoder.num_output_tokens
    return sizes.num_hidden_layers * _block_flops(tokens, sizes.hidden_size, sizes.intermediate_size, tokens)


def trunk_flops(trunk: ImageBindTrunkConfig) -> float:
    """Return the operations for one segment or frame; each attention over audio has one learned key more."""
    tokens, width, is_audio = trunk.num_tokens, trunk.hidden_size, trunk.modality == "audio"
    values = (1 if is_audio else 3 * trunk.temporal_patch_size) * trunk.patch_size**2
    stem = 2.0 * (tokens - 1) * values * width
    blocks = trunk.num_hidden_layers * _block_flops(tokens, width, trunk.intermediate_size, tokens + is_audio)
    return stem + blocks + 2.0 * width * trunk.output_size


def qformer_flops(qformer: Any, queries: int, states: int) -> float:
    """Return the operations for one input: layers of queries, some of which also attend to the states."""
    width = qformer.hidden_size
    own = _block_flops(queries, width, qformer.intermediate_size, queries)
    # Query and output projections run once per query, key and value projections once per state.
    cross = 2.0 * queries * 2 * width**2 + 2.0 * states * 2 * width * qformer.encoder_hidden_size
    cross += 4.0 * queries * states * width
    # Rounded up, because the first layer always attends to the states.
    num_cross = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    return qformer.num_hidden_layers * own + num_cross * cross


def language_model_flops(text: Any, num_tokens: int, num_keys: int, num_logits: int) -> float:
    """Return the operations of a LLaMA for some tokens that each attend to `num_keys` positions."""
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    projections = text.hidden_size * head_width * (2 * heads + 2 * key_heads)
    weights = projections + 3 * text.hidden_size * text.intermediate_size
    attention = 4.0 * num_tokens * num_keys * heads * head_width
    logits = 2.0 * num_logits * text.hidden_size * text.vocab_size
    return text.num_hidden_layers * (2.0 * num_tokens * weights + attention) + logits


def _block_flops(tokens: int, width: int, intermediate: int, num_keys: int) -> float:
    """Return the operations of four projections, the MLP, scores and their weighted sum."""
    return 2.0 * tokens * (4 * width**2 + 2 * width * intermediate) + 4.0 * tokens * num_keys * width
