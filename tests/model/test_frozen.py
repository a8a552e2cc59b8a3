"""Which modules train and which evaluate, and what it costs to say so."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from video_llama.model import frozen
from video_llama.model.frozen import requires_gradients
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

Model = VideoLlamaForConditionalGeneration


def modes_by_definition(model: Model) -> dict[str, bool]:
    """The mode of every module, each looked at by itself."""
    frozen = {
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    }
    modes = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        is_frozen = any(".".join(parts[:length]) in frozen for length in range(len(parts) + 1))
        recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        modes[name] = recomputes or not is_frozen
    return modes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "trained",
    [
        ["video_branch.video_qformer"],
        ["video_branch.projection"],
        ["audio_branch.audio_qformer", "audio_branch.projection"],
        ["video_branch.vision_encoder.blocks.1.mlp"],
        ["language_model.model.layers.1"],
        [""],
        [],
    ],
)
def test_each_module_has_the_mode_of_the_definition(tiny_model: Model, trained: list[str], checkpointing: bool) -> None:
    if checkpointing:
        tiny_model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny_model.requires_grad_(False)
    for name in trained:
        tiny_model.get_submodule(name).requires_grad_(True)
    expected = modes_by_definition(tiny_model)
    for before in (False, True):
        for module in tiny_model.modules():
            module.training = before
        tiny_model.train()
        assert {name: module.training for name, module in tiny_model.named_modules()} == expected
    assert not any(module.training for module in tiny_model.eval().modules())


def test_each_module_is_visited_once(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    visits: Counter[int] = Counter()
    survey = frozen._survey

    def count(module: nn.Module, *arguments: object) -> object:
        visits[id(module)] += 1
        return survey(module, *arguments)

    monkeypatch.setattr(frozen, "_survey", count)
    tiny_model.train()
    assert visits == Counter(id(module) for module in tiny_model.modules())


def test_a_module_of_which_anything_trains_requires_gradients(tiny_model: Model) -> None:
    tiny_model.requires_grad_(False)
    assert not requires_gradients(tiny_model)
    tiny_model.video_branch.projection.bias.requires_grad_(True)
    assert requires_gradients(tiny_model)
    assert not requires_gradients(tiny_model.language_model)
