"""torch's switches for the whole process, as a run wants them while it trains and as they were afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator

__all__ = ["prepare_determinism", "training_switches"]

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare_determinism() -> None:
    """Give cuBLAS workspaces with which it adds up in one order; it looks at them when a GPU is first used.

    A value that is set already is kept.
    """
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")


@contextlib.contextmanager
def training_switches(accelerator: Accelerator, deterministic: bool) -> Iterator[None]:
    """Set what decides over speed and bits while a run computes, and put it back afterwards.

    Where nothing is autocast, matrix products of float32 weights take TF32 on a GPU: 10 bits of mantissa, many times
    the speed. Answers in float32 outside of training stay exact.

    Args:
        accelerator: of the run.
        deterministic: use only algorithms that give the same bits each time; an operation that has none is an error.
    """
    with contextlib.ExitStack() as restored:
        if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if deterministic:
            restored.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            # Not with warn_only: attention has a deterministic way back, but takes it only if it must.
            torch.use_deterministic_algorithms(True)
            for name, wanted in (("benchmark", False), ("deterministic", True)):
                restored.callback(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
                setattr(torch.backends.cudnn, name, wanted)
        yield
