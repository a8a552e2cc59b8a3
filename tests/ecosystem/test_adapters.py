"""PEFT's LoRA by hand, on whole weights and on quantized ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from tests.ecosystem.conftest import ABOUT_VIDEO, SMALL_MODEL, VIDEO, ask, rows
from video_llama import VideoLlamaDataCollator, VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from video_llama.checkpoints.quantization import prepare_quantized_layers
from video_llama.errors import ConfigError

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

TARGET = r".*language_model\..*\.(q_proj|v_proj)"


def with_lora(model: VideoLlamaForConditionalGeneration, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGET, **options))


def train(model: Any, batch: dict[str, torch.Tensor], steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=3e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def answer(model: Any, processor: VideoLlamaProcessor) -> str:
    inputs = processor.apply_chat_template(ask("video", VIDEO, ABOUT_VIDEO), add_generation_prompt=True, tokenize=True)
    new = model.eval().generate(**inputs, max_new_tokens=30)
    return str(processor.batch_decode(new, skip_special_tokens=True)[0])


def test_lora_trains_is_saved_loaded_and_merged_with_equal_answers(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    batch = VideoLlamaDataCollator(processor)(rows())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first_loss = model.train()(**batch).loss.item()
    adapted = with_lora(model, modules_to_save=["projection"])
    losses = train(adapted, batch)
    assert losses[0] == pytest.approx(first_loss, rel=1e-6)
    assert losses[-1] < losses[0]
    kept = {name.replace(".base_layer.", "."): value for name, value in adapted.base_model.model.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items() if name in kept)
    trained = answer(adapted, processor)
    adapted.save_pretrained(tmp_path / "adapter")
    base = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    assert answer(base, processor) != trained
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert answer(loaded, processor) == trained
    merged = loaded.merge_and_unload()
    assert answer(merged, processor) == trained
    merged.save_pretrained(tmp_path / "merged")
    again = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert answer(again, processor) == trained
    assert again.state_dict().keys() == before.keys()


def test_an_adapter_of_the_output_layer_is_used(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor
) -> None:
    batch = VideoLlamaDataCollator(processor)(rows())
    adapted = with_lora(model, modules_to_save=["lm_head"])
    head = adapted.base_model.model.lm_head.modules_to_save["default"]
    before = head.weight.clone()
    train(adapted, batch, steps=1)
    assert not torch.equal(head.weight, before)
    nn.init.zeros_(head.weight)
    assert not adapted.eval()(**batch).logits.any()


def quantized_parts(model: nn.Module) -> set[str]:
    kinds = ("Linear4bit", "Linear8bitLt")
    return {name.rsplit(".", 1)[0] for name, module in model.named_modules() if type(module).__name__ in kinds}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_from_pretrained_quantizes_the_language_model_only(
    bits: int, as_mapping: bool, processor: VideoLlamaProcessor, chat_answer: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config: Any = {f"load_in_{bits}bit": True}
    if not as_mapping:
        config = BitsAndBytesConfig(**config)
    model = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, quantization_config=config)
    parts = quantized_parts(model)
    assert len(parts) == 2 * 4
    assert all(name.startswith("model.language_model.layers.") for name in parts)
    assert answer(model, processor)
    assert not getattr(config, "llm_int8_skip_modules", None)
    model.save_pretrained(tmp_path)
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert quantized_parts(loaded) == parts
    assert answer(loaded, processor) == answer(model, processor)
    part = AutoModel.from_pretrained(SMALL_MODEL, quantization_config=config)
    assert all(name.startswith("language_model.layers.") for name in quantized_parts(part))


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_a_quantized_model_learns_on_the_cpu(bits: int, processor: VideoLlamaProcessor) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, quantization_config=config)
    adapted = with_lora(model)
    batch = VideoLlamaDataCollator(processor)(rows())
    adapted.train()
    adapted(**batch).loss.backward()
    gradients = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(gradients) == 2 * 2 * 4
    assert all(grad is not None and grad.any() for name, grad in gradients.items() if "lora_B" in name)
    losses = train(adapted, batch, steps=6)
    assert losses[-1] < losses[0]


def test_a_model_that_was_rearranged_for_answers_refuses_to_train() -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = VideoLlamaForConditionalGeneration.from_pretrained(SMALL_MODEL, quantization_config=config)
    prepare_quantized_layers(model)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    # As on a CPU with instructions for bfloat16; on others bitsandbytes leaves the weights as they are.
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="no gradient can pass it"):
        model.train()
