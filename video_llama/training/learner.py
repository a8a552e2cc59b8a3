"""One step of the optimizer, from batches to changed weights."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from video_llama.config import RunConfig
from video_llama.data.batches import Batch
from video_llama.errors import VideoLlamaError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration, find_placeholders
from video_llama.training.compiling import CompiledLayers
from video_llama.training.features import FeatureFiller
from video_llama.training.optim import Schedule

__all__ = ["Learner", "Step", "TrainingStopped", "teaching_inputs"]

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20


class TrainingStopped(VideoLlamaError):
    """A loss that is not a number."""


@dataclass(frozen=True)
class Step:
    """What became of one step of the optimizer.

    Args:
        loss: mean cross-entropy over all answer tokens of all processes.
        norm: of the gradient, before it was clipped.
        lr: the learning rate.
        is_skipped: loss or gradient were not finite, and the weights are as they were.
    """

    loss: float
    norm: float
    lr: float
    is_skipped: bool = False


def teaching_inputs(batch: Batch, config: VideoLlamaConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of the model for its loss on a batch, which is padded on the right.

    What the CPU knows of the ids and labels is found out there, so that nothing waits for a GPU. There is no attention
    mask: a causal model never looks ahead to padding, and without a mask its attention takes its fastest way.

    Args:
        batch: from `DataCollator`.
        config: of the model, for the ids of placeholders.
        device: where the model computes.
    """
    inputs: dict[str, Any] = batch.model_inputs(device)
    del inputs["attention_mask"]
    inputs["labels"] = batch.text["labels"]
    placeholders = find_placeholders(batch.text["input_ids"], config)
    return {**inputs, "placeholders": placeholders, "answers_only": True, "use_cache": False}


class Learner:
    """A model with its optimizer, on one process or many.

    A step is a pure function of the weights, the optimizer's state, the batches and (seed, iteration, process), so
    that a run can be continued as if it had never stopped.

    Args:
        accelerator: shares the work.
        model: with the parameters that train set to require gradients.
        optimizer: over those parameters.
        schedule: the learning rate of each iteration.
        run: clipping, and what to do about a loss that is not a number.
        filler: encodes media whose features are cached; None encodes within the model.
        compiled: layers of the model that run compiled while it learns; None for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: VideoLlamaForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        run: RunConfig,
        filler: FeatureFiller | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._inner = model
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self._trained: dict[str, list[nn.Parameter]] = {}  # by the part of the model that holds them
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = name.removeprefix("module.").partition(".")[0]
                self._trained.setdefault(part, []).append(parameter)
        self.model.train()
        self._schedule = schedule
        self._run = run
        self._filler = filler
        self._compiled = compiled
        self._skipped_in_a_row = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """As it was given, without accelerate's wrapper."""
        optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        return optimizer

    def step(self, group: Sequence[Batch], iteration: int, num_tokens: float) -> Step:
        """Learn from one batch, or from several whose gradients are summed.

        Args:
            group: this process's batches.
            iteration: of the first of them.
            num_tokens: answer tokens of all batches of all processes; the loss is the mean over them.

        Raises:
            TrainingStopped: loss or gradient are not finite, with `run.on_nan: stop`, or again and again.
        """
        if not self._inner.training:  # a validation came between
            self.model.train()
        self._seed(iteration)
        # The rate of the group's last iteration, as where every iteration sets it and the last one steps.
        lr = self._schedule.lr(iteration + len(group) - 1)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = lr
        with contextlib.nullcontext() if self._compiled is None else self._compiled.in_use():
            loss_sum = self._backward(group, num_tokens)
        norm_of_all = self._clip().to(loss_sum)
        loss, norm = torch.stack([loss_sum, norm_of_all]).tolist()  # the one moment that waits for a GPU
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        overflowed = self._accelerator.scaler is not None and math.isfinite(loss)
        if is_finite or overflowed:  # after an overflow of float16 the scaler skips the step and lowers its scale
            self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            self._complain(group, iteration, loss, norm)
        self._optimizer.zero_grad(set_to_none=True)
        return Step(loss, norm, lr, is_skipped=not is_finite)

    def _backward(self, group: Sequence[Batch], num_tokens: float) -> Tensor:
        """Sum up the gradients; the mean loss over all answer tokens of all processes, (), float64."""
        losses: list[Tensor] = []
        for number, batch in enumerate(group):
            is_last = number == len(group) - 1
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self.model):
                # Gradients are averaged over processes; weighed so, they are those of the mean over all tokens.
                share = batch.num_label_tokens / num_tokens
                loss = self._loss(batch)
                self._accelerator.backward(loss * (share * self._accelerator.num_processes))
            losses.append(loss.detach().double() * share)
        total = torch.stack(losses).sum()
        if self._accelerator.num_processes > 1:
            total = self._accelerator.reduce(total, "sum")
        return total

    def _loss(self, batch: Batch) -> Tensor:
        if self._filler is not None:
            self._filler(batch.media)
        inputs = teaching_inputs(batch, self._inner.config, self._accelerator.device)
        loss: Tensor = self.model(**inputs).loss
        if self._accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return loss
        # A batch may have no media for what trains, as talk without pictures has none. Then nothing would reach those
        # parameters, and the other processes would wait for their gradients: they are zero.
        unreached = self._unreached(batch)
        return loss + sum(parameter.sum() for parameter in unreached) * 0.0 if unreached else loss

    def _unreached(self, batch: Batch) -> list[nn.Parameter]:
        """Parameters that train and that no medium of the batch leads to."""
        seen = {"video_branch" if item.name == "pixel_values" else "audio_branch" for item in batch.media}
        return [parameter for part, held in self._trained.items() if part not in seen for parameter in held]

    def _clip(self) -> Tensor:
        """Clip the gradient if the run wants it; its norm before, ()."""
        limit = self._run.max_grad_norm
        parameters = [parameter for held in self._trained.values() for parameter in held]
        norm = self._accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded norm
        return torch.as_tensor(0.0 if norm is None else norm)

    def _complain(self, group: Sequence[Batch], iteration: int, loss: float, norm: float) -> None:
        ids = ", ".join(id_ for batch in group for id_ in batch.ids)
        what = f"iteration {iteration}: loss {loss}, gradient norm {norm}; samples {ids}"
        if self._run.on_nan == "stop":
            raise TrainingStopped(
                f"{what}. Lower the learning rate, set run.max_grad_norm, or leave such steps out by run.on_nan=skip"
            )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingStopped(
                f"{what}. {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped: the weights themselves may be broken. "
                "Lower the learning rate, set run.max_grad_norm, or go on from an earlier checkpoint "
                "(run.resume_ckpt_path)"
            )
        logger.warning("%s: the step is skipped", what)

    def _seed(self, iteration: int) -> None:
        """Dropout depends on the seed, the iteration and the process, and on nothing that a stop would lose."""
        entropy = np.random.SeedSequence([self._run.seed, iteration, self._accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
