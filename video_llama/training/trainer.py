"""The training loop: both stages, both branches, one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from video_llama.checkpoints.adapters import without_wrapper
from video_llama.config import Config
from video_llama.conversation import conv_templates
from video_llama.data.batches import Batch, BatchReader, load_batches
from video_llama.data.build import EncodedDataset, build_batch_reader, build_datasets, index_shards
from video_llama.data.templates import bind_template
from video_llama.errors import ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.registry import MODELS
from video_llama.training.checkpoints import TrainingState, archive_later_checkpoints, save_checkpoint
from video_llama.training.exporter import Exporter
from video_llama.training.features import FeatureFiller, fill_cache, open_feature_store
from video_llama.training.flops import batch_flops
from video_llama.training.learner import Learner, StepOutput, prepare_model
from video_llama.training.metric_logger import MetricLogger
from video_llama.training.model_selection import ModelSelection, combine
from video_llama.training.monitor import StepTotals, TrainWindow, build_monitor, device_peak_flops
from video_llama.training.processes import build_accelerator, describe_processes, from_main_process, is_sharded
from video_llama.training.progress import RunLength, is_due
from video_llama.training.reach import Reach, check_reach, sends_images_to_audio
from video_llama.training.resume import agree_on_checkpoint, check_shared_folder, start_or_restore
from video_llama.training.settings import check_settings
from video_llama.training.torch_settings import CompiledLayers, check_compiler, prepare_determinism, training_switches
from video_llama.training.validation import ValidationReport, validate
from video_llama.utils.devices import set_seed

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one configuration.

    A step depends on the weights, the optimizer's state, the seed and the iteration alone. So a run that was killed
    and goes on from its last checkpoint ends with the same bits as one that was not: on a CPU, or on a GPU with
    `run.deterministic`, without which a GPU adds up in any order.

    Args:
        config: all of it; `run.output_dir` gets the log and the checkpoints.
        model, datasets: to train, and to train on, instead of what the configuration describes.
        for_features: only the feature cache will be filled.

    Raises:
        ConfigError, CheckpointError, DatasetError: whatever is wrong with the configuration and what it names.
    """

    _stop_signal: int | None = None
    # The reader that batches come from now.
    _reader: BatchReader | None = None

    def __init__(
        self,
        config: Config,
        *,
        model: VideoLlama | None = None,
        datasets: list[EncodedDataset] | None = None,
        for_features: bool = False,
    ) -> None:
        self.config, run = config, config.run
        # Everything that can be wrong with the configuration is found before anything large is loaded.
        check_settings(config)
        if run.deterministic:
            prepare_determinism()
        dtype = config.model.dtype if model is None else model.model.video_branch.encoder_dtype
        self.accelerator = build_accelerator(run, dtype)
        if run.compile:
            check_compiler(self.accelerator)
        self.folder = Path(run.output_dir).expanduser()
        # Neither filling the cache nor validating a model as configured concerns a run that the folder may hold.
        leaves_run_alone = for_features or (run.evaluate and run.resume_ckpt_path is None)
        self._resumed_from: Path | None = None
        if not leaves_run_alone:
            check_shared_folder(self.accelerator, self.folder)
            checkpoints = self.folder / "checkpoints"
            self._resumed_from = agree_on_checkpoint(self.accelerator, run.resume_ckpt_path, checkpoints)
        self.metric_logger = MetricLogger(self.accelerator, self.folder, exclusive=not leaves_run_alone)
        if datasets is None:
            index_shards(config, self.accelerator.process_index, self.accelerator.num_processes)
            self.accelerator.wait_for_everyone()

        images_as_audio = sends_images_to_audio(config)
        has_model = model is not None
        if datasets is None and not leaves_run_alone:
            check_reach(config, Reach.of_sections(config), has_model=has_model)
        # Weights that no checkpoint holds start from random values.
        set_seed(run.seed)
        if model is None:
            model = self._build_model(images_as_audio)
        self.processor, self.model = model.processor, without_wrapper(model.model)
        prepare_model(self.model, config, self._is_sharded)

        self._filler: FeatureFiller | None = None
        store = open_feature_store(config.features, self.model, images_as_audio=images_as_audio)
        if store is not None:
            self._filler = FeatureFiller(self.model, store, self.accelerator.device, self._is_sharded)
        self.datasets: list[EncodedDataset] = datasets or []
        self.valid_datasets: list[EncodedDataset] = []
        if datasets is None:
            common: dict[str, Any] = {"images_as_audio": images_as_audio, "features": store}
            self.datasets = build_datasets(config, self.processor, training=True, **common)
            self.valid_datasets = build_datasets(config, self.processor, training=False, **common)
            if not leaves_run_alone:
                check_reach(config, Reach.of_datasets(config, self.datasets), has_model=has_model)
        if self.datasets:
            # What loads the run's folder asks in the template that was learnt.
            self.config = bind_template(config, self.processor, self.datasets[0].encoder.text.template)

        self.length = self._run_length()
        compiled = CompiledLayers(self.model) if run.compile else None
        # The schedule needs the length of an epoch as a number.
        counted = dataclasses.replace(run, iters_per_epoch=self.length.iters_per_epoch)
        self.learner = Learner(self.accelerator, self.model, counted, self._filler, compiled)
        self._monitor = build_monitor(config, self.datasets, self.accelerator, self.metric_logger)
        self._exporter = Exporter(self.accelerator, self.folder, self.model, self.learner.model, self.config)
        self._selection = ModelSelection(run, self.length, self._exporter, self.metric_logger)
        self.state = start_or_restore(
            self._resumed_from, config, self.datasets, self.length, self.learner, self.accelerator
        )
        self._peak_flops = device_peak_flops(self.accelerator)

    @property
    def num_iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        return self.length.num_iterations

    @property
    def _is_sharded(self) -> bool:
        return is_sharded(self.accelerator)

    def batches(self) -> BatchReader:
        """Return the batches of the whole run, by number, as this process sees them."""
        return build_batch_reader(
            self.config,
            self.datasets,
            self.processor,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def train(self) -> TrainingState:
        """Train from where the run stands to its end.

        A SIGTERM saves a checkpoint and returns early, as `state.iteration` shows.

        Raises:
            DatasetError: more samples are unreadable than `run.max_bad_samples` allows.
            TrainingStopped: a loss that is not finite, with `run.on_nan: stop`.
            CheckpointError: a checkpoint cannot be written.
        """
        with self._catch_sigterm(), self._switches():
            self.metric_logger.open(self.config)
            processes = describe_processes(self.accelerator)
            logger.info("training with %s", processes)
            # Not before training begins: a start that fails moves nothing.
            self._archive_later_checkpoints()
            event = "start" if self._resumed_from is None else "resume"
            self.metric_logger.log(event, self.state.iteration, processes=processes)
            try:
                self._selection.settle(self.state)
                self._catch_up_on_validation()
                self._run()
            finally:
                self.metric_logger.close()
        return self.state

    def step(self, group: list[Batch]) -> StepOutput:
        """Learn from one batch, or from the `accum_grad_iters` batches whose gradients are summed.

        Raises:
            DatasetError, TrainingStopped: as `train`.
        """
        with self._switches():
            return self._step(group)[0]

    def evaluate(self, datasets: Iterable[EncodedDataset] | None = None) -> dict[str, ValidationReport]:
        """Validate on some datasets, by default on all that have a validation split, and log the figures."""
        run, iteration = self.config.run, self.state.iteration
        reports = {}
        note_bad = functools.partial(self.metric_logger.log_bad_samples, iteration=iteration, split="validation")
        for dataset in self.valid_datasets if datasets is None else datasets:
            with self._switches():
                report = validate(
                    self.accelerator,
                    self.learner.model,
                    dataset,
                    self.processor.tokenizer,
                    batch_size=run.batch_size_eval,
                    max_batches=run.max_valid_batches,
                    num_generations=run.num_generations,
                    num_workers=run.num_workers,
                    seed=run.seed,
                    note_bad=note_bad,
                    filler=self._filler,
                    stop_strings=conv_templates[self.processor.conv_template].stop_strings,
                )
            values = dataclasses.asdict(report)
            self.metric_logger.log_answers(iteration, values.pop("answers"))
            self.metric_logger.log("valid", iteration, dataset=dataset.name, **values)
            logger.info("validation on %s: %s", dataset.name, values)
            reports[dataset.name] = report
        if datasets is None and len(reports) > 1:
            overall = combine([dataclasses.asdict(report) for report in reports.values()])
            self.metric_logger.log("validation", iteration, **dataclasses.asdict(overall))
        return reports

    def cache_features(self) -> tuple[int, int]:
        """Fill the feature cache with every media file of every dataset; see `fill_cache`.

        Raises:
            ConfigError: the configuration names no cache (`features.dir`).
        """
        if self._filler is None:
            raise ConfigError("features.dir must be set to cache features")
        datasets = [*self.datasets, *self.valid_datasets]
        note_bad = functools.partial(self.metric_logger.log_bad_samples, iteration=0)
        return fill_cache(self.accelerator, self._filler, datasets, note_bad, self.config.run.num_workers)

    def save(self) -> None:
        """Write a training checkpoint, and remove those that are too many."""
        scaler = self.accelerator.scaler
        self.state.scaler = None if scaler is None else scaler.state_dict()
        if self._reader is not None and self._reader.feed is not None:
            self.state.streams = gather_object([self._reader.feed.places(self.state.iteration)])
        save_checkpoint(
            self.folder / "checkpoints",
            self.learner.model,
            self.learner.optimizer,
            self.state,
            keep=self.config.run.keep_checkpoints,
            writes=self.accelerator.is_main_process,
        )
        self.metric_logger.log("save", self.state.iteration)
        self.accelerator.wait_for_everyone()

    def _archive_later_checkpoints(self) -> None:
        """Move away what the run wrote later, if it goes back to an earlier checkpoint named by its path."""
        if self.config.run.resume_ckpt_path in (None, "auto") or self._resumed_from is None:
            return
        if self.accelerator.is_main_process:
            iteration, per_epoch = self.state.iteration, self.length.iters_per_epoch
            # The best weights may be those of a later iteration, too.
            best = self._exporter.best_iteration() or 0
            later = [self._exporter.best_file] * (best > iteration)
            archive = archive_later_checkpoints(self.folder, self._resumed_from, iteration, per_epoch, later)
            if archive is not None:
                logger.warning("what was written after iteration %d is in %s now", iteration, archive)
                self.metric_logger.log("abandon", iteration, folder=archive.name)
        self.accelerator.wait_for_everyone()

    def _build_model(self, images_as_audio: bool) -> VideoLlama:
        options: dict[str, Any] = {"for_training": True, "trainable_dtype": torch.float32}
        options |= {"device": self.accelerator.device, "audio_from_images": images_as_audio}
        model: VideoLlama = MODELS.get(self.config.model.arch)(self.config.model, **options)
        return model

    def _run_length(self) -> RunLength:
        """Return the length of the run; without `run.iters_per_epoch` an epoch is one pass over the data."""
        run = self.config.run
        per_epoch = run.iters_per_epoch
        if per_epoch is None and self.datasets:
            # The batches of one epoch are counted, so the number of epochs does not matter here.
            per_epoch = len(self.batches()) // run.max_epoch
        return RunLength(run.max_epoch, per_epoch or 1, run.accum_grad_iters)

    def _switches(self) -> contextlib.AbstractContextManager[None]:
        return training_switches(self.accelerator, self.config.run.deterministic)

    def _run(self) -> None:
        run = self.config.run
        left = range(self.state.iteration, self.num_iterations)
        is_on_gpu = self.accelerator.device.type == "cuda"
        self._reader = self.batches()
        # With another number of processes their shares are others, and are found by reading from the start.
        places = dict(enumerate(self.state.streams)).get(self.accelerator.process_index)
        batches = load_batches(self._reader, left, run.num_workers, pin_memory=is_on_gpu, places=places)
        is_shown = self.accelerator.is_main_process
        window = TrainWindow.going_on(self.state.window)
        self.state.window = window.kept()
        with tqdm(total=self.num_iterations, initial=left.start, disable=not is_shown, unit="it") as bar:
            while self.state.iteration < self.num_iterations and not self._selection.stops_early(self.state):
                waited = time.perf_counter()
                before = self.state.iteration
                group = list(itertools.islice(batches, self.length.step_size(before)))
                window.data_seconds += time.perf_counter() - waited
                # Before the step: what it encodes for the cache would no longer be counted after it.
                if self._peak_flops is not None:
                    window.flops += sum(batch_flops(self.model.config, batch) for batch in group if not batch.gave_up)
                output, totals = self._step(group)
                window.add(output, totals, group)
                bar.update(len(group))
                speed = f"{window.samples_per_second:.1f}/s"
                bar.set_postfix(loss=f"{output.loss:.4f}", lr=f"{output.lr:.2e}", samples=speed)
                iteration = self.state.iteration
                is_log_due = is_due(run.log_freq, before, iteration) or self.length.ends_epoch(iteration)
                if is_log_due or totals.stops:
                    self._log(window)
                    window = TrainWindow()
                    self.state.window = window.kept()
                if self._after_step(before, must_stop=bool(totals.stops)):
                    # Saving and validating do not count as training time.
                    window.started = time.perf_counter()
                if totals.stops:
                    return

    def _step(self, group: list[Batch]) -> tuple[StepOutput, StepTotals]:
        totals = self._monitor.count(group, self.state, must_stop=self._stop_signal is not None)
        output = self.learner.step(group, self.state.iteration, totals.tokens)
        if output.is_skipped:
            samples = [id_ for batch in group for id_ in batch.ids]
            self.metric_logger.log("skip", self.state.iteration, loss=str(output.loss), samples=samples)
        self.state.iteration += len(group)
        return output, totals

    def _log(self, window: TrainWindow) -> None:
        iteration, device = self.state.iteration, self.accelerator.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        summary = window.summary(self.num_iterations - iteration, peak_flops=self._peak_flops, memory=memory)
        epoch = self.length.epoch(iteration)
        self.metric_logger.log("train", iteration, epoch=epoch, samples_bad=self.state.samples_bad, **summary)

    def _after_step(self, before: int, must_stop: bool) -> bool:
        """Export, save and validate where it is due after the step from iteration `before`; return whether it was.

        After a SIGTERM a validation that is due is left to the run that goes on.
        """
        run, iteration = self.config.run, self.state.iteration
        epoch_ends = self.length.ends_epoch(iteration)
        # Before the checkpoint: a run that goes on from there does not come by this iteration again.
        if epoch_ends:
            self._exporter.export(self.length.epoch(iteration), iteration)
        # Saved before each validation, so that a run that is killed during it catches up on it.
        is_validation_due = epoch_ends or is_due(run.valid_freq, before, iteration)
        self.state.validation_due = is_validation_due and bool(self.valid_datasets)
        is_save_due = must_stop or epoch_ends or self.state.validation_due or is_due(run.save_freq, before, iteration)
        if is_save_due:
            self.save()
        if must_stop:
            self.metric_logger.log("stop", iteration, reason="SIGTERM")
            logger.info("stopped by SIGTERM at iteration %d; the checkpoint is written", iteration)
        elif self.state.validation_due:
            self._validate({})
        return is_save_due

    def _catch_up_on_validation(self) -> None:
        """Validate as the run should have, where it was stopped before it could."""
        if self.state.validation_due and self.valid_datasets:
            # Only the main process has the log.
            self._validate(from_main_process(lambda: self.metric_logger.validations(self.state.iteration)))
        self.state.validation_due = False

    def _validate(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        """Validate, and let the selection of the best weights take it in.

        Args:
            done: figures of the log, of datasets that this was done for; of all together by the name "".
        """
        reports = self.evaluate([dataset for dataset in self.valid_datasets if dataset.name not in done])
        figures = {**done, **{name: dataclasses.asdict(report) for name, report in reports.items()}}
        self._selection.note(self.state, [figures[dataset.name] for dataset in self.valid_datasets], "" in done)

    @contextlib.contextmanager
    def _catch_sigterm(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self._stop_signal = number

        try:
            before = signal.signal(signal.SIGTERM, note)
        except ValueError:
            # Only the main thread may catch signals; who runs us in another one has other ways to stop.
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
