"""The one table between our parameter names and those of the original's files, by part of the model.

A part is what one published file must hold. `MODEL_PARTS` lists, for each part, rows of (original pattern, our
pattern): `#` stands for a layer number and `*` for the rest of a name, and the first row that fits a name
counts, in either direction. Original names are those of the whole original model; `eva_vit_g.pth` and
`imagebind_huge.pth` leave the name of their module out (`Part.file_prefix`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

__all__ = [
    "AUDIO_BRANCH",
    "AUDIO_ENCODER",
    "IMAGEBIND_VISION",
    "LANGUAGE_MODEL",
    "MODEL_PARTS",
    "PROJECTION",
    "QFORMER",
    "VIDEO_BRANCH",
    "VISION_ENCODER",
    "Part",
    "is_stray",
    "original_to_ours",
    "part_of",
    "to_original_name",
    "to_our_name",
]

Row = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The weights that belong into one file.

    Args:
        name: what it is, in the words of an error message.
        file: the published file that holds it, and the YAML key that names that file.
        rows: (original pattern, our pattern).
        file_prefix: what the file leaves out in front of the original names.
    """

    name: str
    file: str
    rows: tuple[Row, ...]
    file_prefix: str = ""


def _qformer_rows(original: str, ours: str) -> tuple[Row, ...]:
    layer, our_layer = f"{original}.bert.encoder.layer.#", f"{ours}.encoder.layer.#"
    return (
        (f"{original}.bert.embeddings.LayerNorm.*", f"{ours}.layernorm.*"),
        (f"{layer}.attention.self.*", f"{our_layer}.attention.attention.*"),
        (f"{layer}.crossattention.self.*", f"{our_layer}.crossattention.attention.*"),
        (f"{layer}.*", f"{our_layer}.*"),
    )


def _imagebind_rows(modality: str, patch_projection: str) -> tuple[Row, ...]:
    stem = f"audio_encoder.modality_preprocessors.{modality}"
    trunk = f"audio_encoder.modality_trunks.{modality}"
    head = f"audio_encoder.modality_heads.{modality}"
    scale = f"audio_encoder.modality_postprocessors.{modality}.1.log_logit_scale"
    ours = f"audio_branch.{modality}_encoder"
    return (
        (f"{stem}.cls_token", f"{ours}.cls_token"),
        (f"{stem}.rgbt_stem.{patch_projection}.weight", f"{ours}.patch_projection.weight"),
        (f"{stem}.rgbt_stem.norm_layer.*", f"{ours}.patch_norm.*"),
        (f"{stem}.pos_embedding_helper.pos_embed", f"{ours}.position_embedding"),
        (f"{trunk}.pre_transformer_layer.0.*", f"{ours}.pre_norm.*"),
        (f"{trunk}.blocks.#.norm_1.*", f"{ours}.blocks.#.norm1.*"),
        (f"{trunk}.blocks.#.norm_2.*", f"{ours}.blocks.#.norm2.*"),
        (f"{trunk}.blocks.#.attn.in_proj_*", f"{ours}.blocks.#.attention.qkv.*"),
        (f"{trunk}.blocks.#.attn.out_proj.*", f"{ours}.blocks.#.attention.output.*"),
        (f"{trunk}.blocks.#.attn.*", f"{ours}.blocks.#.attention.*"),
        (f"{trunk}.blocks.#.mlp.*", f"{ours}.blocks.#.mlp.*"),
        (f"{head}.0.*", f"{ours}.head_norm.*"),
        (f"{head}.2.weight", f"{ours}.head.weight"),
        (scale, f"{ours}.log_logit_scale"),
    )


