"""How long a run is, where its epochs end, and what is due after a step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RunLength", "is_due"]


def is_due(every: int, before: int, after: int) -> bool:
    """Return whether a step that led from one iteration to another has passed a multiple of `every`; 0 is never."""
    # A step may take several iterations, so a multiple can lie within it.
    return every > 0 and before // every < after // every


@dataclass(frozen=True)
class RunLength:
    """The iterations of a run.

    Args:
        max_epoch, iters_per_epoch: epochs, and iterations of each.
        accum_grad_iters: iterations of a step of the optimizer.
    """

    max_epoch: int
    iters_per_epoch: int
    accum_grad_iters: int

    @property
    def num_iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        return self.max_epoch * self.iters_per_epoch

    def step_size(self, iteration: int) -> int:
        """Return how many iterations the step has that begins at `iteration`.

        Steps end at multiples of `accum_grad_iters`, counted from the start of the epoch, and at the end of the epoch.
        So a run that goes on with another `accum_grad_iters` comes by the same ends of epochs.
        """
        done = iteration % self.iters_per_epoch
        to_multiple = self.accum_grad_iters - done % self.accum_grad_iters
        return min(to_multiple, self.iters_per_epoch - done)

    def ends_epoch(self, iteration: int) -> bool:
        """Return whether an epoch ends after so many iterations."""
        return iteration > 0 and iteration % self.iters_per_epoch == 0

    def epoch(self, iteration: int) -> int:
        """Return the number, from 0, of the epoch that the last of so many iterations belongs to."""
        return max(iteration - 1, 0) // self.iters_per_epoch
