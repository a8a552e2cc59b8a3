"""The name table on its own: rows of every kind, parts, strays. (`tests/parity` holds it against the record.)"""

from __future__ import annotations

import pytest

from tests.helpers.checkpoints import original_to_ours, saved_weights
from tests.helpers.tiny_model import make_tiny_config
from video_llama.checkpoints import weight_mapping as checkpoint
from video_llama.checkpoints.weight_mapping import (
    MODEL_PARTS,
    is_stray,
    part_of,
    to_original_name,
    to_our_name,
)
from video_llama.model.configuration import ImageBindTrunkConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

SMALL_VISION_TRUNK = ImageBindTrunkConfig(
    modality="vision",
    input_size=(28, 28),
    patch_size=14,
    stride=14,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    output_size=24,
)

ROWS = [
    ("visual_encoder.blocks.38.attn.q_bias", "video_branch.vision_encoder.blocks.38.attn.q_bias", "VISION_ENCODER"),
    ("ln_vision.bias", "video_branch.vision_norm.bias", "QFORMER"),
    ("query_tokens", "video_branch.query_tokens", "QFORMER"),
    (
        "Qformer.bert.encoder.layer.10.crossattention.self.key.weight",
        "video_branch.qformer.encoder.layer.10.crossattention.attention.key.weight",
        "QFORMER",
    ),
    ("Qformer.bert.embeddings.LayerNorm.weight", "video_branch.qformer.layernorm.weight", "QFORMER"),
    ("video_query_tokens", "video_branch.video_query_tokens", "VIDEO_BRANCH"),
    ("video_frame_position_embedding.weight", "video_branch.frame_position_embedding.weight", "VIDEO_BRANCH"),
    (
        "video_Qformer.bert.encoder.layer.1.attention.self.query.bias",
        "video_branch.video_qformer.encoder.layer.1.attention.attention.query.bias",
        "VIDEO_BRANCH",
    ),
    (
        "video_Qformer.bert.encoder.layer.0.output_query.dense.weight",
        "video_branch.video_qformer.encoder.layer.0.output_query.dense.weight",
        "VIDEO_BRANCH",
    ),
    ("llama_proj.weight", "video_branch.projection.weight", "PROJECTION"),
    (
        "audio_encoder.modality_trunks.audio.blocks.11.attn.in_proj_weight",
        "audio_branch.audio_encoder.blocks.11.attention.qkv.weight",
        "AUDIO_ENCODER",
    ),
    (
        "audio_encoder.modality_postprocessors.audio.1.log_logit_scale",
        "audio_branch.audio_encoder.log_logit_scale",
        "AUDIO_ENCODER",
    ),
    (
        "audio_encoder.modality_preprocessors.vision.rgbt_stem.proj.1.weight",
        "audio_branch.vision_encoder.patch_projection.weight",
        "IMAGEBIND_VISION",
    ),
    ("audio_position_embedding.weight", "audio_branch.segment_position_embedding.weight", "AUDIO_BRANCH"),
    ("audio_llama_proj.bias", "audio_branch.projection.bias", "AUDIO_BRANCH"),
    ("llama_model.lm_head.weight", "language_model.lm_head.weight", "LANGUAGE_MODEL"),
]


@pytest.mark.parametrize(("original", "ours", "part"), ROWS)
def test_a_name_is_translated_both_ways_and_belongs_to_its_part(original: str, ours: str, part: str) -> None:
    assert to_our_name(original) == ours
    assert to_original_name(ours) == original
    assert part_of(ours) is getattr(checkpoint, part)


def test_every_weight_of_a_model_has_one_original_name_and_one_part() -> None:
    model = VideoLlamaForConditionalGeneration(make_tiny_config(imagebind_vision_config=SMALL_VISION_TRUNK))
    ours = list(saved_weights(model))
    originals = [to_original_name(name) or "" for name in ours]
    assert len(set(originals)) == len(ours)
    assert [to_our_name(name) for name in originals] == ours
    assert {part_of(name) for name in ours} == set(MODEL_PARTS)
    assert [part_of(name) for name in model.state_dict()] == [part_of(name) for name in ours]
    for name, original in zip(ours, originals, strict=True):
        part = part_of(name)
        assert part is not None
        assert original.startswith(part.file_prefix)


@pytest.mark.parametrize(
    "name",
    [
        "Qformer.bert.embeddings.position_ids",
        "llama_model.model.layers.3.self_attn.rotary_emb.inv_freq",
        "visual_encoder.blocks.39.norm1.weight",
        "visual_encoder.norm.weight",
        "visual_encoder.head.bias",
        "t5_proj.weight",
        "Qformer.cls.predictions.bias",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.bert.encoder.layer.3.intermediate.dense.weight",
        "Qformer.bert.encoder.layer.3.output.LayerNorm.bias",
        "audio_encoder.modality_trunks.text.blocks.0.norm_1.weight",
        "audio_encoder.modality_preprocessors.text.mask",
        "audio_encoder.modality_postprocessors.imu.1.log_logit_scale",
    ],
)
def test_what_the_files_hold_without_need_is_stray(name: str) -> None:
    assert is_stray(name)


@pytest.mark.parametrize("name", [*(row[0] for row in ROWS[1:]), "optimizer", "model.layers.0.mlp.up_proj.weight"])
def test_weights_and_strangers_are_not_stray(name: str) -> None:
    assert not is_stray(name)


@pytest.mark.parametrize("name", ["classifier.weight", "query_tokens_2", "video_Qformer", "xllama_proj.weight"])
def test_a_strange_name_has_no_translation_and_no_part(name: str) -> None:
    assert to_our_name(name) is None
    assert to_original_name(name) is None
    assert part_of(name) is None


def test_computed_buffers_have_no_name_of_ours() -> None:
    assert to_our_name("video_Qformer.bert.embeddings.position_ids") is None
    assert to_our_name("llama_model.model.rotary_emb.inv_freq") is None


def test_a_mapping_is_renamed_with_its_values_and_without_strangers() -> None:
    weights = {"llama_proj.bias": 1, "Qformer.bert.embeddings.position_ids": 2, "other": 3, "query_tokens": 4}
    assert original_to_ours(weights) == {"video_branch.projection.bias": 1, "video_branch.query_tokens": 4}
