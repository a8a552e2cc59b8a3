"""Half precision of the branches: what stays in float32, however the model came to be in it, and how near it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import assert_equal_tensors, load_checkpoint
from tests.helpers.tiny_model import frames, sound
from video_llama.inference.engine import VideoLlama
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

HALVES = [torch.float16, torch.bfloat16]


def in_float32(model: VideoLlama) -> set[str]:
    return {name for name, tensor in model.model.state_dict().items() if tensor.dtype == torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_loading_converting_and_saving_in_half_precision_agree(
    checkpoints: dict[str, Path], layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    loaded, converted = load_checkpoint(checkpoints[layout], dtype=dtype), load_checkpoint(checkpoints[layout])
    converted.model.to(dtype)
    assert_equal_tensors(loaded.model.state_dict(), converted.model.state_dict())
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    assert_equal_tensors(load_checkpoint(tmp_path, dtype=dtype).model.state_dict(), loaded.model.state_dict())


def test_float16_leaves_the_q_formers_and_the_logit_scale_alone(checkpoints: dict[str, Path]) -> None:
    model = load_checkpoint(checkpoints["hf"])
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    kept = {name for name in before if "qformer." in name or name.endswith("log_logit_scale")}
    assert len({name.split("qformer.")[0] for name in kept if "qformer." in name}) == 3
    model.model.half()
    assert in_float32(model) == kept
    assert all(torch.equal(model.model.state_dict()[name], before[name]) for name in kept)
    assert in_float32(load_checkpoint(checkpoints["hf"], dtype="float16")) == kept


@pytest.mark.parametrize("dtype", HALVES)
def test_the_logit_scale_of_sound_is_never_rounded(
    tiny_model: VideoLlamaForConditionalGeneration, dtype: torch.dtype
) -> None:
    scale = tiny_model.to(dtype).audio_branch.audio_encoder.log_logit_scale
    torch.testing.assert_close(scale.exp(), torch.tensor(20.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_features_in_half_precision_are_near_those_in_float32(
    tiny_model: VideoLlamaForConditionalGeneration, dtype: torch.dtype, tolerance: float
) -> None:
    def features() -> list[torch.Tensor]:
        with torch.no_grad():
            return [tiny_model.get_video_features(frames(2, 3)), tiny_model.get_audio_features(sound(2, 3))]

    expected = features()
    tiny_model.to(dtype)
    for found, exact in zip(features(), expected, strict=True):
        assert found.dtype == dtype
        assert (found.float() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("case", ["frozen", "trains", "mixed", "float32"])
def test_a_frozen_language_model_in_half_precision_runs_without_autocast(
    tiny_model: VideoLlamaForConditionalGeneration, case: str
) -> None:
    model, language_model = tiny_model, tiny_model.language_model.requires_grad_(False)
    if case != "float32":
        language_model.bfloat16()
    if case == "trains":
        language_model.get_output_embeddings().requires_grad_(True)
    if case == "mixed":  # as models do that keep their norms in float32
        language_model.model.norm.float()
    on: list[bool] = []
    language_model.model.layers[0].register_forward_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    ids = torch.tensor([[1, 5, 7, 9, 11, 2]])
    embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses, gradients = [], []
    for answers_only in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs_embeds=embeds, labels=ids, answers_only=answers_only, use_cache=False).loss
            assert torch.is_autocast_enabled("cpu")
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, embeds)[0])
    assert on == [case != "frozen"] * 2
    assert loss.dtype == torch.float32
    language_model.float()
    exact = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    assert losses == pytest.approx([exact.item()] * 2, rel=2e-2)
    (gradient,) = torch.autograd.grad(exact, embeds)
    for found in gradients:
        assert (found - gradient).norm() < 5e-2 * gradient.norm()
