"""A model that cannot fit is refused before its files are read; one that may not is warned of; others load."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import BitsAndBytesConfig

from video_llama.checkpoints import fitting
from video_llama.checkpoints.fitting import (
    DeviceMemory,
    batch_that_fits,
    check_model_fits,
    read_device_memory,
    single_device,
)
from video_llama.checkpoints.memory import build_skeleton, estimate_memory
from video_llama.errors import ConfigError
from video_llama.inference import load as builder
from video_llama.inference.load import load_pretrained_model
from video_llama.model.configuration import VideoLlamaConfig

GIB = 2**30
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def published() -> VideoLlamaConfig:
    return VideoLlamaConfig()


@pytest.fixture(autouse=True)
def one_skeleton(published: VideoLlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model's shapes take a second to build."""
    known = build_skeleton(published) if not hasattr(one_skeleton, "known") else one_skeleton.known
    one_skeleton.known = known  # type: ignore[attr-defined]
    monkeypatch.setattr(
        fitting, "build_skeleton", lambda config: known if config is published else build_skeleton(config)
    )


def give(monkeypatch: pytest.MonkeyPatch, memory: DeviceMemory | None) -> None:
    monkeypatch.setattr(fitting, "read_device_memory", lambda device: memory)


def test_a_gpu_with_too_little_free_is_an_error_that_names_sizes_and_ways_out(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig
) -> None:
    give(monkeypatch, DeviceMemory(8 * GIB, 24 * GIB))
    with pytest.raises(ConfigError) as caught:
        check_model_fits(published, BF16, device_map={"": torch.device("cuda")})
    words = str(caught.value)
    assert "cannot fit cuda: its weights take 14.8 GiB (language model 12.6 GiB, vision 2.1 GiB, audio" in words
    assert "there is 8.0 GiB free" in words
    assert "load_in_8bit needs 9.4 GiB, too much as well; load_in_4bit needs 6.4 GiB; no audio branch saves" in words
    assert "device_map='auto'" in words
    assert "VIDEO_LLAMA_CHECK_MEMORY=0" in words


def test_float32_is_advised_to_take_half_precision_first(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig
) -> None:
    give(monkeypatch, DeviceMemory(20 * GIB, 24 * GIB))
    with pytest.raises(ConfigError, match=r"half precision \(dtype='bfloat16'\) needs 15\.4 GiB; load_in_8bit"):
        check_model_fits(published, torch.float32, device_map="cuda:0")


def test_weights_that_leave_no_room_for_an_answer_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    give(monkeypatch, DeviceMemory(15 * GIB, 24 * GIB))
    check_model_fits(published, BF16, device_map={"": "cuda:0"})
    words = "may not fit cuda:0: weights take 14.8 GiB, cache and activations of an answer (and what CUDA itself sets "
    assert f"{words}aside) 1.3 GiB more" in caplog.text
    caplog.clear()
    give(monkeypatch, DeviceMemory(int(16.5 * GIB), 24 * GIB))
    check_model_fits(published, BF16, device_map={"": "cuda:0"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("free_gib", "num_beams", "number"), [(64, 1, 128), (8, 1, 16), (8, 2, 8), (2, 1, 1), (0, 1, 1)]
)
def test_a_batch_is_as_large_as_the_free_memory_of_a_gpu_allows(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig, free_gib: int, num_beams: int, number: int
) -> None:
    give(monkeypatch, DeviceMemory(free_gib * GIB, 80 * GIB))
    model = fitting.build_skeleton(published).bfloat16()
    assert batch_that_fits(model, torch.device("cuda"), 556, num_beams) == number
    assert batch_that_fits(model, torch.device("cpu"), 556) == 8


def test_a_cpu_whose_other_programs_could_make_room_is_warned_of_and_one_too_small_is_an_error(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    give(monkeypatch, DeviceMemory(2 * GIB, 16 * GIB, is_soft=True))
    check_model_fits(published, BF16, device_map={"": "cpu"})
    assert "may not fit cpu" in caplog.text
    give(monkeypatch, DeviceMemory(2 * GIB, 8 * GIB, is_soft=True))
    with pytest.raises(ConfigError, match=r"there is 8\.0 GiB in all"):
        check_model_fits(published, BF16, device_map={"": "cpu"})


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_4bit=True),
        {"load_in_4bit": True, "quant_method": "bitsandbytes"},
        {"_load_in_4bit": True, "quant_method": "bitsandbytes"},
    ],
)
def test_a_quantised_model_is_counted_as_such(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig, quantization: object, caplog: pytest.LogCaptureFixture
) -> None:
    give(monkeypatch, DeviceMemory(15 * GIB // 2, 8 * GIB))
    check_model_fits(published, BF16, device_map={"": 0}, quantization_config=quantization)
    assert not caplog.records
    give(monkeypatch, DeviceMemory(5 * GIB, 8 * GIB))
    with pytest.raises(ConfigError, match=r"weights take 5\.9 GiB.*there is 5\.0 GiB free\. no audio branch saves"):
        check_model_fits(published, BF16, device_map={"": 0}, quantization_config=quantization)


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", {"": "disk"}, {"video_branch": 0, "language_model": 1}, None]
)
def test_what_accelerate_spreads_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig, device_map: object
) -> None:
    monkeypatch.setattr(fitting, "read_device_memory", lambda device: pytest.fail("nobody should ask"))
    check_model_fits(published, BF16, device_map=device_map)
    assert single_device(device_map) is None


