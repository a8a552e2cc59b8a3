"""The activation of the frozen encoders: the values and gradients of GELU, in the memory of its input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from video_llama.model.configuration import ImageBindTrunkConfig, VideoLlamaVisionConfig
from video_llama.model.eva_vit import build_eva_vit
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.model.layers import InplaceGELU

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_nobody_needs_again_is_overwritten_with_the_exact_values(dtype: torch.dtype) -> None:
    states = torch.randn(3, 5, dtype=dtype)
    expected = F.gelu(states)
    result = InplaceGELU()(states)
    assert torch.equal(result, expected)
    assert result.data_ptr() == states.data_ptr()


def test_what_autograd_needs_is_kept() -> None:
    states = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    before = states.detach().clone()
    assert torch.autograd.gradcheck(InplaceGELU(), (states,))
    assert torch.equal(states.detach(), before)


def encoders() -> list[tuple[nn.Module, torch.Tensor]]:
    """A frame encoder and a trunk for sound with random weights, and what they take."""
    torch.manual_seed(0)
    vision, audio = VideoLlamaVisionConfig(image_size=28, **SMALL), ImageBindTrunkConfig(output_size=8, **SMALL)
    sides = [(build_eva_vit(vision), (2, 3, 28, 28)), (ImageBindTrunk(audio), (2, 1, *audio.input_size))]
    for encoder, _ in sides:
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.1)
    return [(encoder.eval(), torch.randn(shape)) for encoder, shape in sides]


@pytest.mark.parametrize("number", [0, 1], ids=["frames", "sound"])
def test_encoders_give_the_same_with_and_without_gradients(number: int) -> None:
    encoder, values = encoders()[number]
    assert sum(isinstance(module, InplaceGELU) for module in encoder.modules()) == 2
    given = values.clone()
    with torch.inference_mode():
        frugal = encoder(values)
    assert torch.equal(values, given)
    trained = encoder(values.requires_grad_())
    assert torch.equal(frugal, trained)
    trained.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters() if parameter.grad is not None)
    assert values.grad is not None
    assert values.grad.norm() > 0
