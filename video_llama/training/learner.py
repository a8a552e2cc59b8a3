"""One step of the optimizer, from batches to changed weights."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from video_llama.checkpoints.adapters import add_lora, check_adapters
from video_llama.config import Config, RunConfig
from video_llama.data.batches import Batch
from video_llama.data.sample_processor import MediaInput
from video_llama.errors import ConfigError, VideoLlamaError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.parts import (
    adapted_parts,
    adapter_layers,
    enable_checkpointing,
    freeze_for_training,
    trained_parts,
)
from video_llama.model.placeholders import find_placeholders
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.training.features import FeatureFiller
from video_llama.training.media_kinds import complete_media
from video_llama.training.optim import build_optimizer, build_schedule
from video_llama.training.processes import is_sharded
from video_llama.training.torch_settings import CompiledLayers

__all__ = ["Learner", "StepOutput", "TrainingStopped", "prepare_model", "teaching_inputs"]

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
_BRANCHES = ("video_branch", "audio_branch")


class TrainingStopped(VideoLlamaError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class StepOutput:
    """The result of one step of the optimizer.

    Args:
        loss: mean cross-entropy over all answer tokens of all processes.
        norm: of the gradient, before it was clipped.
        lr: the learning rate.
        is_skipped: loss or gradient were not finite, and the weights did not change.
        shares: what each batch of the group contributes to the loss, which is their sum.
    """

    loss: float
    norm: float
    lr: float
    is_skipped: bool = False
    shares: Sequence[float] = ()


def teaching_inputs(batch: Batch, config: VideoLlamaConfig, device: torch.device) -> dict[str, Any]:
    """Return the model's arguments for its loss on a batch, which is padded on the right.

    Placeholders are found on the CPU, where the ids are, so that nothing waits for a GPU. There is no attention mask:
    a causal model never attends to padding on the right, and without a mask its attention takes the fastest kernel.
    """
    inputs: dict[str, Any] = batch.model_inputs(device)
    del inputs["attention_mask"]
    inputs["labels"] = batch.text["labels"]
    placeholders: list[Tensor | None] = list(find_placeholders(batch.text["input_ids"], config))
    for item in batch.along:
        # None: computed, and put nowhere.
        placeholders[_BRANCHES.index(_branch_of(item))] = None
    return {**inputs, "placeholders": placeholders, "answers_only": True, "use_cache": False}


def _reached_branches(batch: Batch) -> set[str]:
    """Return the branches that the media of a batch lead to, by their names in the model."""
    return {_branch_of(item) for item in batch.media}


def _branch_of(item: MediaInput) -> str:
    return "video_branch" if item.name == "pixel_values" else "audio_branch"


def prepare_model(model: VideoLlamaForConditionalGeneration, config: Config, is_sharded: bool) -> None:
    """Add the adapters that a configuration names, and let only its parts train.

    Raises:
        ConfigError: adapters that cannot train as they are.
    """
    adapted = adapted_parts(config.lora, config.model)
    if adapted:
        add_lora(model, config.lora, adapted)
    check_adapters(model)
    freeze_for_training(model, trained_parts(config.model))
    if is_sharded:
        if adapter_layers(model):
            raise ConfigError("adapters (lora) do not train with FSDP or DeepSpeed: start the run with torchrun")
        # Processes may have different numbers of frames, but all must run the encoders equally often.
        model.set_chunk_size(None)
    if config.model.use_grad_checkpoint:
        enable_checkpointing(model)


class Learner:
    """A model with its optimizer, on one process or many.

    A step is a pure function of the weights, the optimizer's state, the batches and (seed, iteration, process), so
    that a run can be continued as if it had never stopped.

    Args:
        model: with the parameters that train set to require gradients.
        run: names the optimizer's rates, the schedule, clipping, and what to do about a loss that is not finite.
        filler: encodes media whose features are cached; None encodes within the model.
        compiled: layers of the model that run compiled in a step; None for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: VideoLlamaForConditionalGeneration,
        run: RunConfig,
        filler: FeatureFiller | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._run = run
        self._filler = filler
        self._compiled = compiled
        self._schedule = build_schedule(run)
        optimizer = build_optimizer(
            model,
            lr=run.init_lr,
            weight_decay=run.weight_decay,
            beta2=run.beta2,
            is_scaled=accelerator.scaler is not None,
            part_lr=run.part_lr,
        )
        # Kept here, because a checkpoint brings the rates of its own step along.
        self._rate_factors = [group["lr"] / run.init_lr if run.part_lr else 1.0 for group in optimizer.param_groups]
        # `prepare` may wrap the model. The plain one is kept for its configuration and its mode.
        self._inner = model
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        # Trained parameters by what of the model holds them: a branch, language_model. Not before `prepare`,
        # which may replace parameters by this process's share of them.
        self._trained: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = to_saved_name(name.removeprefix("module.")).partition(".")[0]
                self._trained.setdefault(part, []).append(parameter)
        self.model.train()
        self._skipped_in_a_row = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer as it was given, without accelerate's wrapper."""
        optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        return optimizer

    def step(self, group: Sequence[Batch], iteration: int, num_tokens: float) -> StepOutput:
        """Learn from one batch, or from several whose gradients are summed.

        Args:
            group: this process's batches.
            iteration: of the first of them.
            num_tokens: answer tokens of all batches of all processes; the loss is the mean over them.

        Raises:
            TrainingStopped: loss or gradient are not finite, with `run.on_nan: stop`, or again and again.
        """
        # A validation since the last step has left the model in evaluation mode.
        if not self._inner.training:
            self.model.train()
        self._seed(iteration)
        # The rate of the group's last iteration: the original sets a rate at every iteration and steps at the last.
        lr = self._schedule.lr(iteration + len(group) - 1)
        for parameters, factor in zip(self._optimizer.param_groups, self._rate_factors, strict=True):
            parameters["lr"] = lr * factor
        with contextlib.ExitStack() as context:
            if self._compiled is not None:
                context.enter_context(self._compiled.in_use())
            sums = self._backward(group, num_tokens)
        # `tolist` is the only place in a step that waits for a GPU.
        first = torch.stack([sums[: len(group)].sum(), self._clip().to(sums)])
        loss, norm, *rest = torch.cat([first, sums]).tolist()
        shares, led_to = rest[: len(group)], rest[len(group) :]
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        # After an overflow of float16 the scaler itself skips the step, and lowers its scale.
        overflowed = self._accelerator.scaler is not None and math.isfinite(loss)
        if is_finite or overflowed:
            self._forget_gradients(branch for branch, number in zip(_BRANCHES, led_to, strict=True) if not number)
            self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            self._report_skip(group, f"iteration {iteration}: loss {loss}, gradient norm {norm}")
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutput(loss, norm, lr, not is_finite, shares)

    def _backward(self, group: Sequence[Batch], num_tokens: float) -> Tensor:
        """Sum up the gradients, and return what all processes have in common.

        Returns:
            (batches + branches,), float64: the share of each batch in the mean loss over all answer tokens; how many
            batches led to each branch.
        """
        losses: list[Tensor] = []
        for number, batch in enumerate(group, start=1):
            with contextlib.ExitStack() as context:
                # Processes exchange gradients once, with the last batch.
                earlier: Sequence[Batch] = group[:-1]
                if number < len(group):
                    earlier = ()
                    context.enter_context(self._accelerator.no_sync(self.model))
                # Gradients are averaged over processes. With these weights the average is the gradient of the mean
                # over all answer tokens of all processes, however they are spread.
                share = batch.num_label_tokens / num_tokens
                loss = self._loss(batch, earlier)
                # A process that only computes along has no tokens, and so no mean.
                if not share:
                    loss = loss.nan_to_num()
                # There is nothing to learn where no process has media for what trains.
                if loss.requires_grad:
                    self._accelerator.backward(loss * (share * self._accelerator.num_processes))
            losses.append(loss.detach().double() * share)
        # A batch that only computes along, without tokens to learn, gives no gradient.
        reached = [_reached_branches(batch) for batch in group if batch.num_label_tokens]
        led_to = [float(sum(branch in branches for branches in reached)) for branch in _BRANCHES]
        sums = torch.cat([torch.stack(losses), torch.tensor(led_to, dtype=torch.float64, device=losses[0].device)])
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, "sum")
        return sums

    def _loss(self, batch: Batch, earlier: Sequence[Batch]) -> Tensor:
        """Return the loss of a batch; `earlier` are those whose gradients are exchanged with its own."""
        if self._filler is not None:
            self._filler(batch.media)
        complete_media(self._accelerator, batch, earlier)
        loss: Tensor = self.model(**teaching_inputs(batch, self._inner.config, self._accelerator.device)).loss
        if is_sharded(self._accelerator):
            return loss
        # A batch of plain text leads to no branch. DDP would wait for the gradients of the branch that trains, so they
        # are made zero instead of absent.
        for branch in set(_BRANCHES) - _reached_branches(batch):
            for parameter in self._trained.get(branch, ()):
                loss = loss + parameter.sum() * 0.0
        return loss

    def _forget_gradients(self, branches: Iterable[str]) -> None:
        """Take the gradients away from branches that no batch of any process led to.

        They are zero, and with a gradient of zero the optimizer would still decay the weights, and move them on by what
        it remembers of earlier steps.
        """
        for branch in branches:
            for parameter in self._trained.get(branch, ()):
                parameter.grad = None

    def _clip(self) -> Tensor:
        """Clip the gradient to `run.max_grad_norm`, if that is set; return its norm before, ()."""
        limit = self._run.max_grad_norm
        if limit is None:
            # Without a limit nothing is clipped, but the norm is still needed: it is logged and checked.
            limit = math.inf
        parameters = [parameter for held in self._trained.values() for parameter in held]
        norm = self._accelerator.clip_grad_norm_(parameters, limit)
        if hasattr(norm, "full_tensor"):
            # The norm of sharded gradients is sharded, too.
            norm = norm.full_tensor()
        return torch.as_tensor(0.0 if norm is None else norm)

    def _report_skip(self, group: Sequence[Batch], what: str) -> None:
        """Warn of a step that is skipped; stop the run if `run.on_nan` says so, or after too many in a row."""
        what = f"{what}; samples {', '.join(id_ for batch in group for id_ in batch.ids)}"
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
        """Seed dropout from the run's seed, the iteration and the process, which a resumed run knows, too."""
        entropy = np.random.SeedSequence([self._run.seed, iteration, self._accelerator.process_index])
        # torch takes signed numbers, so the seed is shifted to stay below 2^63.
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
