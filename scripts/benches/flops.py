"""Operations of every part, as the package counts them."""

from __future__ import annotations

from video_llama.training.flops import (
    ClipFlops,
    Workload,
    branch_flops,
    caption_flops,
    encoder_flops,
    language_model_flops,
    qformer_flops,
    training_flops,
    trunk_flops,
    vit_flops,
)

__all__ = [
    "ClipFlops",
    "Workload",
    "branch_flops",
    "caption_flops",
    "encoder_flops",
    "language_model_flops",
    "qformer_flops",
    "training_flops",
    "trunk_flops",
    "vit_flops",
]
