"""Devices, precisions, seeds, and skipped initialisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from video_llama.errors import ConfigError
from video_llama.utils.devices import resolve_device, resolve_dtype, set_seed
from video_llama.utils.files import write_whole
from video_llama.utils.jsonl import append_jsonl, drop_cut_line, read_jsonl
from video_llama.utils.utils import disable_torch_init


def test_the_bare_call_leaves_later_modules_initialised() -> None:
    disable_torch_init()
    torch.manual_seed(0)
    assert nn.Linear(8, 8).weight.abs().sum() > 0


def test_initialisation_is_skipped_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: filled.append(self))

    def fail_inside() -> None:
        with disable_torch_init():
            nn.Linear(2, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert filled == []
    nn.Linear(2, 2)
    assert len(filled) == 1


def test_a_seed_repeats_every_generator() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        set_seed(7)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()


def test_a_device_is_taken_as_given_or_found() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("meta")).type == "meta"
    assert resolve_device().type in ("cpu", "cuda", "mps")


def test_a_device_that_is_not_there_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match=r"device cuda:1 is not available: torch .* found 1 GPU"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"device cuda is not available: torch .* found 0 GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device mps is not available"):
        resolve_device("mps")
    with pytest.raises(ConfigError, match="unknown device 'toaster'"):
        resolve_device("toaster")
    with pytest.raises(ConfigError, match=r"device xpu:1 is not supported; it should be cpu, cuda"):
        resolve_device("xpu:1")


@pytest.mark.parametrize(("capable", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_a_cpu_computes_in_half_precision_only_where_it_has_the_instructions(
    monkeypatch: pytest.MonkeyPatch, capable: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    assert resolve_dtype("auto", "cpu") == dtype
    assert resolve_dtype("auto", "cpu", width=1408) == dtype
    assert resolve_dtype("auto", "cpu", width=192) == torch.float32
    assert resolve_dtype("auto", "cpu", half=False) == torch.float32


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_the_half_precision_it_has(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    current: list[torch.device] = []

    @contextlib.contextmanager
    def make_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def asked(including_emulation: bool = True) -> bool:
        return supported and current == [torch.device("cuda:1")]

    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    assert resolve_dtype(None, "cuda:1") == dtype
    assert resolve_dtype(None, "mps") == torch.float16


def test_a_named_precision_is_obeyed() -> None:
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert resolve_dtype(torch.float64, "cpu") == torch.float64
    with pytest.raises(ConfigError, match="'float13'; it should be auto, float32"):
        resolve_dtype("float13", "cpu")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def write(partial: Path) -> None:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")

    write_whole(path, write)
    assert path.read_text() == "whole"

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert path.read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": ', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": "\xc3', b'{"a": 1}\n'),
        (b'{"a"', b""),
    ],
)
def test_a_file_of_json_lines_is_continued_behind_its_last_whole_line(
    content: bytes, kept: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    drop_cut_line(path)
    assert path.read_bytes() == kept
    append_jsonl(path, {"name": "\udcff"})
    assert path.read_bytes().startswith(kept)
    assert [*read_jsonl(path, ConfigError)][-1] == {"name": "\udcff"}
