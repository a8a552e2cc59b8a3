"""What goes wrong on a device is said in one line, and what a failed computation held is free again."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch

from video_llama.errors import DeviceError, OutOfMemoryError
from video_llama.inference import load as builder
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import load_pretrained_model
from video_llama.utils.devices import LESS_TO_LOAD, computing_on

CPU = torch.device("cpu")
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79.10 GiB of which 312.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.70 GiB memory in use.\nSee documentation."
)


def test_a_full_gpu_is_told_with_its_amounts_and_what_to_lower() -> None:
    with pytest.raises(OutOfMemoryError) as caught, computing_on(CPU):
        raise torch.OutOfMemoryError(CUDA_SAYS)
    told = str(caught.value)
    assert told.startswith("cuda:3 is out of memory (2.50 GiB asked for, 312.00 MiB free, 79.10 GiB in all): take ")
    assert "\n" not in told
    for advice in ("batch_size", "num_frames", "max_new_tokens", "load_in_4bit"):
        assert advice in told


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 150.0 MB). Tried to allocate 64.0 MB",
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_runs_out_under_many_names(said: str) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^cpu is out of memory.*device_map"), computing_on(CPU, LESS_TO_LOAD):
        raise RuntimeError(said)


def test_an_error_that_nobody_keeps_is_gone_with_what_its_frames_held() -> None:
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    def compute() -> None:
        value = Held()
        held.append(weakref.ref(value))
        with computing_on(CPU):
            raise torch.OutOfMemoryError(CUDA_SAYS)

    gc.disable()
    try:
        with contextlib.suppress(OutOfMemoryError):
            compute()
        assert held[0]() is None
    finally:
        gc.enable()


def test_memory_that_is_really_too_much_is_told() -> None:
    with pytest.raises(OutOfMemoryError, match=r"^cpu is out of memory \(1\d+ bytes asked for\)"), computing_on(CPU):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_device_that_failed_for_good_is_told_as_such(kind: type[RuntimeError]) -> None:
    error = kind.__new__(kind, "CUDA error: device-side assert triggered\nCUDA kernel errors might be …")
    told = r"^cpu failed, .* \(CUDA error: device-side assert triggered\): start again"
    with pytest.raises(DeviceError, match=told), computing_on(CPU):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes do not fit"), ValueError("CUDA error"), NotImplementedError("not on CUDA")):
        with pytest.raises(type(error), match=str(error)), computing_on(CPU):
            raise error


def test_what_failed_is_let_go_of_while_its_error_is_still_held() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def compute() -> None:
        large = torch.ones(9)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemoryError) as caught, computing_on(CPU):
        compute()
    assert held[0]() is None
    assert caught.value.__cause__ is not None


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    return load_pretrained_model(tiny_checkpoint, device="cpu", half=False)


def fail(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_question_for_which_there_is_no_memory_leaves_the_conversation_usable(
    model: VideoLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, usual = Chat(model), Chat(model)
    for one in (chat, usual):
        one.ask("What is it?")
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "generate", fail)
        with pytest.raises(OutOfMemoryError):
            chat.answer()
        with pytest.raises(OutOfMemoryError):
            list(chat.stream_answer())
    assert chat.answer(max_new_tokens=5) == usual.answer(max_new_tokens=5)


def test_media_for_which_there_is_no_memory_are_told(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model, "get_video_features", fail)
    with pytest.raises(OutOfMemoryError, match="fewer frames"):
        model.generate(torch.zeros(2, 3, 56, 56))


def test_loading_into_a_full_device_says_how_to_load_less(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "load_model", fail)
    with pytest.raises(OutOfMemoryError, match="load_in_4bit, load_in_8bit"):
        load_pretrained_model(tiny_checkpoint, device="cpu")
