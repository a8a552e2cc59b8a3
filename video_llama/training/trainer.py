"""The training loop: both stages, both branches, one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from tqdm import tqdm

from video_llama.checkpoints.trained_run import checkpoint_name
from video_llama.config import Config
from video_llama.conversation import conv_templates
from video_llama.data.batches import Batch, BatchReader, load_batches
from video_llama.data.build import EncodedDataset, build_batch_reader, build_datasets, holds_messages, index_shards
from video_llama.data.mixture import mixture_weights
from video_llama.errors import ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.registry import MODELS
from video_llama.training.backends import prepare_determinism, training_switches
from video_llama.training.checkpoints import (
    TrainingState,
    archive_later_checkpoints,
    find_checkpoint,
    gather_trainable,
    load_checkpoint,
    save_checkpoint,
    write_file,
)
from video_llama.training.compiling import CompiledLayers, check_compiler
from video_llama.training.export import original_checkpoint
from video_llama.training.features import FeatureFiller, fill_cache, open_feature_store
from video_llama.training.flops import batch_flops, peak_flops
from video_llama.training.learner import Learner, Step
from video_llama.training.logbook import Logbook, Window
from video_llama.training.optim import build_optimizer, build_schedule
from video_llama.training.processes import build_accelerator, describe_processes, sum_over_processes
from video_llama.training.samples import SampleCounter, Totals
from video_llama.training.settings import check_settings
from video_llama.training.stages import TrainedParts, freeze_for_training, trained_branches
from video_llama.training.validation import ValidationReport, validate
from video_llama.utils.devices import set_seed

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one configuration.

    What a step does depends on the weights, the optimizer's state, the seed and the iteration alone. So a run that was
    killed and goes on from its last checkpoint ends as one that was not: with the same bits on a CPU, or on a GPU with
    `run.deterministic`, without which a GPU adds up in any order.

    Args:
        config: all of it; `run.output_dir` gets the log and the checkpoints.
        model: a model to train in the place of the one that the configuration describes.
        datasets: examples to train on in the place of those that the configuration describes.
        for_features: only the feature cache will be filled: `run.output_dir` may hold a run, which is left alone.

    Raises:
        ConfigError, CheckpointError, DatasetError: whatever is wrong with the configuration and what it names.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: VideoLlama | None = None,
        datasets: list[EncodedDataset] | None = None,
        for_features: bool = False,
    ) -> None:
        self.config, run = config, config.run
        check_settings(config)
        trains = trained_branches(config.model)
        if run.deterministic:
            prepare_determinism()
        dtype = config.model.dtype if model is None else model.model.video_branch.query_tokens.dtype
        self.accelerator = build_accelerator(run, dtype)
        if run.compile:
            self._check_compiling()
        self.folder = Path(run.output_dir).expanduser()
        resume_from = None if for_features else self._find_checkpoint()
        self.logbook = Logbook(self.accelerator, self.folder)
        if datasets is None:
            index_shards(config, self.accelerator.process_index, self.accelerator.num_processes)
            self.accelerator.wait_for_everyone()
        as_sound = _trains_audio_on_images(config, trains)
        set_seed(run.seed)  # what no checkpoint holds starts from random values
        model = model or self._build_model(as_sound)
        self.processor, self.model = model.processor, model.model
        freeze_for_training(self.model, trains)
        if self._is_sharded:  # each process may have another number of frames, but all must run the encoders together
            self.model.set_chunk_size(None)
        if config.model.use_grad_checkpoint:
            self.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self._filler = self._open_cache(as_sound)
        store = None if self._filler is None else self._filler.store
        self.datasets, self.valid_datasets = datasets or [], []
        if datasets is None:
            self.datasets, self.valid_datasets = (
                build_datasets(config, self.processor, training=training, images_as_audio=as_sound, features=store)
                for training in (True, False)
            )
        optimizer = build_optimizer(
            self.model,
            lr=run.init_lr,
            weight_decay=run.weight_decay,
            beta2=run.beta2,
            is_scaled=self.accelerator.scaler is not None,
        )
        compiled = CompiledLayers(self.model) if run.compile else None
        schedule = build_schedule(run)
        self.learner = Learner(self.accelerator, self.model, optimizer, schedule, run, self._filler, compiled)
        self._counter = self._build_counter()
        self.state = self._start_or_restore(resume_from)
        self._resumed_from = resume_from
        self._stop_signal: int | None = None
        self._peak_flops = self._find_peak()

    @property
    def num_iterations(self) -> int:
        """Of the whole run."""
        return self.config.run.max_epoch * self.config.run.iters_per_epoch

    @property
    def _is_sharded(self) -> bool:
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def batches(self) -> BatchReader:
        """The batches of the whole run, by number, as this process sees them."""
        return build_batch_reader(
            self.config,
            self.datasets,
            self.processor,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def train(self) -> TrainingState:
        """Train from where the run stands to its end.

        A SIGTERM saves a checkpoint and returns early: `state.iteration` tells.

        Raises:
            DatasetError: more samples are unreadable than `run.max_bad_samples` allows.
            TrainingStopped: a loss that is not finite, with `run.on_nan: stop`.
            CheckpointError: a checkpoint cannot be written.
        """
        with self._catch_sigterm(), self._switches():
            self.logbook.open(self.config)
            processes = describe_processes(self.accelerator)
            logger.info("training with %s", processes)
            self._abandon_later_ones()
            event = "start" if self._resumed_from is None else "resume"
            self.logbook.write(event, self.state.iteration, processes=processes)
            try:
                self._catch_up_on_validation()
                self._run()
            finally:
                self.logbook.close()
        return self.state

    def step(self, group: list[Batch]) -> Step:
        """Learn from one batch, or from the `accum_grad_iters` batches whose gradients are summed.

        Raises:
            DatasetError, TrainingStopped: as `train`.
        """
        with self._switches():
            return self._step(group)[0]

    def evaluate(self) -> dict[str, ValidationReport]:
        """Validate on every dataset that has a validation split, and log the figures."""
        with self._switches():
            return self._evaluate(self.valid_datasets)

    def _switches(self) -> contextlib.AbstractContextManager[None]:
        return training_switches(self.accelerator, self.config.run.deterministic)

    def _evaluate(self, datasets: Iterable[EncodedDataset]) -> dict[str, ValidationReport]:
        run, reports = self.config.run, {}
        note_bad = functools.partial(self.logbook.quarantine, iteration=self.state.iteration, split="validation")
        for dataset in datasets:
            report = validate(
                self.accelerator,
                self.learner.model,
                dataset,
                self.processor.tokenizer,
                batch_size=run.batch_size_eval,
                max_batches=run.max_valid_batches,
                num_generations=run.num_generations,
                note_bad=note_bad,
                filler=self._filler,
                stop_strings=conv_templates[self.processor.conv_template].stop_strings,
            )
            values = {key: value for key, value in dataclasses.asdict(report).items() if key != "answers"}
            self.logbook.answers(self.state.iteration, report.answers)
            self.logbook.write("valid", self.state.iteration, dataset=dataset.name, **values)
            logger.info("validation on %s: %s", dataset.name, values)
            reports[dataset.name] = report
        return reports

    def cache_features(self) -> tuple[int, int]:
        """Fill the feature cache with every media file of every dataset; see `fill_cache`.

        Raises:
            ConfigError: the configuration names no cache (`features.dir`).
        """
        if self._filler is None:
            raise ConfigError("features.dir must be set to cache features")
        datasets = [*self.datasets, *self.valid_datasets]
        return fill_cache(self.accelerator, self._filler, datasets, self.logbook, self.config.run.num_workers)

    def save(self) -> None:
        """Write a training checkpoint, and remove those that are too many."""
        scaler = self.accelerator.scaler
        self.state.scaler = None if scaler is None else scaler.state_dict()
        save_checkpoint(
            self.folder / "checkpoints",
            self.learner.model,
            self.learner.optimizer,
            self.state,
            keep=self.config.run.keep_checkpoints,
            writes=self.accelerator.is_main_process,
        )
        self.logbook.write("save", self.state.iteration)
        self.accelerator.wait_for_everyone()

    def _check_compiling(self) -> None:
        if self._is_sharded:
            kind = self.accelerator.distributed_type.value
            raise ConfigError(f"run.compile: with {kind} nothing is compiled; set run.compile: False")
        check_compiler(self.accelerator.device)

    def _find_checkpoint(self) -> Path | None:
        resume = self.config.run.resume_ckpt_path
        if self.config.run.evaluate and resume is None:
            return None  # only what the model section names is looked at
        return find_checkpoint(resume, self.folder / "checkpoints")

    def _abandon_later_ones(self) -> None:
        """A run that goes back to a checkpoint by its path may have gone further before."""
        if self.config.run.resume_ckpt_path in (None, "auto") or self._resumed_from is None:
            return
        if self.accelerator.is_main_process:
            iteration, per_epoch = self.state.iteration, self.config.run.iters_per_epoch
            aside = archive_later_checkpoints(self.folder, self._resumed_from, iteration, per_epoch)
            if aside is not None:
                logger.warning("what was written after iteration %d is in %s now", iteration, aside)
                self.logbook.write("abandon", iteration, folder=aside.name)
        self.accelerator.wait_for_everyone()

    def _build_model(self, as_sound: bool) -> VideoLlama:
        model: VideoLlama = MODELS.get(self.config.model.arch)(
            self.config.model,
            device=self.accelerator.device,
            for_training=True,
            audio_from_images=as_sound,
            trainable_dtype=torch.float32,
        )
        return model

    def _open_cache(self, as_sound: bool) -> FeatureFiller | None:
        store = open_feature_store(self.config.features, self.model, images_as_audio=as_sound)
        if store is None:
            return None
        return FeatureFiller(self.model, store, self.accelerator.device, self._is_sharded)

    def _find_peak(self) -> float | None:
        """What the device does in a second at most, where it computes in half precision and its peak is known."""
        is_half = self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision != "no"
        return peak_flops(torch.cuda.get_device_name(self.accelerator.device)) if is_half else None

    def _build_counter(self) -> SampleCounter:
        sizes = {dataset.name: len(dataset.examples) for dataset in self.datasets}
        ratios = [self.config.datasets[name].sample_ratio for name in sizes]
        shares = mixture_weights(list(sizes.values()), ratios, list(sizes)) if sizes else []
        limit = self.config.run.max_bad_samples
        return SampleCounter(self.accelerator, self.logbook, sizes=sizes, shares=shares, max_bad_share=limit)

    def _start_or_restore(self, path: Path | None) -> TrainingState:
        run = self.config.run
        order = {
            "seed": run.seed,
            "batch_size": run.batch_size_train,
            "world_size": self.accelerator.num_processes,
            "accum_grad_iters": run.accum_grad_iters,
        }
        if path is None:
            return TrainingState(**order)
        state = load_checkpoint(path, self.learner.model, self.learner.optimizer)
        for name, now in order.items():
            before = getattr(state, name)
            if before != now:
                logger.warning("%s was %s and is %s now: the order of samples differs from here on", name, before, now)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        logger.info("going on from %s", path)
        return dataclasses.replace(state, **order)

    def _run(self) -> None:
        run = self.config.run
        left, on_gpu = range(self.state.iteration, self.num_iterations), self.accelerator.device.type == "cuda"
        batches = load_batches(self.batches(), left, run.num_workers, pin_memory=on_gpu)
        bar = tqdm(
            total=self.num_iterations,
            initial=self.state.iteration,
            disable=not self.accelerator.is_main_process,
            unit="it",
        )
        window = Window()
        with bar:
            while self.state.iteration < self.num_iterations:
                waited = time.perf_counter()
                group = list(itertools.islice(batches, run.accum_grad_iters))
                window.data_seconds += time.perf_counter() - waited
                if self._peak_flops is not None:
                    window.flops += sum(batch_flops(self.model.config, batch) for batch in group if not batch.gave_up)
                step, totals = self._step(group)
                self._note(step, totals, len(group), window, bar)
                if self._is_log_due(len(group)) or totals.stops:
                    self._log(window)
                    window = Window()
                if totals.stops:
                    self._stop()
                    return
                if self._after_step():
                    window.started = time.perf_counter()  # saving and validating are no part of the training's speed

    def _step(self, group: list[Batch]) -> tuple[Step, Totals]:
        totals = self._counter.count(group, self.state, must_stop=self._stop_signal is not None)
        step = self.learner.step(group, self.state.iteration, totals.tokens)
        if step.is_skipped:
            samples = [id_ for batch in group for id_ in batch.ids]
            self.logbook.write("skip", self.state.iteration, loss=str(step.loss), samples=samples)
        self.state.iteration += len(group)
        return step, totals

    @staticmethod
    def _note(step: Step, totals: Totals, iterations: int, window: Window, bar: Any) -> None:
        if not step.is_skipped:
            window.losses.append(step.loss)
            window.norms.append(step.norm)
        window.lr = step.lr
        window.tokens += totals.tokens
        window.samples += totals.samples
        window.text_tokens += totals.text_tokens
        window.positions += totals.positions
        window.iterations += iterations
        bar.update(iterations)
        speed = f"{window.samples_per_second:.1f}/s"
        bar.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.lr:.2e}", samples=speed)

    def _is_log_due(self, num_new: int) -> bool:
        """Every `log_freq` iterations, and for those that are left at the end of an epoch."""
        iteration, run = self.state.iteration, self.config.run
        return iteration % run.log_freq < num_new or iteration % run.iters_per_epoch == 0

    def _log(self, window: Window) -> None:
        iteration, device = self.state.iteration, self.accelerator.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        summary = window.summary(self.num_iterations - iteration, peak_flops=self._peak_flops, memory=memory)
        self.logbook.write(
            "train",
            iteration,
            epoch=(iteration - 1) // self.config.run.iters_per_epoch,
            samples_bad=self.state.samples_bad,
            **summary,
        )

    def _after_step(self) -> bool:
        """Save, export and validate where it is due; whether it was."""
        run, iteration = self.config.run, self.state.iteration
        epoch_ends = iteration % run.iters_per_epoch == 0
        is_due = epoch_ends or bool(run.save_freq and iteration % run.save_freq == 0)
        if epoch_ends:
            self._export(iteration // run.iters_per_epoch - 1)
        self.state.validation_due = epoch_ends and bool(self.valid_datasets)
        if is_due:
            self.save()
        if epoch_ends:
            self.evaluate()
            self.state.validation_due = False
        return is_due

    def _catch_up_on_validation(self) -> None:
        """Validate as the end of an epoch should have, where the run was stopped before it could."""
        if not self.state.validation_due:
            return
        done = self.logbook.validated_at(self.state.iteration) if self.accelerator.is_main_process else set()
        is_done = [float(dataset.name in done) for dataset in self.valid_datasets]
        is_done = sum_over_processes(self.accelerator, is_done)  # the main process has the log
        self._evaluate(dataset for dataset, by_now in zip(self.valid_datasets, is_done, strict=True) if not by_now)
        self.state.validation_due = False

    def _stop(self) -> None:
        if self.state.iteration % self.config.run.iters_per_epoch == 0:  # who goes on does not come by here again
            self._export(self.state.iteration // self.config.run.iters_per_epoch - 1)
            self.state.validation_due = bool(self.valid_datasets)
        self.save()
        self.logbook.write("stop", self.state.iteration, reason="SIGTERM")
        logger.info("stopped by SIGTERM at iteration %d; the checkpoint is written", self.state.iteration)

    def _export(self, epoch: int) -> None:
        """`checkpoint_EPOCH.pth` in the original's layout, which `ckpt` / `ckpt_2` and other projects read."""
        trained = gather_trainable(self.learner.model)
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


def _trains_audio_on_images(config: Config, trains: TrainedParts) -> bool:
    """Whether the audio branch trains on pictures, as in the original; messages name their sounds themselves."""
    return trains.audio and any(
        section.data_type != "audio" and not holds_messages(name, section) for name, section in config.datasets.items()
    )
