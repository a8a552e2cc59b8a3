"""Watch the data of a run over all processes, stop a run with too many bad samples, and sum up what a log line says."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from video_llama.config import Config
from video_llama.data.batches import Batch
from video_llama.data.build import EncodedDataset
from video_llama.data.hf_rows import StreamTable
from video_llama.data.mixture import mixture_weights
from video_llama.errors import DatasetError
from video_llama.training.checkpoints import TrainingState
from video_llama.training.flops import peak_flops
from video_llama.training.learner import StepOutput
from video_llama.training.metric_logger import MetricLogger
from video_llama.training.processes import sum_over_processes

__all__ = ["DataMonitor", "StepTotals", "TrainWindow", "build_monitor", "device_peak_flops"]

_MAX_SHOWN = 20
# A sum of shares that equals the limit may come out a little above it.
_ROUNDING = 1e-12
# How many more bad samples of a stream there must be than the limit, in standard deviations of what was drawn.
_DEVIATIONS = 3


@dataclass(frozen=True)
class StepTotals:
    """Sums over all processes of what one step learns from.

    Args:
        tokens: answer tokens.
        samples: samples that can be used.
        bad: samples that were replaced.
        stops: processes that received a SIGTERM.
        text_tokens, positions: of all sequences, media included: without and with padding.
        batch_tokens: answer tokens of each batch of the step.
    """

    tokens: float
    samples: float
    bad: float
    stops: float
    text_tokens: float
    positions: float
    batch_tokens: Sequence[float] = ()


class DataMonitor:
    """Count the samples of a run, and stop it when too many cannot be used.

    A bad sample counts once, however often it is drawn, as a share of all that the datasets hold. So data within the
    limit never stop a run, and worse data do so in the first round through them, the sooner the worse they are.

    Args:
        sizes: the number of examples of each dataset; ids begin with its name.
        streamed: the datasets whose size is not known: what the run drew of them counts in its place.
        shares: of the batches that each dataset gets, in the same order.
        max_bad_share: of what the run draws; past it the run stops.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metric_logger: MetricLogger,
        *,
        sizes: Mapping[str, int],
        shares: Sequence[float],
        streamed: Collection[str] = (),
        max_bad_share: float,
    ) -> None:
        self._accelerator = accelerator
        self._metric_logger = metric_logger
        self._num_examples = 0
        self._weights: dict[str, float] = {}
        self._shares_of_streams: dict[str, float] = {}
        for (name, size), share in zip(sizes.items(), shares, strict=True):
            if name in streamed:
                self._shares_of_streams[name] = share
                continue
            # A bad sample weighs more in a small dataset that is drawn often than in a large one.
            self._weights[name] = share / max(size, 1)
            if share:
                self._num_examples += size
        self._max_bad_share = max_bad_share

    def count(self, group: Sequence[Batch], state: TrainingState, must_stop: bool = False) -> StepTotals:
        """Add a step's batches of all processes to the state's counts.

        Args:
            group: this process's batches.
            must_stop: whether this process received a SIGTERM.

        Raises:
            DatasetError: too many samples were bad; the message lists them.
        """
        failures = [failure for batch in group for failure in batch.failures]
        self._metric_logger.log_bad_samples(failures, state.iteration)
        # One exchange between processes for everything that a step has to sum up.
        sums = [
            float(sum(batch.num_label_tokens for batch in group)),
            float(sum(len(batch.ids) for batch in group)),
            float(len(failures)),
            float(must_stop),
            float(sum(batch.num_text_tokens for batch in group)),
            float(sum(batch.num_positions for batch in group)),
        ]
        sums += [float(batch.num_label_tokens) for batch in group]
        summed = sum_over_processes(self._accelerator, sums)
        head = len(summed) - len(group)
        tokens, samples, bad, stops, text_tokens, positions = summed[:head]
        totals = StepTotals(tokens, samples, bad, stops, text_tokens, positions, summed[head:])
        state.samples_seen += int(totals.samples + totals.bad)
        state.samples_bad += int(totals.bad)
        if totals.bad:
            # The same list on every process, so that all of them stop at the same step.
            gathered = gather_object([failure.id for failure in failures])
            state.bad_ids = sorted({*state.bad_ids, *gathered})
            self._check_bad_share(state.bad_ids, state.samples_seen)
        for batch in group:
            if batch.gave_up:
                raise DatasetError(batch.gave_up)
        return totals

    def _check_bad_share(self, bad_ids: Sequence[str], num_seen: int) -> None:
        counts = Counter(id_.partition("/")[0] for id_ in bad_ids)
        num_drawn = {name: num_seen * share for name, share in self._shares_of_streams.items()}
        for name, share in self._shares_of_streams.items():
            self._weights[name] = share / self._size_of_stream(num_drawn[name])
        num_examples = self._num_examples + int(sum(num_drawn.values()))
        # Ids begin with the name of the dataset. A dataset that the run no longer has counts with an average weight.
        weight_of_unknown = 1 / max(num_examples, 1)
        share = sum(count * self._weights.get(name, weight_of_unknown) for name, count in counts.items())
        if share <= self._max_bad_share + _ROUNDING:
            return
        # The list in the message needs the lines of all processes.
        self._accelerator.wait_for_everyone()
        bad = self._metric_logger.bad_samples()
        lines = [f"\n  {line}" for line in bad[:_MAX_SHOWN]]
        if len(bad) > _MAX_SHOWN:
            lines.append(f"\n  and {len(bad) - _MAX_SHOWN} more in quarantine.jsonl")
        as_mixed = ""
        if len(self._weights) > 1:
            as_mixed = f"; as the datasets are mixed, {share:.2%} of what is drawn"
        raise DatasetError(
            f"{len(bad_ids)} of {num_examples} samples cannot be used, more than run.max_bad_samples "
            f"({self._max_bad_share:.2%}) allows{as_mixed}:{''.join(lines)}"
        )

    def _size_of_stream(self, num_drawn: float) -> float:
        """Return the size that a stream counts with after so many samples: more than these, since chance has a part."""
        if not self._max_bad_share:
            return max(num_drawn, 1)
        # The number of bad samples at the limit has its own root for deviation.
        deviation = math.sqrt(num_drawn * self._max_bad_share)
        return num_drawn + _DEVIATIONS * (deviation + 1) / self._max_bad_share


