"""Full-size models on the meta device: the recorded names and shapes, through the name table, and what trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import HeldWeights, original_to_ours, saved_weights
from video_llama.checkpoints.report import Source, match_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    LANGUAGE_MODEL,
    MODEL_PARTS,
    PROJECTION,
    QFORMER,
    TRAINABLE_PARTS,
    VIDEO_BRANCH,
    VISION_ENCODER,
    Part,
    is_stray,
    part_of,
    to_original_name,
    to_our_name,
)
from video_llama.cli.memory_tables import read_config
from video_llama.config import load_config
from video_llama.model.configuration import ImageBindTrunkConfig
from video_llama.model.parts import freeze_for_training, trained_parts
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

STAGES = [
    "visionbranch_stage1_pretrain",
    "visionbranch_stage2_finetune",
    "audiobranch_stage1_pretrain",
    "audiobranch_stage2_finetune",
]
STAGE_CONFIGS = Path(__file__).parents[2] / "configs" / "train"

Shapes = dict[str, tuple[int, ...]]
ReadJson = Callable[[str], Any]


def build(size: str, hears: bool) -> VideoLlamaForConditionalGeneration:
    """A published size; the model that hears has ImageBind's vision trunk too, as the original always does."""
    config = read_config(size, use_audio=hears)
    config.imagebind_vision_config = ImageBindTrunkConfig.vision_huge() if hears else None
    with torch.device("meta"):
        return VideoLlamaForConditionalGeneration(config)


@pytest.fixture(scope="module")
def models_7b() -> dict[bool, VideoLlamaForConditionalGeneration]:
    return {hears: build("7b", hears) for hears in (False, True)}


@pytest.fixture(scope="module")
def inventory(reference_json: ReadJson) -> dict[str, Any]:
    return reference_json("common/inventory_full_size.json")["configs"]


def shapes_of(model: VideoLlamaForConditionalGeneration) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in saved_weights(model).items()}


def recorded_shapes(record: Mapping[str, Any]) -> Shapes:
    """Of all parameters and of the buffers that a checkpoint holds."""
    kept = {name: buffer for name, buffer in record["buffers"].items() if buffer["persistent"]}
    return {name: tuple(value["shape"]) for name, value in {**record["parameters"], **kept}.items()}


def as_13b(shapes: Shapes) -> Shapes:
    """Recorded shapes of the 7B model with the sizes of LLaMA-2-13B: 40 layers, width 5120, MLP 13824."""
    sizes = {4096: 5120, 11008: 13824}
    widened = {
        name: tuple(sizes.get(side, side) for side in shape) if "llama" in name else shape
        for name, shape in shapes.items()
    }
    last = {name: shape for name, shape in widened.items() if name.startswith("llama_model.model.layers.31.")}
    for layer in range(32, 40):
        widened |= {name.replace(".31.", f".{layer}."): shape for name, shape in last.items()}
    return widened


def assert_same_names_and_shapes(recorded: Shapes, ours: Shapes) -> None:
    wanted = {name: shape for name, shape in recorded.items() if to_our_name(name) is not None}
    assert original_to_ours(recorded) == ours
    assert {to_original_name(name): shape for name, shape in ours.items()} == wanted  # the way back, so one to one
    assert [name for name in recorded if name not in wanted and not is_stray(name)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_7b_model_has_the_recorded_names_and_shapes(
    stage: str, inventory: dict[str, Any], models_7b: dict[bool, VideoLlamaForConditionalGeneration]
) -> None:
    assert_same_names_and_shapes(recorded_shapes(inventory[stage]), shapes_of(models_7b["audio" in stage]))


@pytest.mark.parametrize("stage", STAGES[1::2])
def test_the_13b_model_has_the_recorded_names_and_the_shapes_of_its_language_model(
    stage: str, inventory: dict[str, Any]
) -> None:
    assert_same_names_and_shapes(as_13b(recorded_shapes(inventory[stage])), shapes_of(build("13b", "audio" in stage)))


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_of_the_record_train_and_no_others(
    stage: str, inventory: dict[str, Any], models_7b: dict[bool, VideoLlamaForConditionalGeneration]
) -> None:
    settings = load_config(STAGE_CONFIGS / f"{stage}.yaml").model
    model = models_7b[settings.equip_audio_branch]
    freeze_for_training(model, trained_parts(settings))
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    recorded = {name for name, value in inventory[stage]["parameters"].items() if value["requires_grad"]}
    assert {to_original_name(name) for name in trains} == recorded
    assert sum(parameter.numel() for parameter in trains.values()) == inventory[stage]["n_trainable"]


def assert_fills(
    model: VideoLlamaForConditionalGeneration, sources: list[Source], parts: Collection[Part], among: Collection[Part]
) -> None:
    """The files hold exactly `parts` of the parts looked for, whole, and beside them nothing that we do not know."""
    expected = {name: tensor for name, tensor in saved_weights(model).items() if part_of(name) in among}
    report = match_weights(expected, sources, parts)
    assert report.problems() == []
    assert report.unknown == {}
    assert set(report.found) == {name for name in expected if part_of(name) in parts}


EXTERNAL_FILES = {
    "eva_vit_g": (VISION_ENCODER,),
    "blip2": (QFORMER,),
    "imagebind": (AUDIO_ENCODER, IMAGEBIND_VISION),
    "pretrained_minigpt4": (PROJECTION,),
}


def headers(path: str, shapes: Mapping[str, Any]) -> HeldWeights:
    """A file of which only names and shapes are recorded."""
    return HeldWeights(path, {name: torch.empty(values[0], device="meta") for name, values in shapes.items()})


def external_source(file: str, reference_json: ReadJson) -> Source:
    records = reference_json("common/external_files.json")
    [keys] = [record["keys"] for name, record in records.items() if name.startswith(file)]
    return Source(headers(file, keys), EXTERNAL_FILES[file][0].file_prefix)


def checkpoint_source(stage: str, reference_json: ReadJson) -> Source:
    return Source(headers(stage, reference_json("common/checkpoint_keys.json")["configs"][stage]["model"]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_published_checkpoint_fills_its_branch_and_the_rest_of_it_is_stray(
    stage: str, reference_json: ReadJson, models_7b: dict[bool, VideoLlamaForConditionalGeneration]
) -> None:
    parts = (AUDIO_BRANCH,) if "audio" in stage else (VIDEO_BRANCH, PROJECTION)
    source = checkpoint_source(stage, reference_json)
    assert_fills(models_7b[True], [source], parts, among=TRAINABLE_PARTS)


@pytest.mark.parametrize("file", EXTERNAL_FILES)
def test_an_external_file_fills_its_parts(
    file: str, reference_json: ReadJson, models_7b: dict[bool, VideoLlamaForConditionalGeneration]
) -> None:
    source = external_source(file, reference_json)
    assert_fills(models_7b[True], [source], EXTERNAL_FILES[file], among=MODEL_PARTS)


def test_all_files_together_fill_the_whole_model_but_for_the_language_model(
    reference_json: ReadJson, models_7b: dict[bool, VideoLlamaForConditionalGeneration]
) -> None:
    sources = [external_source(file, reference_json) for file in EXTERNAL_FILES]
    sources += [checkpoint_source(stage, reference_json) for stage in STAGES]
    assert_fills(models_7b[True], sources, set(MODEL_PARTS) - {LANGUAGE_MODEL}, among=MODEL_PARTS)
