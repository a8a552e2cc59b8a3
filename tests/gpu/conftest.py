"""Tests of what only a GPU can show, with tiny random models; all are skipped where there is none.

VIDEO_LLAMA_GPU_TESTS_ON=cpu runs what it can of them on the CPU, to find mistakes in the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from tests.training.conftest import base, config_file, corpus, make_config
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import load_pretrained_model

__all__ = ["base", "config_file", "corpus", "make_config"]

# cuBLAS reads it when it is first used: without it, deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ON = os.environ.get("VIDEO_LLAMA_GPU_TESTS_ON", "cuda")
IS_THERE = torch.cuda.is_available() or ON == "cpu"
HERE = Path(__file__).parent
NUM_BYTES_AND_SPECIAL = 3 + 256  # what the small tokenizer begins with


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason="there is no GPU that torch can use"))


@pytest.fixture
def device() -> torch.device:
    """Where the tests run."""
    return torch.device("cuda", 0) if ON == "cuda" else torch.device(ON)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The same, for tests of which nothing is left on a CPU."""
    if device.type != "cuda":
        pytest.skip("a rehearsal on the CPU has no such thing")
    return device


@pytest.fixture(autouse=True)
def fresh_processes() -> Iterator[None]:
    """accelerate keeps device and precision of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Convolutions of cuDNN round to TF32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits each time, and a warning where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def load(path: Path, device: torch.device | str, dtype: str = "float32") -> VideoLlama:
    """A checkpoint in a precision on a device; it never says single bytes, half of which are no text."""
    model = load_pretrained_model(path, device=device, dtype=dtype, verbose=False)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[:NUM_BYTES_AND_SPECIAL] = 0
    return model


@pytest.fixture
def exact_model(tiny_checkpoint: Path, device: torch.device, exact_float32: None) -> VideoLlama:
    """The tiny model in float32 on the device."""
    return load(tiny_checkpoint, device)
