"""A short training loop for parts that train alone: resumable, seeded, logged."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from video_llama.utils.devices import resolve_dtype
from video_llama.utils.files import write_whole
from video_llama.utils.jsonl import append_jsonl

__all__ = ["StepSchedule", "build_optimizers", "half_precision", "run_steps"]

logger = logging.getLogger(__name__)

_SAVE_EVERY, _LOG_EVERY = 250, 50
# Narrower matrices are heads for classes or coordinates.
_MIN_MATRIX_SIDE = 64

StepFunction = Callable[[Generator], Mapping[str, Tensor]]
"""Draws a batch and returns the terms of its loss (summed for the gradient) by name."""


@dataclass(frozen=True)
class StepSchedule:
    """How long and how fast a part trains.

    Attributes:
        num_steps: of the optimizers.
        matrix_lr: learning rate of Muon after the warm-up; all rates fall to a fiftieth along a cosine.
        other_lr: that of AdamW.
        warmup_steps: of linear growth.
        weight_decay: of matrices.
    """

    num_steps: int
    matrix_lr: float = 5e-3
    other_lr: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02

    def share(self, step: int) -> float:
        """Return the share of its peak that a rate has at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(module: nn.Module, schedule: StepSchedule) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices within a model, and AdamW for all else that trains.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix of the momentum; here it learns in a fifth of
    the steps that AdamW alone needs. It is not meant for embeddings and heads.
    """
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parent in module.modules():
        for parameter in parent.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(parent, nn.Linear) and parameter.ndim == 2 and min(parameter.shape) >= _MIN_MATRIX_SIDE:
                matrices.append(parameter)
            else:
                (tables if parameter.ndim > 1 else vectors).append(parameter)
    decay = schedule.weight_decay
    muon = torch.optim.Muon(matrices, schedule.matrix_lr, decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=schedule.other_lr, betas=(0.9, 0.98))
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def run_steps(
    name: str,
    modules: nn.ModuleDict,
    step_function: StepFunction,
    schedule: StepSchedule,
    folder: Path,
    seed: int,
    measure: Callable[[], Mapping[str, float]] | None = None,
    in_half: bool = False,
) -> None:
    """Train modules in place, or read the result of an earlier run; an interrupted run continues.

    A step depends on the weights, the optimizer's state, the seed and its number alone.

    Args:
        name: of the part: `FOLDER/NAME.pt` holds its state, `FOLDER/NAME.jsonl` its log.
        modules: what trains; whatever has `requires_grad` off is kept in the state but not changed.
        step_function: the loss of one batch.
        schedule: how long and how fast.
        folder: an existing folder.
        seed: of the batches.
        measure: accuracies to log whenever the state is written.
        in_half: compute products in bfloat16 on a CPU that is good at it.
    """
    file, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    optimizers = build_optimizers(modules, schedule)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    modules.train()
    sums: dict[str, float] = {}
    began = time.perf_counter()
    for step in tqdm(range(start, schedule.num_steps), name, schedule.num_steps, initial=start, unit="step"):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * schedule.share(step)
        with half_precision() if in_half else contextlib.nullcontext():
            losses = step_function(np.random.default_rng([seed, step]))
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step + 1
        if done % _LOG_EVERY == 0 or done == schedule.num_steps:
            count = (step % _LOG_EVERY) + 1
            entry = {"step": done, "seconds": round(time.perf_counter() - began, 1)}
            _append(log, entry | {key: round(value / count, 4) for key, value in sums.items()})
            sums = {}
        if done % _SAVE_EVERY == 0 or done == schedule.num_steps:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            state = {"modules": modules.state_dict(), "optimizers": saved, "step": done}
            write_whole(file, partial(torch.save, state))
            if measure is not None:
                modules.eval()
                with torch.no_grad():
                    accuracy = {key: round(value, 4) for key, value in measure().items()}
                _append(log, {"step": done, "accuracy": accuracy})
                modules.train()
    modules.eval()


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    """Compute products in bfloat16 on a CPU that supports it; fused attention is slow there in the backward pass."""
    if resolve_dtype("auto", "cpu") != torch.bfloat16:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _append(path: Path, entry: Mapping[str, object]) -> None:
    logger.info("%s", entry)
    append_jsonl(path, entry)
