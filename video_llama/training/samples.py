"""Count what the data loaders deliver, over all processes, and stop a run whose data cannot be meant to be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from video_llama.data.batches import Batch
from video_llama.errors import DatasetError
from video_llama.training.checkpoints import TrainingState
from video_llama.training.logbook import Logbook
from video_llama.training.processes import sum_over_processes

__all__ = ["SampleCounter", "Totals"]

_SHOWN = 20
_ROUNDING = 1e-12  # of a sum of shares that is just the limit


@dataclass(frozen=True)
class Totals:
    """Sums over all processes of what one step learns from.

    Args:
        tokens: answer tokens.
        samples: samples that can be used.
        bad: samples that were replaced.
        stops: processes that were told to stop.
        text_tokens, positions: of all sequences, media included: without and with padding.
    """

    tokens: float
    samples: float
    bad: float
    stops: float
    text_tokens: float
    positions: float


class SampleCounter:
    """Keeps the counts of a run, and judges its data.

    A sample that cannot be used counts once, however often it is drawn. Bad samples found so far are compared with all
    that the datasets hold: data within the limit never stop a run, however long it goes and in whatever order, and
    others do so in their first round at the latest, the sooner the worse they are.

    Args:
        accelerator: of the run.
        logbook: notes bad samples.
        sizes: the number of examples of each dataset; ids begin with its name.
        shares: of the batches that each dataset gets, in the same order.
        max_bad_share: of what the run draws; past it the run stops.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        logbook: Logbook,
        *,
        sizes: Mapping[str, int],
        shares: Sequence[float],
        max_bad_share: float,
    ) -> None:
        self._accelerator = accelerator
        self._logbook = logbook
        self._num_examples = sum(size for size, share in zip(sizes.values(), shares, strict=True) if share)
        self._weights = {name: share / max(size, 1) for (name, size), share in zip(sizes.items(), shares, strict=True)}
        self._max_bad_share = max_bad_share

    def count(self, group: Sequence[Batch], state: TrainingState, must_stop: bool = False) -> Totals:
        """Add a step's batches to the state's counts.

        Args:
            group: this process's batches.
            must_stop: whether this process was told to stop.

        Raises:
            DatasetError: too many samples were bad; the message lists them.
        """
        failures = [failure for batch in group for failure in batch.failures]
        self._logbook.quarantine(failures, state.iteration)
        sums = [
            float(sum(batch.num_label_tokens for batch in group)),
            float(sum(len(batch.ids) for batch in group)),
            float(len(failures)),
            float(must_stop),
            float(sum(batch.num_text_tokens for batch in group)),
            float(sum(batch.num_positions for batch in group)),
        ]
        totals = Totals(*sum_over_processes(self._accelerator, sums))
        state.samples_seen += int(totals.samples + totals.bad)
        state.samples_bad += int(totals.bad)
        if totals.bad:
            self._add_bad([failure.id for failure in failures], state)
            self._check(state)
        for batch in group:
            if batch.gave_up:
                raise DatasetError(batch.gave_up)
        self._check_is_alike(group)
        return totals

    def _check_is_alike(self, group: Sequence[Batch]) -> None:
        """Sharded weights are put together by all processes at once: for each branch by all of them, or by none.

        Raises:
            DatasetError: some processes have media of a kind that others have not.
        """
        if self._accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return
        num_processes = self._accelerator.num_processes
        kinds = [{item.name == "pixel_values" for item in batch.media} for batch in group]
        present = [float(is_visual in kind) for kind in kinds for is_visual in (True, False)]
        if any(count not in (0, num_processes) for count in sum_over_processes(self._accelerator, present)):
            raise DatasetError(
                "with FSDP or DeepSpeed every batch needs media of the same kinds in every process; keep conversations "
                "with pictures, with sound and without media in datasets of their own, or train with DDP"
            )

    def _add_bad(self, ids: Sequence[str], state: TrainingState) -> None:
        """Add the bad samples of all processes to those that the state knows, the same in every process."""
        new = set(gather_object(list(ids))).difference(state.bad_ids)
        state.bad_ids = sorted([*state.bad_ids, *new])

    def _check(self, state: TrainingState) -> None:
        share = self._share_of(state.bad_ids)
        if share <= self._max_bad_share + _ROUNDING:
            return
        self._accelerator.wait_for_everyone()  # until all have noted theirs
        bad = self._logbook.quarantined()
        shown = "".join(f"\n  {line}" for line in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more in quarantine.jsonl" if len(bad) > _SHOWN else ""
        as_mixed = f"; as the datasets are mixed, {share:.2%} of what is drawn" if len(self._weights) > 1 else ""
        raise DatasetError(
            f"{len(state.bad_ids)} of {self._num_examples} samples cannot be used, more than run.max_bad_samples "
            f"({self._max_bad_share:.2%}) allows{as_mixed}:{shown}{more}"
        )

    def _share_of(self, bad_ids: Sequence[str]) -> float:
        """The share that these have of what the run draws."""
        counts = Counter(id_.partition("/")[0] for id_ in bad_ids)
        of_unknown = 1 / max(self._num_examples, 1)
        return sum(count * self._weights.get(name, of_unknown) for name, count in counts.items())
