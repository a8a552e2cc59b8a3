"""A path or a configuration becomes a model: every way in leads to the same classes and the same weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.helpers.checkpoints import VL, assert_equal_tensors, build_checkpoint, load_checkpoint
from video_llama.checkpoints import hub
from video_llama.checkpoints.original_layout import is_whole_model
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor


def assert_same_model(left: VideoLlama, right: VideoLlama) -> None:
    assert type(left) is type(right) is VideoLlama
    assert type(left.model) is type(right.model) is VideoLlamaForConditionalGeneration
    assert type(left.processor) is type(right.processor) is VideoLlamaProcessor
    assert left.processor.to_dict() == right.processor.to_dict()
    assert_equal_tensors(left.model.state_dict(), right.model.state_dict())
    assert answer(left) == answer(right)


def answer(model: VideoLlama) -> str:
    generator = torch.Generator().manual_seed(0)
    frames, sound = torch.rand(2, 3, 56, 56, generator=generator), torch.rand(1, 1, 128, 204, generator=generator)
    conversation = model.new_conversation()
    conversation.ask("What is it?")
    return model.generate(frames, sound if model.has_audio else None, conversation, max_new_tokens=4)


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> VideoLlama:
    """The model in question, as its folder in the original layout gives it."""
    return load_checkpoint(checkpoints["original"])


def test_a_loaded_model_is_ready_to_answer(loaded: VideoLlama) -> None:
    assert loaded.has_audio
    assert not loaded.model.training
    assert isinstance(answer(loaded), str)


@pytest.mark.parametrize("path", ["original/VL_random_tiny.pth", "hf", "hf/model.safetensors", "hf/config.json"])
def test_a_file_of_the_checkpoint_and_the_other_layout_give_the_same_model(
    checkpoints: dict[str, Path], loaded: VideoLlama, path: str
) -> None:
    assert_same_model(load_checkpoint(checkpoints["hf"].parent / path), loaded)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_hub_id_gives_the_same_model(
    checkpoints: dict[str, Path], loaded: VideoLlama, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(checkpoints[layout]))
    assert_same_model(load_checkpoint("owner/name"), loaded)


def test_without_sound_a_hub_id_is_downloaded_without_imagebind(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(checkpoints["original"])

    monkeypatch.setattr(hub, "snapshot_download", download)
    load_checkpoint("owner/name", audio=False)
    build_checkpoint(checkpoints["original"], ckpt="owner/name", equip_audio_branch=False)
    assert asked
    assert not any("*.pth" in patterns for patterns in asked)


def test_the_language_model_may_lie_elsewhere(original_folder: Path, tmp_path: Path, loaded: VideoLlama) -> None:
    shutil.move(original_folder / "language_model", tmp_path / "llama")
    with pytest.raises(CheckpointError, match="no language model"):
        load_checkpoint(original_folder)
    assert_same_model(load_checkpoint(original_folder, model_base=tmp_path / "llama"), loaded)


def test_the_registry_builds_the_same_model(checkpoints: dict[str, Path], loaded: VideoLlama) -> None:
    assert_same_model(build_checkpoint(checkpoints["original"]), loaded)


def test_a_configuration_may_name_a_folder_of_transformers(checkpoints: dict[str, Path], loaded: VideoLlama) -> None:
    assert_same_model(build_checkpoint(checkpoints["hf"], ckpt=str(checkpoints["hf"]), ckpt_2=None), loaded)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_template_can_be_chosen_and_any_other_name_leaves_the_weights_own(
    checkpoints: dict[str, Path], layout: str
) -> None:
    assert load_checkpoint(checkpoints[layout], model_name="v1").processor.conv_template == "v1"
    assert load_checkpoint(checkpoints[layout], model_name="Video-LLaMA-2-7B").processor.conv_template == "llama_2"


@pytest.mark.parametrize(
    ("model_type", "template"), [("pretrain_vicuna", "v1"), ("llama_v2", "llama_2"), ("something", "llama_2")]
)
def test_a_configurations_model_type_chooses_the_template(
    checkpoints: dict[str, Path], model_type: str, template: str
) -> None:
    assert build_checkpoint(checkpoints["original"], model_type=model_type).processor.conv_template == template


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_without_audio_nothing_of_it_is_needed_or_built(
    checkpoints: dict[str, Path], original_folder: Path, loaded: VideoLlama, layout: str
) -> None:
    (original_folder / "imagebind_huge.pth").unlink()
    model = load_checkpoint(original_folder if layout == "original" else checkpoints["hf"], audio=False)
    assert not model.has_audio
    assert not model.processor.use_audio
    kept = {name: value for name, value in loaded.model.state_dict().items() if "audio_branch" not in name}
    assert_equal_tensors(model.model.state_dict(), kept)
    assert isinstance(answer(model), str)


def test_a_configuration_without_audio_branch_builds_none(checkpoints: dict[str, Path]) -> None:
    for layout, ckpt in (("original", VL), ("hf", "")):
        path = str(checkpoints[layout] / ckpt)
        assert not build_checkpoint(checkpoints[layout], ckpt=path, ckpt_2=None, equip_audio_branch=False).has_audio


def test_sound_cannot_be_had_from_a_folder_saved_without_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    deaf = load_checkpoint(checkpoints["hf"], audio=False)
    deaf.model.save_pretrained(tmp_path)
    deaf.processor.save_pretrained(tmp_path)
    assert not load_checkpoint(tmp_path).has_audio
    with pytest.raises(CheckpointError, match="saved without its audio branch; load it with audio=False"):
        load_checkpoint(tmp_path, audio=True)


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"half": False}, torch.float32),
        ({"half": True, "dtype": "bfloat16"}, torch.bfloat16),
        ({"half": True, "dtype": torch.float32}, torch.float32),
        ({"half": True, "device": torch.device("cpu")}, torch.float32),
    ],
)
def test_the_precision_is_the_one_asked_for(
    checkpoints: dict[str, Path],
    layout: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("video_llama.utils.devices._cpu_computes_bfloat16", lambda: False)
    model = load_checkpoint(checkpoints[layout], **options).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_narrow_model_stays_in_float32_on_a_cpu_and_a_wide_one_does_not(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_llama.utils.devices._cpu_computes_bfloat16", lambda: True)
    assert load_checkpoint(checkpoints["hf"], half=True).model.dtype == torch.float32
    assert build_checkpoint(checkpoints["original"], dtype="auto").model.dtype == torch.float32
    monkeypatch.setattr("video_llama.utils.devices.NARROW_WIDTH", 16)
    assert load_checkpoint(checkpoints["hf"], half=True).model.dtype == torch.bfloat16
    assert build_checkpoint(checkpoints["original"], dtype="auto").model.dtype == torch.bfloat16
    assert load_checkpoint(checkpoints["hf"], half=False).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ckpt": None}, r"model\.ckpt must name"),
        ({"ckpt_2": None}, r"model\.ckpt_2 must name .* or set equip_audio_branch: False"),
    ],
)
def test_an_untrained_branch_never_answers(
    checkpoints: dict[str, Path], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_checkpoint(checkpoints["original"], **settings)


def test_for_training_branches_may_start_untrained(checkpoints: dict[str, Path], loaded: VideoLlama) -> None:
    options = {"trainable_dtype": torch.float32}
    model = build_checkpoint(
        checkpoints["original"], ckpt_2=None, dtype="bfloat16", for_training=True, options=options
    ).model
    trained = loaded.model.video_branch.video_qformer.state_dict()
    assert_equal_tensors(model.video_branch.video_qformer.state_dict(), trained)
    assert model.audio_branch.audio_query_tokens.dtype == torch.float32
    assert not torch.equal(model.audio_branch.audio_query_tokens, loaded.model.audio_branch.audio_query_tokens)
    assert model.audio_branch.audio_encoder.cls_token.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_quiet_load_says_nothing_and_leaves_the_settings_as_they_were(
    checkpoints: dict[str, Path], layout: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    package_logger, bars = logging.getLogger("video_llama.checkpoints"), transformers_logging.is_progress_bar_enabled()
    with caplog.at_level(logging.INFO, "video_llama.checkpoints"):
        load_checkpoint(checkpoints[layout], verbose=False)
        assert caplog.records == []
        assert "".join(capfd.readouterr()) == ""
        assert package_logger.level == logging.INFO
        assert transformers_logging.is_progress_bar_enabled() is bars
        load_checkpoint(checkpoints[layout], verbose=True)
        assert any(record.message.startswith("weights loaded: ") for record in caplog.records)


def test_the_settings_are_restored_after_an_error() -> None:
    level = logging.getLogger("video_llama.checkpoints").level
    with pytest.raises(CheckpointError):
        load_checkpoint("/absent/checkpoint", verbose=False)
    assert logging.getLogger("video_llama.checkpoints").level == level


def test_a_run_may_have_begun_with_a_model_of_the_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert is_whole_model("video-llama-tiny")
    assert is_whole_model(str(tiny_checkpoint))
    # The run's own checkpoint stands for a file that is gone.
    assert not is_whole_model(str(tmp_path / "VL_gone.pth"))
    with pytest.raises(CheckpointError, match="did you mean video-llama-tiny"):
        is_whole_model("video-llama-tin")
