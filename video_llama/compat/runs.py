"""Tasks, runners and processes as the original's `train.py` uses them; all of it ends in `Trainer`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from video_llama.compat.settings import Config
from video_llama.training.optim import Schedule, StepSchedule
from video_llama.training.trainer import Trainer

__all__ = [
    "LinearWarmupCosineLRScheduler",
    "LinearWarmupStepLRScheduler",
    "RunnerBase",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "now",
    "setup_logger",
    "setup_task",
]

LinearWarmupCosineLRScheduler = Schedule
LinearWarmupStepLRScheduler = StepSchedule


class _Task:
    """What `setup_task` returns. Its `Trainer` is built once, with datasets and model, by whatever asks first."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    def trainer(self, cfg: Config) -> Trainer:
        """Return the trainer of a configuration; errors as of `Trainer`."""
        if self._trainer is None:
            self._trainer = Trainer(cfg.configuration)
        return self._trainer

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Return the training split of each dataset by name; `Trainer` encodes the samples itself."""
        names = list(cfg.configuration.datasets)
        return {name: {"train": data} for name, data in zip(names, self.trainer(cfg).datasets, strict=True)}

    def build_model(self, cfg: Config) -> Any:
        """Return the model that will be trained, on its device and with what is frozen frozen."""
        return self.trainer(cfg).model


class RunnerBase:
    """The training loop.

    Args:
        cfg: the configuration.
        task: from `setup_task`; it holds model and datasets.
        model, datasets, job_id: what `task` returned, and a name of the run; the run's folder is `run.output_dir`.
    """

    def __init__(
        self,
        cfg: Config,
        task: _Task,
        model: Any = None,
        datasets: Mapping[str, Any] | None = None,
        job_id: str | None = None,
    ) -> None:
        self.trainer = task.trainer(cfg)
        if model is not None and model is not self.trainer.model:
            raise ValueError("model is none of this task: pass what task.build_model(cfg) returned")

    def train(self) -> None:
        """Train to the end, from a checkpoint if `run.resume_ckpt_path` says so; errors as of `Trainer.train`."""
        if self.trainer.config.run.evaluate:
            self.trainer.evaluate()
        else:
            self.trainer.train()


def setup_task(cfg: Config) -> _Task:
    """Return the task of a configuration; both kinds of the original train alike."""
    return _Task()


def init_distributed_mode(args: Any) -> None:
    """Do nothing: `Trainer` joins the processes that torchrun or accelerate launch started."""


def get_rank() -> int:
    """Return the number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the first process."""
    return get_rank() == 0


def is_dist_avail_and_initialized() -> bool:
    """Return whether the run has several processes."""
    return get_world_size() > 1


def setup_logger() -> None:
    """Show the log of the training, in the first process only."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("training", "data", "compat"):
        logging.getLogger(f"video_llama.{name}").setLevel(level)


def now() -> str:
    """Return the local time as a name for a run: year, month, day, hour and minute, `202611271530`."""
    return datetime.now().strftime("%Y%m%d%H%M")