def test_one_device_is_found_in_every_way_to_name_it() -> None:
    for name in ({"": "cuda:1"}, "cuda:1", 1, {"a": 1, "b": 1}, torch.device("cuda", 1)):
        assert single_device(name) == torch.device("cuda", 1)


def test_the_switch_loads_without_looking(monkeypatch: pytest.MonkeyPatch, published: VideoLlamaConfig) -> None:
    monkeypatch.setenv(fitting.SWITCH, "0")
    give(monkeypatch, DeviceMemory(1, 1))
    check_model_fits(published, BF16, device_map="cuda")


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_loading_looks_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path], layout: str
) -> None:
    give(monkeypatch, DeviceMemory(1000, 1000))
    for name in ("load_original", "load_transformers"):
        monkeypatch.setattr(builder, name, lambda *args, **kwargs: pytest.fail("it should not come to that"))
    with pytest.raises(ConfigError, match="cannot fit cpu"):
        load_pretrained_model(checkpoints[layout], device="cpu")


def test_a_model_that_fits_loads_in_silence(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_pretrained_model(tiny_checkpoint, device="cpu")
    assert "fit" not in caplog.text


def test_the_memory_of_the_machine_and_of_a_container_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = SimpleNamespace(available=10 * GIB, total=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=GIB, total=2 * GIB))
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(fitting, "_CGROUPS", (files,))
    assert read_device_memory(torch.device("cpu")) == DeviceMemory(11 * GIB, 18 * GIB, is_soft=True)
    for name, content in zip(files, ("max", "0", ""), strict=True):
        Path(name).write_text(content)
    assert read_device_memory(torch.device("cpu")) == DeviceMemory(11 * GIB, 18 * GIB, is_soft=True)
    for name, content in zip(files, (4 * GIB, 3 * GIB, f"anon 5\ninactive_file {GIB}\n"), strict=True):
        Path(name).write_text(str(content))
    assert read_device_memory(torch.device("cpu")) == DeviceMemory(2 * GIB, 4 * GIB, is_soft=True)


def test_a_device_that_does_not_tell_is_not_judged(published: VideoLlamaConfig) -> None:
    assert read_device_memory(torch.device("meta")) is None
    check_model_fits(published, BF16, device_map="meta")


def test_memory_kept_by_torch_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    assert read_device_memory(torch.device("cuda")) == DeviceMemory(4 * GIB, 8 * GIB)


def test_the_skeleton_counts_shared_weights_once() -> None:
    from tests.helpers.tiny_model import make_tiny_config

    text = {**make_tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
    untied, tied = make_tiny_config(), make_tiny_config(text_config=text)
    saved = estimate_memory(untied).language_model - estimate_memory(tied).language_model
    assert saved == 2 * 96 * 32
