"""Keep the best weights of a run by their validation loss, and stop early when it no longer falls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from video_llama.config import RunConfig
from video_llama.training.checkpoints import TrainingState
from video_llama.training.exporter import Exporter
from video_llama.training.metric_logger import MetricLogger
from video_llama.training.processes import from_main_process
from video_llama.training.progress import RunLength

__all__ = ["ModelSelection", "OverallFigures", "combine", "note_validation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OverallFigures:
    """Figures over all validation sets: means over all answer tokens, and sums of samples."""

    loss: float
    token_accuracy: float
    num_samples: int
    num_bad: int


def combine(figures: Sequence[Mapping[str, Any]]) -> OverallFigures:
    """Return the figures over all validation sets, from those of each as the log has them."""
    tokens = sum(line["num_tokens"] for line in figures)
    # Weighted by tokens, the mean is that of one set with all their samples.
    loss, accuracy = (
        sum(line[key] * line["num_tokens"] for line in figures) / tokens for key in ("loss", "token_accuracy")
    )
    samples, bad = (sum(line[key] for line in figures) for key in ("num_samples", "num_bad"))
    return OverallFigures(loss, accuracy, samples, bad)


def note_validation(state: TrainingState, loss: float, threshold: float) -> bool:
    """Note a validation in the state of a run; return whether its loss is the lowest so far.

    Args:
        loss: one that is not a number is never the lowest.
        threshold: by how much a loss must be lower for the count of validations without improvement to start again.
    """
    best = state.best_loss
    is_best = loss == loss and (best is None or loss < best)
    state.early_stopping_counter += 1
    if is_best and (best is None or loss < best - threshold):
        state.early_stopping_counter = 0
    if is_best:
        state.best_loss, state.best_iteration = loss, state.iteration
    return is_best


class ModelSelection:
    """Keep the best weights, and decide when a run stops early.

    Args:
        run: with the patience and the threshold of early stopping.
        length: of the run.
        exporter: writes the best weights.
        metric_logger: gets a line with the figures over all validation sets.
    """

    def __init__(self, run: RunConfig, length: RunLength, exporter: Exporter, metric_logger: MetricLogger) -> None:
        self._run, self._length = run, length
        self._exporter, self._metric_logger = exporter, metric_logger

    def settle(self, state: TrainingState) -> None:
        """Count the best from here on, if the folder does not hold the best weights that a checkpoint tells of."""
        kept = from_main_process(self._exporter.best_iteration)
        # A run that was killed while it validated has written the best file before a checkpoint could say so.
        if kept == state.best_iteration or (state.validation_due and kept == state.iteration):
            return
        if state.best_iteration is not None:
            logger.warning(
                "the best weights so far (iteration %d) are not in the folder; the best is counted from here on",
                state.best_iteration,
            )
        state.best_loss = state.best_iteration = None
        state.early_stopping_counter = 0

    def note(self, state: TrainingState, figures: Sequence[Mapping[str, Any]], is_logged: bool) -> None:
        """Record a validation; the run's weights are those that were validated.

        Args:
            state: of the run; the validation is no longer due in it.
            figures: of each validation set, always in the same order, so that the sums have the same bits.
            is_logged: the log has the line over all sets already.
        """
        overall = asdict(combine(figures))
        is_best = note_validation(state, overall["loss"], self._run.early_stopping_threshold)
        epoch = self._length.epoch(state.iteration)
        if is_best:
            best = {key: overall[key] for key in ("loss", "token_accuracy")}
            self._exporter.export_best(epoch, state.iteration, **best)
        if not is_logged:
            best = {"is_best": is_best, "best_loss": state.best_loss, "best_iteration": state.best_iteration}
            self._metric_logger.log("validation", state.iteration, **overall, **best)
        state.validation_due = False
        if self.stops_early(state):
            self._metric_logger.log("stop", state.iteration, reason="early stopping")
            logger.info(
                "stopped early at iteration %d, after %d validations without a lower loss; the lowest is that of "
                "iteration %s, %s",
                *(state.iteration, state.early_stopping_counter, state.best_iteration, state.best_loss),
            )
            # The last weights are in a file, too, although their epoch has not ended.
            if not self._length.ends_epoch(state.iteration):
                self._exporter.export(epoch, state.iteration)

    def stops_early(self, state: TrainingState) -> bool:
        """Return whether so many validations were without improvement that the run stops."""
        patience = self._run.early_stopping_patience
        return patience is not None and state.early_stopping_counter >= patience
