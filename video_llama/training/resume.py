"""Go on with a run: one checkpoint for all processes, and a comparison with what the run was before."""

from __future__ import annotations

import dataclasses
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from video_llama.config import Config
from video_llama.data.build import EncodedDataset
from video_llama.errors import CheckpointError, ConfigError
from video_llama.training.checkpoints import TrainingState, checkpoint_identity, find_checkpoint, load_checkpoint
from video_llama.training.learner import Learner
from video_llama.training.processes import from_main_process
from video_llama.training.progress import RunLength
from video_llama.utils.files import make_folder

__all__ = [
    "agree_on_checkpoint",
    "check_same_run",
    "check_shared_folder",
    "describe_run",
    "report_differences",
    "start_or_restore",
]

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# Keys of `run` that change neither the weights nor which samples they learn from.
_WITHOUT_EFFECT = {
    "output_dir", "resume_ckpt_path", "evaluate", "num_workers", "batch_size_eval", "log_freq", "save_freq",
    "valid_freq", "keep_checkpoints", "max_bad_samples", "max_valid_batches", "num_generations", "trackers", "project",
    "run_name", "early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end", "world_size",
    "dist_url", "distributed", "task", "runner",
}  # fmt: skip
_MAX_SHOWN = 20
# A network file system may show a new file a little later to other machines.
_LOOKS, _SECONDS_BETWEEN = 10, 0.5


def agree_on_checkpoint(accelerator: Accelerator, resume: str | None, folder: Path) -> Path | None:
    """Return the checkpoint that all processes go on from: the main process chooses it, and all of them have it.

    Args:
        resume, folder: see `find_checkpoint`.

    Raises:
        CheckpointError: as `find_checkpoint`; or a process does not see that checkpoint, or sees another one there.
    """
    chosen = from_main_process(lambda: find_checkpoint(resume, folder))
    if chosen is None or accelerator.num_processes == 1:
        return chosen
    seen = _gather((socket.gethostname(), checkpoint_identity(chosen)))
    expected = seen[0][1]
    for process, (host, identity) in enumerate(seen):
        if identity == expected:
            continue
        what = "is not there" if identity is None else "is another one there"
        raise CheckpointError(
            f"{chosen}: process 0 on {seen[0][0]} goes on from this checkpoint, but for process {process} on {host} it "
            f"{what}. All nodes need the same run.output_dir, on a shared file system"
        )
    return chosen


def check_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """Check that all processes see the folder that the main process writes to; it is made if it is not there.

    Raises:
        ConfigError: they do not, so that a run could not go on after a stop.
    """
    if accelerator.num_processes == 1:
        return
    host = socket.gethostname()
    # A new name, which no machine has looked up before and remembers as absent.
    name = from_main_process(lambda: f".shared-{uuid.uuid4().hex}")
    if accelerator.is_main_process:
        make_folder(folder, "run.output_dir")
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = _gather((host, _appears(folder / name)))
    if accelerator.is_main_process:
        (folder / name).unlink(missing_ok=True)
    blind = [f"process {process} on {place}" for process, (place, sees) in enumerate(seen) if not sees]
    if blind:
        raise ConfigError(
            f"run.output_dir: {folder} of process 0 on {seen[0][0]} is not the folder of that name for "
            f"{', '.join(blind[:_MAX_SHOWN])}. All nodes need one run.output_dir, on a shared file system (NFS, "
            f"Lustre, …): checkpoints are written by process 0 and read by all"
        )


def _appears(path: Path) -> bool:
    for look in range(_LOOKS):
        if look:
            time.sleep(_SECONDS_BETWEEN)
        if path.exists():
            return True
    return False


