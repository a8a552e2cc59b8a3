"""EVA ViT, both Q-Former forms and both ImageBind trunks against the recorded original, one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.helpers.checkpoints import original_to_ours
from tests.parity.reference_model import imagebind_config, load_inputs, vision_config
from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaVisionConfig
from video_llama.model.eva_vit import build_eva_vit, interpolate_position_table
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.model.qformer import run_qformer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def part(weights: dict[str, Tensor], ours: str) -> dict[str, Tensor]:
    """The parameters below one module, relative to it."""
    return {name.removeprefix(ours): tensor for name, tensor in weights.items() if name.startswith(ours)}


def below(weights: dict[str, Tensor], prefix: str, new_prefix: str = "") -> dict[str, Tensor]:
    return {new_prefix + k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def test_eva_vit_gives_the_recorded_tokens_after_every_block(
    reference: Path, reference_json: Callable[[str], Any]
) -> None:
    tensors = load_file(reference / "eva_vit.safetensors")
    weights = below(tensors, "sd.", "visual_encoder.")
    config = vision_config(reference_json("eva_vit.json")["config"], weights, "visual_encoder.")
    encoder = build_eva_vit(VideoLlamaVisionConfig(**config)).eval()
    encoder.load_state_dict(part(original_to_ours(weights), "video_branch.vision_encoder."))
    after_block: list[Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: after_block.append(output))
    with torch.no_grad():
        tokens = encoder(tensors["in.image"])
    for number, states in enumerate(after_block):
        torch.testing.assert_close(states, tensors[f"out.block{number}"], **TOLERANCE)
    torch.testing.assert_close(tokens, tensors["out.forward"], **TOLERANCE)
    assert len(after_block) == config["num_hidden_layers"]


def test_the_position_table_is_interpolated_as_recorded(reference: Path, reference_json: Callable[[str], Any]) -> None:
    tensors, cases = load_file(reference / "eva_vit.safetensors"), reference_json("eva_vit.json")["interp"]
    assert cases
    for old, new in cases:
        expected = tensors[f"pos.{old}to{new}.out"]
        table = interpolate_position_table(tensors[f"pos.{old}to{new}.in"], expected.shape[1] - 1)
        torch.testing.assert_close(table, expected, **TOLERANCE)


@pytest.mark.parametrize("form", ["", "video_"])
def test_both_qformer_forms_give_the_recorded_queries(
    reference: Path, reference_json: Callable[[str], Any], form: str
) -> None:
    tensors, config = load_file(reference / "qformer.safetensors"), reference_json("qformer.json")["config"]
    sizes = config["video"] if form else config
    qformer_config = Blip2QFormerConfig(
        **{**config["bert"], **{k: v for k, v in sizes.items() if k == "num_hidden_layers"}},
        encoder_hidden_size=sizes["encoder_width"],
        cross_attention_frequency=sizes["cross_attention_freq"],
        layer_norm_eps=config["layer_norm_eps"],
    )
    qformer = Blip2QFormerModel(qformer_config).eval()
    original = "video_Qformer." if form else "Qformer."
    weights = original_to_ours(below(tensors, f"{form}qformer.", original))
    qformer.load_state_dict(part(weights, f"video_branch.{form}qformer."))
    states = tensors[f"in.{form}encoder_hidden_states"]
    with torch.no_grad():
        answer = run_qformer(qformer, tensors[f"{form}query_tokens"], states)
        torch.testing.assert_close(answer, tensors[f"out.{form}last_hidden_state"], **TOLERANCE)
        padded = f"out.{form}last_hidden_state_padded"
        if padded in tensors:
            mask = tensors["in.encoder_attention_mask_padded"]
            answer = run_qformer(qformer, tensors[f"{form}query_tokens"], states, mask.bool())
            torch.testing.assert_close(answer, tensors[padded], **TOLERANCE)


@pytest.mark.parametrize("modality", ["audio", "vision"])
def test_an_imagebind_trunk_gives_the_recorded_states_and_vectors(
    reference: Path, reference_json: Callable[[str], Any], modality: str
) -> None:
    tensors = load_inputs(reference / "imagebind.safetensors")
    weights = below(tensors, "sd.", "audio_encoder.")
    config, input_size = reference_json("imagebind.json")["config"], tensors[f"in.{modality}"].shape[-2:]
    sizes = imagebind_config(config, modality, weights, "audio_encoder.", input_size)
    trunk = ImageBindTrunk(ImageBindTrunkConfig(**sizes)).eval()
    trunk.load_state_dict(part(original_to_ours(weights), f"audio_branch.{modality}_encoder."))
    with torch.no_grad():
        state = trunk.encode(tensors[f"in.{modality}"])
        vector = trunk.project(state)
        torch.testing.assert_close(state, tensors[f"out.{modality}_feature"], **TOLERANCE)
        torch.testing.assert_close(vector, tensors[f"out.{modality}_final"], **TOLERANCE)
        torch.testing.assert_close(vector.mean(dim=1), tensors[f"out.forward_{modality}_mean"], **TOLERANCE)
        if modality == "vision":  # a batch of single pictures, without a segment axis
            torch.testing.assert_close(trunk(tensors["in.vision"][:, 0]), tensors["out.vision4d_final"], **TOLERANCE)
