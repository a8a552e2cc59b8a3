"""The estimate of training memory against what a small model's training really keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.helpers.tiny_model import make_tiny_config
from video_llama.checkpoints.adapters import add_lora
from video_llama.config import LoraConfig
from video_llama.model.parts import enable_checkpointing, freeze_for_training
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.memory import (
    TrainingSample,
    _qformer_saved_values,
    estimate_training_memory,
    language_model_saved_bytes,
)
from video_llama.training.optim import build_optimizer

VIDEO = ("video_qformer", "video_projection")


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that the backward pass will need, besides the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is given twice
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_what_a_frozen_llama_keeps_is_what_the_formula_counts(dtype: torch.dtype, key_heads: int) -> None:
    text = make_tiny_config().text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 160, 3
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, key_heads, 16
    model = AutoModelForCausalLM.from_config(text).to(dtype).requires_grad_(False)
    embeds = torch.randn(1, 96, 64, dtype=dtype, requires_grad=True)
    kept = saved_bytes(lambda: model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state, model)
    assert kept == pytest.approx(language_model_saved_bytes(text, 96, dtype.itemsize), rel=0.12)


def test_what_a_qformer_keeps_is_about_what_the_formula_counts() -> None:
    qformer = VideoLlamaForConditionalGeneration(
        make_tiny_config(qformer_config=SMALL, video_qformer_config=SMALL)
    ).video_branch.video_qformer.eval()
    queries, states = torch.randn(1, 32, 96, requires_grad=True), torch.randn(1, 256, 96)
    kept = saved_bytes(lambda: qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state, qformer)
    assert kept == pytest.approx(4 * _qformer_saved_values(qformer.config, 256, 32), rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_adapters_on_a_llama_need_is_what_the_estimate_adds(dtype: torch.dtype, checkpointing: bool) -> None:
    pytest.importorskip("peft")
    config = make_tiny_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 64, 160, 6, 96
    model = VideoLlamaForConditionalGeneration(config).to(dtype)
    lora, adapted = LoraConfig(target=["language_model"], r=2), {"language_model"}
    add_lora(model, lora, adapted)
    freeze_for_training(model, ())
    if checkpointing:
        enable_checkpointing(model)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeds = torch.randn(1, 96, 64, dtype=dtype, requires_grad=True)
    layers = model.train().model.language_model

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            states: Tensor = layers(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return states

    kept = saved_bytes(run, model)
    sample = TrainingSample(96, 0)  # without answers there are no logits
    options: dict[str, Any] = {"batch_size": 1, "bytes_per_value": dtype.itemsize, "lora": lora, "adapted": adapted}
    plain = estimate_training_memory(config, (), sample, **options)
    assert plain.trained == plain.gradients == sum(parameter.nbytes for parameter in adapters)
    frozen = sum(value.nbytes for value in model.parameters() if not value.requires_grad)
    assert plain.frozen == pytest.approx(frozen, rel=1e-2)
    if checkpointing:
        # One layer at a time is computed again, beside what is kept of the whole pass.
        estimate = estimate_training_memory(config, (), sample, checkpointing=True, **options)
        assert estimate.activations == pytest.approx(kept + plain.activations / text.num_hidden_layers, rel=0.12)
    else:
        assert plain.activations == pytest.approx(kept, rel=0.12)


SMALL = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}


def test_weights_gradients_and_optimizer_are_those_of_a_real_step() -> None:
    config = make_tiny_config()
    model = VideoLlamaForConditionalGeneration(config)
    freeze_for_training(model, VIDEO)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim or value.numel() > 1
    )
    estimate = estimate_training_memory(config, VIDEO, TrainingSample(64, 8), batch_size=2)
    assert estimate.trained == estimate.gradients == sum(parameter.nbytes for parameter in trained)
    assert estimate.optimizer == pytest.approx(moments, rel=1e-3)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert estimate.frozen == 2 * frozen


def test_checkpointing_and_quantization_need_less_and_larger_batches_more() -> None:
    config, sample = make_tiny_config(), TrainingSample(256, 64)
    base = estimate_training_memory(config, VIDEO, sample, batch_size=4)
    assert estimate_training_memory(config, VIDEO, sample, batch_size=4, checkpointing=True).total < base.total
    assert estimate_training_memory(config, VIDEO, sample, batch_size=4, language_model_bits=4).frozen < base.frozen
    assert estimate_training_memory(config, VIDEO, sample, batch_size=8).activations == 2 * base.activations
    with_sound = estimate_training_memory(config, (*VIDEO, "audio_qformer", "audio_projection"), sample, batch_size=4)
    assert with_sound.optimizer > base.optimizer
    assert with_sound.activations > base.activations
