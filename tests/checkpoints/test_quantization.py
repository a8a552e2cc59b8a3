"""The language model in 8 and 4 bit, for real; these tests run where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import load_checkpoint
from video_llama.checkpoints.load import load_model
from video_llama.inference.engine import VideoLlama
from video_llama.processor.media_processor import VideoFrames

pytestmark = pytest.mark.slow

bitsandbytes = pytest.importorskip("bitsandbytes")

LINEAR = {4: "Linear4bit", 8: "Linear8bitLt"}


def load(path: Path, bits: int) -> VideoLlama:
    return load_checkpoint(path, device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def quantized(model: VideoLlama) -> set[str]:
    return {name for name, module in model.model.named_modules() if type(module).__name__ in LINEAR.values()}


def answer(model: VideoLlama) -> str:
    pixels = torch.zeros(2, 3, *(2 * [model.model.config.vision_config.image_size]))
    frames = VideoFrames(pixels, "video", [0.0, 1.0], [0, 1], "a", pixels.numpy())
    conversation = model.new_conversation()
    conversation.ask("What is this?")
    return model.generate(frames, None, conversation, max_new_tokens=8)


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("bits", [4, 8])
def test_only_linear_layers_inside_the_language_model_are_quantized(
    checkpoints: dict[str, Path], layout: str, bits: int
) -> None:
    model = load(checkpoints[layout], bits)
    inside = {
        name
        for name, module in load_checkpoint(checkpoints[layout]).model.language_model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert quantized(model) == {f"model.language_model.{name}" for name in inside}
    assert answer(model) == answer(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_branches_and_output_layer_keep_their_values(checkpoints: dict[str, Path], bits: int) -> None:
    whole = dict(load_checkpoint(checkpoints["hf"], device="cpu").model.named_parameters())
    for name, parameter in load(checkpoints["hf"], bits).model.named_parameters():
        if not name.startswith("model.language_model.layers."):
            assert torch.equal(parameter, whole[name].to(parameter.dtype)), name


@pytest.mark.parametrize("bits", [4, 8])
def test_both_layouts_give_the_same_quantized_model(checkpoints: dict[str, Path], bits: int) -> None:
    both = [load(checkpoints[layout], bits) for layout in ("hf", "original")]
    for (name, mine), (_, its) in zip(*(model.model.named_parameters() for model in both), strict=True):
        assert torch.equal(mine, its), name
    assert answer(both[0]) == answer(both[1])


def test_quantized_logits_are_near_those_of_the_whole(checkpoints: dict[str, Path]) -> None:
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        logits = {bits: load(checkpoints["hf"], bits).model(input_ids=ids).logits.float() for bits in (4, 8)}
        whole = load_checkpoint(checkpoints["hf"], device="cpu").model(input_ids=ids).logits.float()
    differences = {bits: float((logits[bits] - whole).norm() / whole.norm()) for bits in (4, 8)}
    assert 0 < differences[8] < differences[4] < 0.3


def test_the_generation_settings_of_the_folder_count(checkpoints: dict[str, Path]) -> None:
    whole = load_checkpoint(checkpoints["hf"]).model.generation_config
    assert load(checkpoints["hf"], 4).model.generation_config.to_diff_dict() == whole.to_diff_dict()


def test_a_quantized_model_can_be_saved_and_loaded_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = load(checkpoints["hf"], 4)
    model.model.save_pretrained(tmp_path)
    back = load_model(tmp_path, type(model.model.config).from_pretrained(tmp_path), torch.bfloat16)
    assert answer(VideoLlama(back, model.processor)) == answer(model)


def test_the_weights_of_4_bit_layers_are_rearranged_when_loaded_and_not_when_used(
    checkpoints: dict[str, Path],
) -> None:
    model = load(checkpoints["hf"], 4)
    before = {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()}
    answer(model)
    assert before == {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()}