def build_monitor(
    config: Config, datasets: Sequence[EncodedDataset], accelerator: Accelerator, metric_logger: MetricLogger
) -> DataMonitor:
    """Build the monitor of datasets that are mixed as a configuration says.

    Raises:
        ConfigError: ratios that cannot be mixed.
    """
    sizes = {dataset.name: len(dataset.examples) for dataset in datasets}
    shares: list[float] = []
    if sizes:
        ratios = [config.datasets[name].sample_ratio for name in sizes]
        shares = mixture_weights(list(sizes.values()), ratios, list(sizes))
    limit = config.run.max_bad_samples
    streamed = [dataset.name for dataset in datasets if isinstance(dataset.examples, StreamTable)]
    return DataMonitor(accelerator, metric_logger, sizes=sizes, shares=shares, streamed=streamed, max_bad_share=limit)


@dataclass
class TrainWindow:
    """Sums since the last line of the log.

    Args:
        losses, norms: of every step that was not skipped.
        by_dataset: the sum of the losses of all answer tokens, and their number, by the name of the dataset.
        tokens, samples, text_tokens, positions: see `StepTotals`.
        flops: operations of this process, as `batch_flops` counts them.
        data_seconds: time spent waiting for data.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    by_dataset: dict[str, tuple[float, float]] = field(default_factory=dict)
    lr: float = 0.0
    iterations: int = 0
    tokens: float = 0.0
    samples: float = 0.0
    text_tokens: float = 0.0
    positions: float = 0.0
    flops: float = 0.0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def going_on(cls, kept: Mapping[str, Any]) -> TrainWindow:
        """Return the window that a checkpoint has kept, or an empty one. Speeds begin anew."""
        by_dataset = {name: (loss, count) for name, (loss, count) in kept.get("by_dataset", {}).items()}
        return cls(list(kept.get("losses", ())), list(kept.get("norms", ())), by_dataset)

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as values of JSON that grow with the window."""
        return {"losses": self.losses, "norms": self.norms, "by_dataset": self.by_dataset}

    def add(self, output: StepOutput, totals: StepTotals, group: Sequence[Batch]) -> None:
        """Add a step; `group` are the batches of the main process in it."""
        if not output.is_skipped:
            self.losses.append(output.loss)
            self.norms.append(output.norm)
            self._add_by_dataset(output, totals, group)
        self.lr = output.lr
        self.iterations += len(group)
        self.tokens += totals.tokens
        self.samples += totals.samples
        self.text_tokens += totals.text_tokens
        self.positions += totals.positions

    def _add_by_dataset(self, output: StepOutput, totals: StepTotals, group: Sequence[Batch]) -> None:
        # A process that only computes along has no ids, and is not the one that logs.
        if not all(batch.ids for batch in group):
            return
        for batch, share, tokens in zip(group, output.shares, totals.batch_tokens, strict=True):
            # A batch is of one dataset, with whose name the ids begin.
            name = batch.ids[0].partition("/")[0]
            loss, count = self.by_dataset.get(name, (0.0, 0.0))
            self.by_dataset[name] = (loss + share * totals.tokens, count + tokens)

    @property
    def samples_per_second(self) -> float:
        """Return the samples per second of all processes."""
        return self.samples / max(time.perf_counter() - self.started, 1e-9)

    def summary(self, iterations_left: int, *, peak_flops: float | None, memory: int | None) -> dict[str, Any]:
        """Return the means over the window (None if every step was skipped), speeds, and the time that is left.

        Args:
            iterations_left: of the run.
            peak_flops: operations that the device can do in a second; None leaves out `mfu`, the share of it in use.
            memory: most bytes of the device in use so far; None leaves out `memory_gib`.
        """
        seconds = time.perf_counter() - self.started
        summary: dict[str, Any] = {
            "loss": _mean(self.losses),
            "loss_by_dataset": {name: loss / tokens for name, (loss, tokens) in sorted(self.by_dataset.items())},
            "grad_norm": _mean(self.norms),
            "lr": self.lr,
            "samples_per_second": round(self.samples / seconds, 3),
            "tokens_per_second": round(self.text_tokens / seconds, 1),
            "answer_tokens_per_second": round(self.tokens / seconds, 1),
            "padding_share": round((self.positions - self.text_tokens) / max(self.positions, 1), 4),
            "data_seconds": round(self.data_seconds, 3),
            "data_share": round(self.data_seconds / seconds, 4),
            "seconds": round(seconds, 3),
            "eta_seconds": round(iterations_left * seconds / self.iterations),
        }
        if memory is not None:
            summary["memory_gib"] = round(memory / 2**30, 3)
        if peak_flops is not None:
            summary["mfu"] = round(self.flops / seconds / peak_flops, 4)
        return summary


def device_peak_flops(accelerator: Accelerator) -> float | None:
    """Return the most operations the device does in a second; None unless it is a known GPU in half precision."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    return peak_flops(torch.cuda.get_device_name(accelerator.device))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