VISION_ENCODER = Part(
    name="frame encoder (EVA ViT-g)",
    file="eva_vit_g.pth (vit_ckpt)",
    rows=(("visual_encoder.*", "video_branch.vision_encoder.*"),),
    file_prefix="visual_encoder.",
)
QFORMER = Part(
    name="BLIP-2 Q-Former",
    file="blip2_pretrained_flant5xxl.pth (q_former_model)",
    rows=(
        ("ln_vision.*", "video_branch.vision_norm.*"),
        ("query_tokens", "video_branch.query_tokens"),
        *_qformer_rows("Qformer", "video_branch.qformer"),
    ),
)
VIDEO_BRANCH = Part(
    name="video Q-Former",
    file="VL_*.pth (ckpt)",
    rows=(
        ("video_query_tokens", "video_branch.video_query_tokens"),
        ("video_frame_position_embedding.*", "video_branch.frame_position_embedding.*"),
        *_qformer_rows("video_Qformer", "video_branch.video_qformer"),
    ),
)
PROJECTION = Part(
    name="video projection",
    file="VL_*.pth (ckpt) or the MiniGPT-4 file (llama_proj_model)",
    rows=(("llama_proj.*", "video_branch.projection.*"),),
)
AUDIO_ENCODER = Part(
    name="ImageBind audio encoder",
    file="imagebind_huge.pth (imagebind_ckpt_path)",
    rows=_imagebind_rows("audio", patch_projection="proj"),
    file_prefix="audio_encoder.",
)
IMAGEBIND_VISION = Part(
    name="ImageBind vision encoder",
    file="imagebind_huge.pth (imagebind_ckpt_path)",
    rows=_imagebind_rows("vision", patch_projection="proj.1"),
    file_prefix="audio_encoder.",
)
AUDIO_BRANCH = Part(
    name="audio Q-Former and projection",
    file="AL_*.pth (ckpt_2)",
    rows=(
        ("audio_query_tokens", "audio_branch.audio_query_tokens"),
        ("audio_position_embedding.*", "audio_branch.segment_position_embedding.*"),
        ("audio_llama_proj.*", "audio_branch.projection.*"),
        *_qformer_rows("audio_Qformer", "audio_branch.audio_qformer"),
    ),
)
LANGUAGE_MODEL = Part(
    name="language model",
    file="the language model's folder (llama_model)",
    rows=(("llama_model.*", "language_model.*"),),
    file_prefix="llama_model.",
)

MODEL_PARTS = (
    VISION_ENCODER,
    QFORMER,
    VIDEO_BRANCH,
    PROJECTION,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    AUDIO_BRANCH,
    LANGUAGE_MODEL,
)

# Saved by the original, computed by our model: buffers of the Q-Formers and of LLaMA.
COMPUTED_BUFFERS = ("*.position_ids", "*.rotary_emb.*")

# What the original's files hold beside the weights they are read for.
STRAY_PATTERNS = (
    *COMPUTED_BUFFERS,
    "visual_encoder.blocks.#.*",  # the blocks of EVA ViT-g behind the last one that BLIP-2 uses
    "visual_encoder.norm.*",
    "visual_encoder.fc_norm.*",
    "visual_encoder.head.*",
    "t5_proj.*",
    "Qformer.cls.*",  # the text half of BLIP-2's Q-Former
    "Qformer.bert.embeddings.word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*",
    "Qformer.bert.encoder.layer.#.intermediate.*",
    "Qformer.bert.encoder.layer.#.output.*",
    *(
        f"audio_encoder.modality_{stage}.{modality}.*"
        for modality in ("text", "depth", "thermal", "imu")
        for stage in ("preprocessors", "trunks", "heads", "postprocessors")
    ),
)


def to_our_name(original: str) -> str | None:
    """Our name of an original parameter or buffer; None if it is none of the model's."""
    return None if _fits(original, COMPUTED_BUFFERS) else _translate(original, source=0)


def to_original_name(ours: str) -> str | None:
    """The original's name of one of our parameters or buffers; None if it is none of the model's."""
    return _translate(ours, source=1)


def part_of(our_name: str) -> Part | None:
    """The part one of our names belongs to."""
    for part in MODEL_PARTS:
        if _fits(our_name, (ours for _, ours in part.rows)):
            return part
    return None


def is_stray(original: str) -> bool:
    """Whether the original's files hold this name without need: other modalities, buffers, unused layers."""
    return _fits(original, STRAY_PATTERNS)


def original_to_ours(weights: Mapping[str, T]) -> dict[str, T]:
    """The same values under our names; names that are none of the model's are left out."""
    renamed = ((to_our_name(name), value) for name, value in weights.items())
    return {name: value for name, value in renamed if name is not None}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(_regex(pattern).fullmatch(name) for pattern in patterns)


def _translate(name: str, source: int) -> str | None:
    for part in MODEL_PARTS:
        for row in part.rows:
            match = _regex(row[source]).fullmatch(name)
            if match is not None:
                return re.sub(r"[#*]", "{}", row[1 - source]).format(*match.groups())
    return None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))
