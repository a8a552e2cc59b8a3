"""Floating-point operations of every part, from the sizes in a configuration: a product and its sum are two.

Only matrix products count, as in FlopCounterMode of torch, against which a test checks the formulas. Attention counts
whole, though a causal kernel may leave out half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from video_llama.data.batches import Batch
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaConfig, VideoLlamaVisionConfig

__all__ = [
    "ClipFlops",
    "Workload",
    "batch_flops",
    "branch_flops",
    "caption_flops",
    "encoder_flops",
    "language_model_flops",
    "peak_flops",
    "qformer_flops",
    "training_flops",
    "trunk_flops",
    "vit_flops",
]

PEAKS: Mapping[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Vendors' figures of dense products in half precision, operations in a second, by words of torch's name of a GPU."""


def peak_flops(device_name: str) -> float | None:
    """Operations that a GPU does in a second at most, in half precision; None if it is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` says it, e.g. "NVIDIA H100 80GB HBM3".
    """
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), None)


@dataclass(frozen=True)
class Workload:
    """What is done to one clip.

    Args:
        num_frames: that are looked at.
        num_segments: of sound that are listened to; 0 for none.
        num_text_tokens: of the prompt besides the media.
        num_answer_tokens: generated, or learned from.
    """

    num_frames: int = 8
    num_segments: int = 8
    num_text_tokens: int = 100
    num_answer_tokens: int = 64

    def prompt_tokens(self, config: VideoLlamaConfig) -> int:
        """Text and media together."""
        sound = config.num_audio_query_tokens if self.num_segments else 0
        return self.num_text_tokens + config.num_video_query_tokens + sound


@dataclass(frozen=True)
class ClipFlops:
    """Operations for one clip.

    Args:
        encoders: ViT, BLIP-2's Q-Former and ImageBind's trunk: what a feature cache saves.
        branches: the two small Q-Formers and the projections.
        prompt: the language model reads the prompt (in training: the whole sample).
        answer: it writes the answer token by token.
        backward: in training.
    """

    encoders: float
    branches: float
    prompt: float
    answer: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.encoders + self.branches + self.prompt + self.answer + self.backward


def caption_flops(config: VideoLlamaConfig, work: Workload) -> ClipFlops:
    """To caption a clip: everything forward; each token of the answer looks at all before it."""
    text, prompt = config.get_text_config(), work.prompt_tokens(config)
    read = language_model_flops(text, prompt, prompt, num_logits=1)
    written = sum(
        language_model_flops(text, 1, prompt + number, num_logits=1) for number in range(1, work.num_answer_tokens)
    )
    return ClipFlops(encoder_flops(config, work), branch_flops(config, work), read, written)


def training_flops(config: VideoLlamaConfig, work: Workload, is_cached: bool = False) -> ClipFlops:
    """To learn from a clip: frozen encoders run forward only, or not at all; the frozen language model passes gradients
    on to its inputs (as many operations again, and twice as many in the attention, of whose products both factors have
    gradients); what trains takes gradients for inputs and weights."""
    text = config.get_text_config()
    tokens = work.prompt_tokens(config) + work.num_answer_tokens
    read = language_model_flops(text, tokens, tokens, num_logits=work.num_answer_tokens)
    branches = branch_flops(config, work)
    attention = read - language_model_flops(text, tokens, 0, num_logits=work.num_answer_tokens)
    encoders = 0.0 if is_cached else encoder_flops(config, work)
    return ClipFlops(encoders, branches, read, 0.0, read + attention + 2 * branches)


def batch_flops(config: VideoLlamaConfig, batch: Batch) -> float:
    """To learn from the samples of a batch, as `training_flops` counts them: padding counts as nothing, nor does what
    is computed once more (checkpointing).

    Encoders count for the media that are not encoded yet.
    """
    text, flops = config.get_text_config(), 0.0
    lengths = batch.text["attention_mask"].sum(dim=1).tolist()
    answers = (batch.text["labels"][:, 1:] >= 0).sum(dim=1).tolist()
    for length, num_answers in zip(lengths, answers, strict=True):
        read = language_model_flops(text, length, length, num_logits=num_answers)
        flops += 3 * read - language_model_flops(text, length, 0, num_logits=num_answers)
    for item in batch.media:
        is_visual, number = item.name == "pixel_values", len(item.values)
        flops += 3 * (_video_flops(config, number) if is_visual else _audio_flops(config, number))
        if not item.is_encoded:
            flops += number * _encoder_flops_of_one(config, item.name)
    return flops


