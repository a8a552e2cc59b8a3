"""The training loop: both stages, both branches, one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm import tqdm

from video_llama.config import Config
from video_llama.data.batches import Batch, BatchReader, Failure, SampleReader, load_batches, load_samples
from video_llama.data.build import EncodedDataset, build_batch_reader, build_datasets
from video_llama.errors import ConfigError, DatasetError, VideoLlamaError
from video_llama.model.inference import VideoLlama
from video_llama.model.trained_run import checkpoint_name
from video_llama.registry import MODELS, SCHEDULES
from video_llama.training.checkpoints import (
    TrainingState,
    find_checkpoint,
    gather_trainable,
    load_checkpoint,
    save_checkpoint,
    write_file,
)
from video_llama.training.export import original_checkpoint
from video_llama.training.features import FeatureFiller, open_feature_store
from video_llama.training.logbook import Logbook
from video_llama.training.optim import build_optimizer
from video_llama.training.processes import build_accelerator, describe_processes, sum_over_processes
from video_llama.training.stages import freeze_for_training, trained_branches
from video_llama.training.validation import validate
from video_llama.utils.utils import set_seed

__all__ = ["Step", "Trainer", "TrainingStopped"]

logger = logging.getLogger(__name__)

# Samples that must have been seen before their share of bad ones is taken at its word.
_FIRST_WINDOW = 1000


class TrainingStopped(VideoLlamaError):
    """A loss that is not a number."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What became of one step of the optimizer.

    Args:
        loss: mean cross-entropy over all answer tokens of all processes.
        norm: of the gradient, before it was clipped.
        lr: the learning rate.
        tokens, samples: answer tokens and samples of all processes.
        is_last: a process was told to stop.
    """

    loss: float
    norm: float
    lr: float
    tokens: float
    samples: float
    is_last: bool


@dataclasses.dataclass
class _Totals:
    """Sums over all processes of what one step learns from."""

    tokens: float
    samples: float
    bad: float
    stops: float


class Trainer:
    """One run of one configuration.

    A step is a pure function of the weights, the optimizer's state and the seed, so a run that was killed and goes
    on from its last checkpoint ends with the same bits as one that was not.

    Args:
        config: all of it; `run.output_dir` gets the log and the checkpoints.
        model: a model to train in the place of the one that the configuration describes.
        datasets: examples to train on in the place of those that the configuration describes.

    Raises:
        ConfigError, CheckpointError, DatasetError: whatever is wrong with the configuration and what it names.
    """

    def __init__(
        self, config: Config, *, model: VideoLlama | None = None, datasets: list[EncodedDataset] | None = None
    ) -> None:
        self.config, run = config, config.run
        self._check(config)
        trains = trained_branches(config.model)
        self.accelerator = build_accelerator(run, find_unused_parameters=trains.video and trains.audio)
        self.folder = Path(run.output_dir).expanduser()
        evaluates_start = run.evaluate and run.resume_ckpt_path is None
        checkpoints = self.folder / "checkpoints"
        self._resume_from = None if evaluates_start else find_checkpoint(run.resume_ckpt_path, checkpoints)
        self.logbook = Logbook(self.accelerator, self.folder)
        as_sound = trains.audio and any(
            section.data_type != "audio" and not name.startswith("messages")
            for name, section in config.datasets.items()
        )
        set_seed(run.seed)  # what no checkpoint holds starts from random values
        if model is None:
            build = MODELS.get(config.model.arch)
            model = build(
                config.model,
                device=self.accelerator.device,
                for_training=True,
                audio_from_images=as_sound,
                trainable_dtype=torch.float32,
            )
        self.processor = model.processor
        self.model = model.model
        freeze_for_training(self.model, trains)
        if config.model.use_grad_checkpoint:
            self.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        store = open_feature_store(config.features, self.model, images_as_sound=as_sound)
        self._filler = None
        if store is not None:
            is_sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            self._filler = FeatureFiller(self.model, store, self.accelerator.device, is_sharded)
        self.datasets, self.valid_datasets = datasets or [], []
        if datasets is None:
            self.datasets, self.valid_datasets = (
                build_datasets(config, self.processor, training=training, images_as_sound=as_sound, features=store)
                for training in (True, False)
            )
        optimizer = build_optimizer(self.model, lr=run.init_lr, weight_decay=run.weight_decay, beta2=run.beta2)
        self._schedule = SCHEDULES.build(
            run.lr_sched,
            init_lr=run.init_lr,
            min_lr=run.min_lr,
            warmup_lr=run.warmup_lr,
            warmup_steps=run.warmup_steps,
            lr_decay_rate=run.lr_decay_rate,
            max_epoch=run.max_epoch,
            iters_per_epoch=run.iters_per_epoch,
        )
        self._wrapped, self._optimizer = self.accelerator.prepare(self.model, optimizer)
        self.state = TrainingState(
            seed=run.seed,
            batch_size=run.batch_size_train,
            world_size=self.accelerator.num_processes,
            accum_grad_iters=run.accum_grad_iters,
        )
        self._stop_signal: int | None = None
        if self._resume_from is not None:
            self._restore(self._resume_from)

    @staticmethod
    def _check(config: Config) -> None:
        run = config.run
        for name in ("max_epoch", "iters_per_epoch", "batch_size_train", "accum_grad_iters", "log_freq"):
            if getattr(run, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, but is {getattr(run, name)}")
        if run.iters_per_epoch % run.accum_grad_iters or run.save_freq % run.accum_grad_iters:
            raise ConfigError("run.iters_per_epoch and run.save_freq must be multiples of run.accum_grad_iters")
        if not 0 <= run.max_bad_samples <= 1:
            raise ConfigError(f"run.max_bad_samples is a share from 0 to 1, not {run.max_bad_samples}")

    @property
    def num_iterations(self) -> int:
        """Of the whole run."""
        return self.config.run.max_epoch * self.config.run.iters_per_epoch

    def train(self) -> TrainingState:
        """Train from where the run stands to its end.

        A SIGTERM saves a checkpoint and returns early: `state.iteration` tells.

        Raises:
            DatasetError: more samples are unreadable than `run.max_bad_samples` allows.
            TrainingStopped: a loss that is not finite, with `run.on_nan: stop`.
            CheckpointError: a checkpoint cannot be written or read.
        """
        with self._catch_sigterm():
            self.logbook.open(self.config)
            processes = describe_processes(self.accelerator)
            logger.info("training with %s", processes)
            event = "start" if self._resume_from is None else "resume"
            self.logbook.write(event, self.state.iteration, processes=processes)
            try:
                self._run()
            finally:
                self.logbook.close()
        return self.state

    def batches(self) -> BatchReader:
        """The batches of the whole run, by number, as this process sees them."""
        return build_batch_reader(
            self.config,
            self.datasets,
            self.processor,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def evaluate(self) -> dict[str, Any]:
        """Validate on every dataset that has a validation split, and log the figures: {dataset: report}."""
        reports = {}
        for dataset in self.valid_datasets:
            run = self.config.run
            report = validate(
                self.accelerator,
                self._wrapped,
                dataset,
                self.processor.tokenizer,
                batch_size=run.batch_size_eval,
                max_batches=run.max_valid_batches,
                num_generations=run.num_generations,
                filler=self._filler,
            )
            values = {key: value for key, value in dataclasses.asdict(report).items() if key != "answers"}
            self.logbook.write("valid", self.state.iteration, dataset=dataset.name, **values)
            self.logbook.answers(self.state.iteration, report.answers)
            logger.info("validation on %s: %s", dataset.name, values)
            reports[dataset.name] = report
        return reports

    def _restore(self, path: Path) -> None:
        wanted = self.state
        self.state = load_checkpoint(path, self._wrapped, self._optimizer.optimizer)
        for name in ("seed", "batch_size", "world_size", "accum_grad_iters"):
            before, now = getattr(self.state, name), getattr(wanted, name)
            if before != now:
                logger.warning("%s was %s and is %s now: the order of samples differs from here on", name, before, now)
                setattr(self.state, name, now)
        logger.info("going on from %s", path)

    def _run(self) -> None:
        run = self.config.run
        batches = load_batches(self.batches(), range(self.state.iteration, self.num_iterations), run.num_workers)
        bar = tqdm(
            total=self.num_iterations,
            initial=self.state.iteration,
            disable=not self.accelerator.is_main_process,
            unit="it",
        )
        log = _Window()
        with bar:
            while self.state.iteration < self.num_iterations:
                waited = time.perf_counter()
                group = list(itertools.islice(batches, run.accum_grad_iters))
                log.data_seconds += time.perf_counter() - waited
                step = self.step(group)
                log.steps.append(step)
                log.num_iterations += len(group)
                bar.update(len(group))
                bar.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.lr:.2e}")
                if self.state.iteration % run.log_freq < len(group):
                    self._log(log)
                    log = _Window()
                if step.is_last:
                    self._save()
                    self.logbook.write("stop", self.state.iteration, reason="SIGTERM")
                    logger.info("stopped by SIGTERM at iteration %d; the checkpoint is written", self.state.iteration)
                    return
                if self._after_step():
                    log.started = time.perf_counter()  # saving and validating are no part of the training's speed

    def _after_step(self) -> bool:
        """Save, export and validate where it is due; whether it was."""
        run, iteration = self.config.run, self.state.iteration
        epoch_ends = iteration % run.iters_per_epoch == 0
        is_due = epoch_ends or bool(run.save_freq and iteration % run.save_freq == 0)
        if epoch_ends:
            self._export(iteration // run.iters_per_epoch - 1)
        if is_due:
            self._save()
        if epoch_ends:
            self.evaluate()
        return is_due

    def cache_features(self) -> tuple[int, int]:
        """Fill the feature cache with every media file of every dataset, shared by all processes.

        Returns:
            (items encoded now, samples that cannot be used) of this process. What was there stays, so a run that was
            stopped goes on.

        Raises:
            ConfigError: the configuration names no cache (`features.dir`).
        """
        if self._filler is None:
            raise ConfigError("features.dir must be set to cache features")
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        num_encoded = num_bad = 0
        for dataset in [*self.datasets, *self.valid_datasets]:
            reader = SampleReader(dataset.examples, dataset.encoder)
            indices = range(rank, len(reader), world_size)
            samples = load_samples(reader, indices, self.config.run.num_workers)
            is_quiet = not self.accelerator.is_main_process
            for sample in tqdm(samples, dataset.name, len(indices), unit="file", disable=is_quiet):
                if isinstance(sample, Failure):
                    self.logbook.quarantine([sample], self.state.iteration)
                    num_bad += 1
                else:
                    num_encoded += self._filler(sample.media)
        self.accelerator.wait_for_everyone()
        return num_encoded, num_bad

    def step(self, group: list[Batch]) -> Step:
        """Learn from one batch, or from the `accum_grad_iters` batches whose gradients are summed.

        Returns:
            what became of it.

        Raises:
            DatasetError, TrainingStopped: as `train`.
        """
        totals = self._agree(group)
        # The rate of the group's last iteration, as where every iteration sets it and the last one steps.
        lr = self._schedule.lr(self.state.iteration + len(group) - 1)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = lr
        loss, norm = self._learn(group, totals)
        self.state.iteration += len(group)
        return Step(loss, norm, lr, totals.tokens, totals.samples, is_last=totals.stops > 0)

    def _agree(self, group: list[Batch]) -> _Totals:
        """Sum up over all processes, and stop if too many samples were bad."""
        failures = [failure for batch in group for failure in batch.failures]
        self.logbook.quarantine(failures, self.state.iteration)
        tokens = float(sum(batch.num_label_tokens for batch in group))
        samples = float(sum(len(batch.ids) for batch in group))
        stops = float(self._stop_signal is not None)
        totals = _Totals(*sum_over_processes(self.accelerator, [tokens, samples, float(len(failures)), stops]))
        self.state.samples_seen += int(totals.samples + totals.bad)
        self.state.samples_bad += int(totals.bad)
        if totals.bad:
            self._check_bad_samples()
        return totals

    def _check_bad_samples(self) -> None:
        num_examples = sum(len(dataset.examples) for dataset in self.datasets)
        window = max(self.state.samples_seen, min(num_examples, _FIRST_WINDOW))
        limit = self.config.run.max_bad_samples
        if self.state.samples_bad > limit * window:
            self.accelerator.wait_for_everyone()
            bad = self.logbook.quarantined()
            shown = "".join(f"\n  {line}" for line in bad[:20])
            more = f"\n  and {len(bad) - 20} more in {self.folder / 'quarantine.jsonl'}" if len(bad) > 20 else ""
            raise DatasetError(
                f"{self.state.samples_bad} of {self.state.samples_seen} samples cannot be used, more than "
                f"run.max_bad_samples ({limit:.2%}) allows:{shown}{more}"
            )

    def _learn(self, group: list[Batch], totals: _Totals) -> tuple[float, float]:
        """One step of the optimizer: mean loss over all answer tokens of all processes, and the gradient's norm."""
        self._wrapped.train()
        self._seed_step()
        loss_sum = 0.0
        for number, batch in enumerate(group):
            is_last = number == len(group) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._wrapped):
                # Gradients are averaged over processes; weighed so, they are those of the mean over all tokens.
                share = batch.num_label_tokens / totals.tokens
                loss = self._loss(batch)
                self.accelerator.backward(loss * (share * self.accelerator.num_processes))
            loss_sum += float(loss.detach()) * share
        loss_mean = sum_over_processes(self.accelerator, [loss_sum])[0]
        norm = self._clip()
        if math.isfinite(loss_mean) and math.isfinite(norm):
            self._optimizer.step()
        else:
            self._on_nan(group, loss_mean, norm)
        self._optimizer.zero_grad(set_to_none=True)
        return loss_mean, norm

    def _loss(self, batch: Batch) -> Tensor:
        if self._filler is not None:
            self._filler(batch.media)
        inputs = batch.model_inputs(self.accelerator.device)
        return self._wrapped(**inputs, use_cache=False).loss

    def _clip(self) -> float:
        limit = self.config.run.max_grad_norm
        parameters = [parameter for parameter in self._wrapped.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded norm
        return 0.0 if norm is None else float(norm)

    def _on_nan(self, group: list[Batch], loss: float, norm: float) -> None:
        what = f"iteration {self.state.iteration}: loss {loss}, gradient norm {norm}"
        ids = ", ".join(id_ for batch in group for id_ in batch.ids)
        if self.accelerator.scaler is not None and math.isfinite(loss):
            self._optimizer.step()  # float16 overflowed: the scaler skips the step and lowers its scale
            return
        if self.config.run.on_nan == "stop":
            raise TrainingStopped(
                f"{what}; samples {ids}. Lower the learning rate, set run.max_grad_norm, or leave such steps out by "
                f"run.on_nan=skip"
            )
        logger.warning("%s: the step is skipped; samples %s", what, ids)
        self.logbook.write("skip", self.state.iteration, loss=str(loss), samples=ids)

    def _seed_step(self) -> None:
        """Dropout depends on the seed, the step and the process, and on nothing that a stop would lose."""
        run, rank = self.config.run, self.accelerator.process_index
        entropy = np.random.SeedSequence([run.seed, self.state.iteration, rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)

    def _log(self, window: _Window) -> None:
        run, iteration = self.config.run, self.state.iteration
        values = window.summary()
        self.logbook.write(
            "train",
            iteration,
            epoch=(iteration - 1) // run.iters_per_epoch,
            samples_bad=self.state.samples_bad,
            eta_seconds=round((self.num_iterations - iteration) * values["seconds"] / window.num_iterations),
            **values,
        )

    def _save(self) -> None:
        save_checkpoint(
            self.folder / "checkpoints",
            self._wrapped,
            self._optimizer.optimizer,
            self.state,
            keep=self.config.run.keep_checkpoints,
            writes=self.accelerator.is_main_process,
        )
        self.logbook.write("save", self.state.iteration)
        self.accelerator.wait_for_everyone()

    def _export(self, epoch: int) -> None:
        """`checkpoint_EPOCH.pth` in the original's layout, which `ckpt` / `ckpt_2` and other projects read."""
        trained = gather_trainable(self._wrapped)
        if self.accelerator.is_main_process:
            content = original_checkpoint(self.model, trained, self.config, epoch)
            write_file(self.folder / checkpoint_name(epoch), content)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _catch_sigterm(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self._stop_signal = number

        try:
            before = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not in the main thread: whoever runs us there has its own way to stop
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass
class _Window:
    """What happened since the last line of the log."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    num_iterations: int = 0
    data_seconds: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def summary(self) -> dict[str, float]:
        """Means over the window, and speeds."""
        seconds = time.perf_counter() - self.started
        count = len(self.steps)
        return {
            "loss": sum(step.loss for step in self.steps) / count,
            "grad_norm": sum(step.norm for step in self.steps) / count,
            "lr": self.steps[-1].lr,
            "samples_per_second": round(sum(step.samples for step in self.steps) / seconds, 3),
            "answer_tokens_per_second": round(sum(step.tokens for step in self.steps) / seconds, 1),
            "data_seconds": round(self.data_seconds, 3),
            "seconds": round(seconds, 3),
        }
