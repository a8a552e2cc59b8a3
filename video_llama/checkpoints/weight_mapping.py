"""Map the parameter names of the published files to ours and back, by part of the model.

A part is what one published file must hold. `MODEL_PARTS` lists rows of (original pattern, our pattern): `#` stands
for a layer number and `*` for the rest of a name. The first row that fits a name counts, in either direction.
Original names are those of the whole original model; `eva_vit_g.pth` and `imagebind_huge.pth` leave the name of
their module out (`Part.file_prefix`). Ours are the names in saved folders; those that the model has in memory
(`model/weight_names.py`) serve as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from video_llama.model.weight_names import to_saved_name

__all__ = [
    "AUDIO_BRANCH",
    "AUDIO_ENCODER",
    "IMAGEBIND_VISION",
    "LANGUAGE_MODEL",
    "MODEL_PARTS",
    "PROJECTION",
    "QFORMER",
    "TRAINABLE_PARTS",
    "VIDEO_BRANCH",
    "VISION_ENCODER",
    "Part",
    "is_stray",
    "part_of",
    "to_original_name",
    "to_our_name",
]

Row = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Part:
    """Describe the weights that belong in one file.

    Args:
        name: of the part, in error messages.
        file: the published file, and the YAML key that names it.
        rows: (original pattern, our pattern).
        file_prefix: what the file leaves out in front of the original names.
    """

    name: str
    file: str
    rows: tuple[Row, ...]
    file_prefix: str = ""


def _qformer_rows(original: str, ours: str) -> tuple[Row, ...]:
    # The first row that fits counts, so the general row for a layer must be the last.
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
        # `in_proj_weight` has no dot before its last word. These two rows must come before the general row `attn.*`.
        (f"{trunk}.blocks.#.attn.in_proj_*", f"{ours}.blocks.#.attention.qkv.*"),
        (f"{trunk}.blocks.#.attn.out_proj.*", f"{ours}.blocks.#.attention.output.*"),
        (f"{trunk}.blocks.#.attn.*", f"{ours}.blocks.#.attention.*"),
        (f"{trunk}.blocks.#.mlp.*", f"{ours}.blocks.#.mlp.*"),
        (f"{head}.0.*", f"{ours}.head_norm.*"),
        (f"{head}.2.weight", f"{ours}.head.weight"),
        (scale, f"{ours}.log_logit_scale"),
    )


# What is downloaded once, and never trained here.
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
# What the published checkpoints of the video branch hold.
VIDEO_BRANCH = Part(
    name="video Q-Former",
    file="VL_*.pth (ckpt)",
    rows=(
        ("video_query_tokens", "video_branch.video_query_tokens"),
        ("video_frame_position_embedding.*", "video_branch.frame_position_embedding.*"),
        # Other connectors than the original's have no other name.
        ("video_branch.connector.*", "video_branch.connector.*"),
        *_qformer_rows("video_Qformer", "video_branch.video_qformer"),
    ),
)
PROJECTION = Part(
    name="video projection",
    file="VL_*.pth (ckpt) or the MiniGPT-4 file (llama_proj_model)",
    rows=(("llama_proj.*", "video_branch.projection.*"),),
)
# ImageBind; its vision encoder only serves to train the audio branch on images.
AUDIO_ENCODER = Part(
    name="ImageBind audio encoder",
    file="imagebind_huge.pth (imagebind_ckpt_path)",
    # Other encoders have no other names.
    rows=(
        *_imagebind_rows("audio", patch_projection="proj"),
        ("audio_branch.audio_encoder.*", "audio_branch.audio_encoder.*"),
    ),
    file_prefix="audio_encoder.",
)
IMAGEBIND_VISION = Part(
    name="ImageBind vision encoder",
    file="imagebind_huge.pth (imagebind_ckpt_path)",
    rows=_imagebind_rows("vision", patch_projection="proj.1"),
    file_prefix="audio_encoder.",
)
# What the published checkpoints of the audio branch hold.
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

_VIDEO_PARTS = (VISION_ENCODER, QFORMER, VIDEO_BRANCH, PROJECTION)
_AUDIO_PARTS = (AUDIO_ENCODER, IMAGEBIND_VISION, AUDIO_BRANCH)
MODEL_PARTS = (*_VIDEO_PARTS, *_AUDIO_PARTS, LANGUAGE_MODEL)
TRAINABLE_PARTS = (VIDEO_BRANCH, PROJECTION, AUDIO_BRANCH)

# Buffers of the Q-Formers and of LLaMA: the original saves them, our model computes them.
COMPUTED_BUFFERS = ("*.position_ids", "*.rotary_emb.*")

# What the original's files hold beside the weights they are read for.
STRAY_PATTERNS = (
    *COMPUTED_BUFFERS,
    # The blocks of EVA ViT-g behind the last one that BLIP-2 uses.
    "visual_encoder.blocks.#.*",
    "visual_encoder.norm.*",
    "visual_encoder.fc_norm.*",
    "visual_encoder.head.*",
    "t5_proj.*",
    # The text half of BLIP-2's Q-Former.
    "Qformer.cls.*",
    "Qformer.bert.embeddings.word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*",
    "Qformer.bert.encoder.layer.#.intermediate.*",
    "Qformer.bert.encoder.layer.#.output.*",
    # The other modalities of ImageBind.
    *(
        f"audio_encoder.modality_{stage}.{modality}.*"
        for modality in ("text", "depth", "thermal", "imu")
        for stage in ("preprocessors", "trunks", "heads", "postprocessors")
    ),
)

# Columns of a row.
_ORIGINAL, _OURS = 0, 1


def to_our_name(original: str) -> str | None:
    """Return our name of an original parameter or buffer; None if it is none of the model's."""
    if _any_of(COMPUTED_BUFFERS).fullmatch(original):
        return None
    found = _resolve(original, _ORIGINAL)
    return found and found[1]


def to_original_name(ours: str) -> str | None:
    """Return the original's name of one of our parameters or buffers; None if it is none of the model's."""
    found = _resolve(ours, _OURS)
    return found and found[1]


def part_of(our_name: str) -> Part | None:
    """Return the part that one of our names belongs to."""
    found = _resolve(our_name, _OURS)
    return found and found[0]


def is_stray(original: str) -> bool:
    """Return whether the original's files hold this name without need: other modalities, buffers, unused layers."""
    return _any_of(STRAY_PATTERNS).fullmatch(original) is not None


@cache
def _resolve(name: str, column: int) -> tuple[Part, str] | None:
    """Return the part of a name and the name in the other column."""
    if column == _OURS:
        name = to_saved_name(name)
    for pattern, part, other_name in _compiled(column):
        match = pattern.fullmatch(name)
        if match is not None:
            # Put the layer number and the rest of the name into the other column, in the same order.
            return part, other_name.format(*match.groups())
    return None


@cache
def _compiled(column: int) -> list[tuple[re.Pattern[str], Part, str]]:
    """Return the rows of all parts in order: what matches a name of this column, and the format of the other."""
    rows = [(row, part) for part in MODEL_PARTS for row in part.rows]
    # `#` and `*` become groups in the pattern of one column and `{}` in the text of the other.
    return [(re.compile(_expression(row[column])), part, re.sub(r"[#*]", "{}", row[1 - column])) for row, part in rows]


@cache
def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(_expression, patterns)))


def _expression(pattern: str) -> str:
    # `re.escape` puts a backslash before `#` and `*` as well, so replace the escaped forms.
    return re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