def _encoder_flops_of_one(config: VideoLlamaConfig, name: str) -> float:
    """Of one frame or one segment."""
    if name == "pixel_values":
        return vit_flops(config.vision_config) + _frame_qformer_flops(config)
    trunk = config.audio_config if name == "audio_values" else config.imagebind_vision_config
    return trunk_flops(trunk)


def encoder_flops(config: VideoLlamaConfig, work: Workload) -> float:
    """What depends on the file alone."""
    frame = vit_flops(config.vision_config) + _frame_qformer_flops(config)
    return work.num_frames * frame + work.num_segments * trunk_flops(config.audio_config)


def branch_flops(config: VideoLlamaConfig, work: Workload) -> float:
    """What trains: Q-Formers over all frames and all segments, projections."""
    sound = _audio_flops(config, work.num_segments) if work.num_segments else 0.0
    return _video_flops(config, work.num_frames) + sound


def _video_flops(config: VideoLlamaConfig, num_frames: int) -> float:
    """Of the Q-Former over all frames, and the projection."""
    video, queries = config.video_qformer_config, config.num_video_query_tokens
    projected = 2.0 * queries * video.hidden_size * config.get_text_config().hidden_size
    return qformer_flops(video, queries, num_frames * config.num_query_tokens) + projected


def _audio_flops(config: VideoLlamaConfig, num_segments: int) -> float:
    """Of the Q-Former over all segments, and the projection."""
    audio, queries = config.audio_qformer_config, config.num_audio_query_tokens
    projected = 2.0 * queries * audio.hidden_size * config.get_text_config().hidden_size
    return qformer_flops(audio, queries, num_segments) + projected


def vit_flops(vision: VideoLlamaVisionConfig) -> float:
    """Of one frame: layers * (2 n (4 d d + 2 d m) + 4 n n d), and the patches."""
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    stem = 2.0 * patches * 3 * vision.patch_size**2 * width
    return stem + vision.num_hidden_layers * _block_flops(patches + 1, width, vision.intermediate_size, patches + 1)


def trunk_flops(trunk: ImageBindTrunkConfig) -> float:
    """Of one segment, or one frame; each attention to sound looks at one learned key more."""
    tokens, width, is_audio = trunk.num_tokens, trunk.hidden_size, trunk.modality == "audio"
    values = (1 if is_audio else 3 * trunk.temporal_patch_size) * trunk.patch_size**2
    stem = 2.0 * (tokens - 1) * values * width
    blocks = trunk.num_hidden_layers * _block_flops(tokens, width, trunk.intermediate_size, tokens + is_audio)
    return stem + blocks + 2.0 * width * trunk.output_size


def _block_flops(tokens: int, width: int, intermediate: int, num_keys: int) -> float:
    """Four projections, the MLP, scores and their weighted sum."""
    return 2.0 * tokens * (4 * width**2 + 2 * width * intermediate) + 4.0 * tokens * num_keys * width


def _frame_qformer_flops(config: VideoLlamaConfig) -> float:
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    return qformer_flops(config.qformer_config, config.num_query_tokens, tokens)


def qformer_flops(qformer: Any, queries: int, states: int) -> float:
    """Of one input: layers of queries, some of which also look at the states."""
    width = qformer.hidden_size
    own = _block_flops(queries, width, qformer.intermediate_size, queries)
    cross = 2.0 * queries * 2 * width**2 + 2.0 * states * 2 * width * qformer.encoder_hidden_size
    cross += 4.0 * queries * states * width
    num_cross = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    return qformer.num_hidden_layers * own + num_cross * cross


def language_model_flops(text: Any, num_tokens: int, num_keys: int, num_logits: int) -> float:
    """Of some tokens that each look at `num_keys` positions; a LLaMA."""
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    projections = text.hidden_size * head_width * (2 * heads + 2 * key_heads)
    weights = projections + 3 * text.hidden_size * text.intermediate_size
    attention = 4.0 * num_tokens * num_keys * heads * head_width
    logits = 2.0 * num_logits * text.hidden_size * text.vocab_size
    return text.num_hidden_layers * (2.0 * num_tokens * weights + attention) + logits