def start_or_restore(
    path: Path | None,
    config: Config,
    datasets: Sequence[EncodedDataset],
    length: RunLength,
    learner: Learner,
    accelerator: Accelerator,
) -> TrainingState:
    """Return the state that a run begins with: a new one, or that of the checkpoint, which the learner gets.

    Raises:
        CheckpointError: as `load_checkpoint`.
        ConfigError: the processes differ, or the run had epochs of another length.
    """
    run, num_processes = config.run, accelerator.num_processes
    settings = describe_run(config, datasets, num_processes, length.iters_per_epoch)
    check_same_run(accelerator, settings)
    order = {
        "seed": run.seed,
        "batch_size": run.batch_size_train,
        "world_size": num_processes,
        "accum_grad_iters": run.accum_grad_iters,
    }
    if path is None:
        return TrainingState(**order, settings=settings)
    state = load_checkpoint(path, learner.model, learner.optimizer)
    # Checkpoints of older versions have these four only.
    before = state.settings or {
        "run.seed": state.seed,
        "run.batch_size_train": state.batch_size,
        "processes": state.world_size,
        "run.accum_grad_iters": state.accum_grad_iters,
    }
    report_differences(path, before, settings)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    logger.info("going on from %s", path)
    return dataclasses.replace(state, **order, settings=settings)


def describe_run(
    config: Config, datasets: Sequence[EncodedDataset], num_processes: int, iters_per_epoch: int
) -> dict[str, Any]:
    """Return everything that the result of a run depends on, by dotted key, as values of JSON.

    Of the examples of a dataset there is their number and a digest, which changes with their texts, paths and order.
    """
    described: dict[str, Any] = {"processes": num_processes}
    for key, value in _leaves(dataclasses.asdict(config)):
        section, _, name = key.partition(".")
        if section != "run" or name not in _WITHOUT_EFFECT:
            described[key] = value
    # The number itself, also where it is that of one pass over the data.
    described |= {"run.iters_per_epoch": iters_per_epoch, "whole passes": config.run.iters_per_epoch is None}
    for dataset in datasets:
        described[f"datasets.{dataset.name}: number of samples"] = len(dataset.examples)
        described[f"datasets.{dataset.name}: digest of annotations and paths"] = dataset.examples.digest()
    return described


def check_same_run(accelerator: Accelerator, described: Mapping[str, Any]) -> None:
    """Check that all processes train the same run on as many samples; only paths may differ from node to node.

    Args:
        described: of this process, from `describe_run`.

    Raises:
        ConfigError: they do not.
    """
    if accelerator.num_processes == 1:
        return
    counted = {key: value for key, value in described.items() if key.startswith("run.") or key.endswith("of samples")}
    seen = _gather((socket.gethostname(), counted))
    for process, (host, other) in enumerate(seen):
        lines = list(_differences(seen[0][1], other, f"on {seen[0][0]}", f"for process {process} on {host}"))
        if lines:
            raise ConfigError(f"the processes of this run differ: {'; '.join(lines[:_MAX_SHOWN])}")


def report_differences(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn, once, of all that a run was other before the checkpoint that it goes on from.

    Args:
        path: of the checkpoint.
        before, now: from `describe_run`.

    Raises:
        ConfigError: its epochs have another length now.
    """
    lines = list(_differences(before, now, "before", "now"))
    listed = "; ".join(lines[:_MAX_SHOWN])
    if len(lines) > _MAX_SHOWN:
        listed += f"; and {len(lines) - _MAX_SHOWN} more"
    # Iterations count the epochs: files, schedule and validation would be those of other epochs.
    if before.get("run.iters_per_epoch", now["run.iters_per_epoch"]) != now["run.iters_per_epoch"]:
        raise ConfigError(
            f"{path}: its run had epochs of {before['run.iters_per_epoch']} iterations, and this configuration makes "
            f"them {now['run.iters_per_epoch']}, so that epochs, learning rates and checkpoint_N.pth would no longer "
            f"fit together ({listed}). Keep what differs, or begin a new run.output_dir with model.ckpt"
        )
    if lines:
        logger.warning("going on from %s with other settings or data, so the run ends differently: %s", path, listed)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], then: str, today: str) -> Iterator[str]:
    for key, value in now.items():
        # A checkpoint of an older version lacks keys that came later.
        if key in before and before[key] != value:
            yield f"{key} is {before[key]!r} {then} and {value!r} {today}"
    counts = [{key for key in described if key.endswith("of samples")} for described in (before, now)]
    if counts[0]:
        yield from (f"{key.partition(':')[0]} is only there {then}" for key in sorted(counts[0] - counts[1]))
        yield from (f"{key.partition(':')[0]} is only there {today}" for key in sorted(counts[1] - counts[0]))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _gather(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their numbers."""
    # accelerate joins lists, so each process gives a list of one.
    gathered: list[Value] = gather_object([value])
    return gathered
