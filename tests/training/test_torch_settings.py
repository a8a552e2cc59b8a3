"""torch's switches: set for a run, and as they were afterwards."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from video_llama.training.learner import StepOutput
from video_llama.training.torch_settings import CUBLAS_WORKSPACE, training_switches
from video_llama.training.trainer import Trainer


def switches() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.enabled,
    )


def accelerator(device: str, precision: str) -> Any:
    return SimpleNamespace(device=torch.device(device), mixed_precision=precision)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "no", "high"), ("cuda", "bf16", "highest"), ("cpu", "no", "highest")],
)
def test_float32_takes_tf32_on_a_gpu_while_it_trains(device: str, precision: str, expected: str) -> None:
    before = switches()
    assert before[0] == "highest"
    with contextlib.suppress(KeyError), training_switches(accelerator(device, precision), deterministic=False):
        assert switches() == (expected, *before[1:])
        raise KeyError  # an error puts them back, too
    assert switches() == before


def test_a_deterministic_run_takes_deterministic_algorithms_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, during = switches(), set()
    trainer = Trainer(make_config("run.deterministic=True", "run.max_epoch=1"))
    assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    learn = trainer.learner.step

    def note(*arguments: Any) -> StepOutput:
        during.add(switches())
        return learn(*arguments)

    trainer.learner.step = note  # type: ignore[method-assign]
    trainer.step([trainer.batches()[0]])
    assert switches() == before
    trainer.train()
    assert during == {("highest", True, False, False, True, True)}
    assert switches() == before


def test_without_it_a_run_leaves_algorithms_as_the_user_set_them(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with training_switches(trainer.accelerator, deterministic=False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
