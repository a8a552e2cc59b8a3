"""What the arguments of the builder and the keys of a configuration become on their way to the loader."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import build_checkpoint, load_checkpoint
from video_llama.errors import ConfigError
from video_llama.inference import load as builder
from video_llama.inference.engine import VideoLlama
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch, tiny_model: VideoLlamaForConditionalGeneration) -> dict[str, Any]:
    """The arguments that reach the loader, which does not load."""
    arguments: dict[str, Any] = {}

    def load_nothing(source: Any, config: Any, dtype: Any, **options: Any) -> VideoLlamaForConditionalGeneration:
        arguments.update(options, config=config, dtype=dtype)
        return tiny_model

    monkeypatch.setattr(builder, "load_model", load_nothing)
    return arguments


@pytest.mark.parametrize("open_model", [load_checkpoint, build_checkpoint])
def test_device_and_placement_reach_the_loader(
    checkpoints: dict[str, Path],
    passed_on: dict[str, Any],
    open_model: Callable[..., VideoLlama],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))  # what is asked before loading
    open_model(checkpoints["original"], device="cuda:1", dtype="float16")
    assert passed_on["device_map"] == {"": torch.device("cuda:1")}
    assert passed_on["dtype"] == torch.float16
    open_model(checkpoints["original"], device_map="auto")
    assert passed_on["device_map"] == "auto"


def test_flash_attention_is_the_language_models_alone(checkpoints: dict[str, Path], passed_on: dict[str, Any]) -> None:
    load_checkpoint(checkpoints["original"], attn_implementation="flash_attention_2")
    assert passed_on["attn_implementation"] == {"text_config": "flash_attention_2"}
    build_checkpoint(checkpoints["original"], attn_implementation="eager")
    assert passed_on["attn_implementation"] == "eager"


@pytest.mark.parametrize(
    ("settings", "bits"), [({"low_resource": True}, 8), ({"load_in_8bit": True}, 8), ({"load_in_4bit": True}, 4)]
)
def test_quantization_reaches_the_loader(
    checkpoints: dict[str, Path],
    passed_on: dict[str, Any],
    settings: dict[str, Any],
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    build_checkpoint(checkpoints["original"], **settings)
    quantization = passed_on["quantization_config"]
    assert (quantization.load_in_8bit, quantization.load_in_4bit) == (bits == 8, bits == 4)


def test_quantization_needs_bitsandbytes_and_one_choice(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'8 and 4 bit: .* pip install "video_llama\[quantization\]"'):
        load_checkpoint(checkpoints["hf"], load_in_4bit=True)
    with pytest.raises(ConfigError, match="choose one of"):
        build_checkpoint(checkpoints["hf"], low_resource=True, load_in_4bit=True)


def test_the_sizes_of_a_configuration_count_where_no_config_json_gives_them(
    original_folder: Path, passed_on: dict[str, Any]
) -> None:
    (original_folder / "config.json").unlink()
    build_checkpoint(original_folder, image_size=336, fusion_head_layers=3, num_video_query_token=9, max_frame_pos=64)
    config = passed_on["config"]
    assert (config.vision_config.image_size, config.vision_config.num_hidden_layers) == (336, 39)
    assert config.video_qformer_config.num_hidden_layers == config.audio_qformer_config.num_hidden_layers == 3
    assert (config.num_video_query_tokens, config.max_frame_positions, config.num_audio_query_tokens) == (9, 64, 8)
    assert config.imagebind_vision_config is None


def test_sizes_that_contradict_a_config_json_beside_the_weights_are_an_error_that_names_them(
    checkpoints: dict[str, Path], passed_on: dict[str, Any]
) -> None:
    for settings, name in (({}, "original"), ({"ckpt": str(checkpoints["hf"])}, "hf")):
        with pytest.raises(ConfigError) as caught:
            build_checkpoint(
                checkpoints[name], num_video_query_token=6, max_frame_pos=7, num_audio_query_token=8, **settings
            )
        assert str(checkpoints[name] / "config.json") in str(caught.value)
        assert "model.num_video_query_token is 6, but there it is 32" in str(caught.value)
        assert "model.max_frame_pos is 7, but there it is 32" in str(caught.value)
        assert "num_audio_query_token" not in str(caught.value)  # the published size is as good as not set
    build_checkpoint(checkpoints["original"], num_video_query_token=32, max_frame_pos=32)
    assert passed_on["config"].num_video_query_tokens == 32


def test_imagebinds_vision_trunk_is_built_on_request(checkpoints: dict[str, Path], passed_on: dict[str, Any]) -> None:
    build_checkpoint(checkpoints["original"], options={"audio_from_images": True})
    assert passed_on["config"].imagebind_vision_config.modality == "vision"
    assert passed_on["config"].imagebind_vision_config.num_hidden_layers == 32
