"""Matching names and shapes: what is found, and one sentence for everything that is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoints import HeldWeights
from video_llama.checkpoints.report import LoadReport, Source, match_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    LANGUAGE_MODEL,
    PROJECTION,
    VIDEO_BRANCH,
    VISION_ENCODER,
    to_our_name,
)
from video_llama.errors import CheckpointError

LAYER = "video_Qformer.bert.encoder.layer"
HELD = {
    "video_query_tokens": (1, 4, 8),
    "video_frame_position_embedding.weight": (32, 8),
    f"{LAYER}.0.output_query.dense.weight": (8, 16),
    f"{LAYER}.1.output_query.dense.weight": (8, 16),
    "llama_proj.weight": (4096, 8),
    "llama_proj.bias": (4096,),
}
Shapes = Mapping[str, tuple[int, ...]]


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def file(name: str, shapes: Shapes, prefix: str = "") -> Source:
    return Source(HeldWeights(name, tensors(shapes)), prefix)


def model(shapes: Shapes) -> dict[str, Tensor]:
    """What a model of these original names expects."""
    return {to_our_name(name) or name: tensor for name, tensor in tensors(shapes).items()}


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


def only_problem(report: LoadReport) -> str:
    [problem] = report.problems()
    return problem


def test_a_fitting_file_is_found_whole() -> None:
    report = match_weights(model(HELD), [file("VL.pth", HELD)], [VIDEO_BRANCH, PROJECTION])
    assert report.problems() == []
    assert {ours: found.name for ours, found in report.found.items()} == {to_our_name(name): name for name in HELD}
    assert all(
        found.file == Path("VL.pth") and tuple(found.header.shape) == HELD[found.name]
        for found in report.found.values()
    )
    assert report.summary() == "weights loaded: video Q-Former 4, video projection 2"
    report.raise_for_problems()  # nothing to raise


def test_names_of_ours_are_found_too() -> None:
    held = HeldWeights("model.safetensors", model(HELD))
    report = match_weights(model(HELD), [Source(held)], [VIDEO_BRANCH])
    assert report.problems() == []
    assert {ours: found.name for ours, found in report.found.items()} == {name: name for name in held}


def test_of_two_files_the_later_counts() -> None:
    sources = [file("minigpt4.pth", {"llama_proj.bias": (4096,)}), file("VL.pth", HELD)]
    found = match_weights(model(HELD), sources).found
    assert found["video_branch.projection.bias"].file == Path("VL.pth")
    found = match_weights(model(HELD), sources[::-1]).found
    assert found["video_branch.projection.bias"].file == Path("minigpt4.pth")
    assert found["video_branch.projection.weight"].file == Path("VL.pth")


def test_missing_names_are_listed_as_the_file_of_their_part_has_them() -> None:
    layers = {f"visual_encoder.blocks.{layer}.norm1.bias": (8,) for layer in range(6)}
    held = {"blocks.0.norm1.bias": (8,)}
    report = match_weights(model(layers), [file("eva.pth", held, "visual_encoder.")], [VISION_ENCODER])
    assert only_problem(report) == (
        "frame encoder (EVA ViT-g): 5 of 6 weights are missing (blocks.1.norm1.bias, blocks.2.norm1.bias, "
        "blocks.3.norm1.bias and 2 more); they belong in eva_vit_g.pth (vit_ckpt)"
    )


def test_a_part_may_be_absent_unless_it_is_required() -> None:
    source = file("x.pth", {"llama_proj.weight": (4096, 8), "llama_proj.bias": (4096,)})
    report = match_weights(model(HELD), [source])
    assert report.problems() == []
    assert report.parts[VIDEO_BRANCH].missing == []
    required = match_weights(model(HELD), [source], [VIDEO_BRANCH])
    assert "video Q-Former: 4 of 4 weights are missing" in only_problem(required)


def test_a_part_is_never_taken_in_parts() -> None:
    source = file("x.pth", without(HELD, "video_query_tokens"))
    assert "1 of 4 weights are missing (video_query_tokens)" in only_problem(match_weights(model(HELD), [source]))


def test_weights_of_layers_that_the_model_lacks_are_unexpected() -> None:
    shallow = without(HELD, f"{LAYER}.1.output_query.dense.weight")
    problem = only_problem(match_weights(model(shallow), [file("VL.pth", HELD)]))
    assert problem.startswith("video Q-Former: VL.pth has 1 weights that the model does not have")
    assert f"({LAYER}.1.output_query.dense.weight)" in problem


def test_a_wrong_shape_is_told_with_both_shapes() -> None:
    report = match_weights(model({**HELD, "video_query_tokens": (1, 32, 8)}), [file("VL.pth", HELD)])
    assert only_problem(report) == (
        "video Q-Former: 1 weights in VL.pth have another shape than the model (video_query_tokens): "
        "the first is (1, 4, 8), should be (1, 32, 8)"
    )
    assert "video_branch.video_query_tokens" not in report.found


def test_a_projection_for_7b_on_a_13b_language_model_is_told_in_these_words() -> None:
    wide = {**HELD, "llama_proj.weight": (5120, 8), "llama_proj.bias": (5120,)}
    assert only_problem(match_weights(model(wide), [file("VL_7B.pth", HELD)])) == (
        "VL_7B.pth was trained for a language model of width 4096 (LLaMA-7B), but the one given here has "
        "width 5120 (LLaMA-13B); take the file and the language model of the same size"
    )


def test_the_audio_projection_of_another_language_model_is_told_too() -> None:
    held = {"audio_llama_proj.weight": (5120, 8)}
    report = match_weights(model({"audio_llama_proj.weight": (4096, 8)}), [file("AL_13B.pth", held)], [AUDIO_BRANCH])
    assert "AL_13B.pth was trained for a language model of width 5120 (LLaMA-13B)" in only_problem(report)


@pytest.mark.parametrize(("stored", "configured"), [(32001, 32000), (32000, 32001)])
def test_vicunas_vocabulary_of_32001_tokens_has_its_own_sentence(stored: int, configured: int) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    expected = model({f"llama_model.{name}": (configured, 8) for name in names})
    source = file("vicuna", dict.fromkeys(names, (stored, 8)), "llama_model.")
    assert only_problem(match_weights(expected, [source], [LANGUAGE_MODEL])) == (
        f"language model: vicuna has a vocabulary of {stored} tokens, its config.json says {configured} (Vicuna's "
        "first release has one token more than LLaMA's 32000); take weights, config.json and tokenizer of the same "
        "release"
    )


def test_another_vocabulary_is_told_without_blaming_vicuna() -> None:
    expected = model({"llama_model.lm_head.weight": (64000, 8)})
    problem = only_problem(match_weights(expected, [file("yi", {"lm_head.weight": (63000, 8)}, "llama_model.")]))
    assert "has a vocabulary of 63000 tokens, its config.json says 64000; take" in problem


def test_a_position_table_of_another_picture_size_fits() -> None:
    name = "visual_encoder.pos_embed"
    source = file("eva.pth", {"pos_embed": (1, 257, 8)}, "visual_encoder.")
    assert match_weights(model({name: (1, 677, 8)}), [source], [VISION_ENCODER]).problems() == []
    assert match_weights(model({name: (1, 677, 9)}), [source], [VISION_ENCODER]).problems() != []


def test_strays_are_silent_and_strangers_only_noted() -> None:
    strays = {"Qformer.bert.embeddings.position_ids": (1, 512), "llama_model.model.rotary_emb.inv_freq": (4,)}
    report = match_weights(model(HELD), [file("VL.pth", {**HELD, **strays, "ema.decay": (), "ema.step": ()})])
    assert report.problems() == []
    assert report.unknown == {Path("VL.pth"): ["ema.decay", "ema.step"]}
    assert report.summary().endswith("; 2 unknown names in VL.pth (ema.decay, ema.step)")


def test_a_file_for_another_model_is_called_useless_once() -> None:
    source = file("AL.pth", {"audio_query_tokens": (1, 8, 8)})
    problem = only_problem(match_weights(model(HELD), [source], [VIDEO_BRANCH]))
    assert problem == (
        "AL.pth has only weights of the audio Q-Former and projection, which this model is built without; "
        "give another file"
    )


def test_a_file_of_strangers_is_called_useless() -> None:
    source = file("resnet.pth", {"conv1.weight": (8, 3, 7, 7)})
    assert only_problem(match_weights(model(HELD), [source])) == "resnet.pth has none of the model's weights"


def test_all_problems_are_raised_at_once() -> None:
    held = {**without(HELD, "video_query_tokens"), "llama_proj.weight": (5120, 8)}
    report = match_weights(model(HELD), [file("VL.pth", held)], [VIDEO_BRANCH])
    with pytest.raises(CheckpointError) as caught:
        report.raise_for_problems()
    message = str(caught.value)
    assert message.startswith("the checkpoint cannot be loaded: ")
    assert message.count("; ") >= 2
    assert "video_query_tokens" in message
    assert "width 5120" in message


def test_a_parameter_that_no_row_names_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="language_mode is not in the name table"):
        match_weights({"language_mode": torch.empty(1)}, [])
