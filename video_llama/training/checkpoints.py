"""Training checkpoints: written whole or not at all, found again, and read back exactly.

OUTPUT_DIR/checkpoints/step_00001000/
  trainable.safetensors     what trains, under our names
  optimizer.pt              the optimizer's state, by the same names (with DeepSpeed: its own folder)
  state.json                where the run stood, with the scale of the loss in float16
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from video_llama.checkpoints.trained_run import checkpoint_name
from video_llama.errors import CheckpointError
from video_llama.utils.files import INCOMPLETE, sync, write_whole

__all__ = [
    "TrainingState",
    "archive_later_checkpoints",
    "find_checkpoint",
    "gather_trainable",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "write_file",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_TRAINABLE, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.pt", "state.json"
_DEEPSPEED = "deepspeed"
_NOT_OURS = (SafetensorError, UnpicklingError)


@dataclass
class TrainingState:
    """Where a run stands; everything random follows from the seed and this.

    Args:
        iteration: batches of each process that were learnt from.
        samples_seen, samples_bad: of all processes, each time one was drawn; the unreadable ones included in both.
        bad_ids: which samples cannot be used, each once, sorted.
        seed, batch_size, world_size, accum_grad_iters: what the order of samples depends on.
        validation_due: an epoch has ended here, and what the run validates on was not looked at when this was written.
        scaler: of the loss, in float16: its scale and how long it has held; None in other precisions.
    """

    iteration: int = 0
    samples_seen: int = 0
    samples_bad: int = 0
    bad_ids: list[str] = field(default_factory=list)
    seed: int = 0
    batch_size: int = 0
    world_size: int = 1
    accum_grad_iters: int = 1
    validation_due: bool = False
    scaler: dict[str, float] | None = None


def gather_trainable(model: nn.Module) -> dict[str, Tensor]:
    """Everything that trains, whole and on the CPU, under the model's own names; call it on every process."""
    if _is_deepspeed(model):
        return _gather_from_deepspeed(model)
    if not _is_sharded(model):
        return {name: value.detach().cpu().clone() for name, value in _trainable(model).items()}
    states: dict[str, Any] = get_model_state_dict(model, options=_gathered())
    trains = _trainable(model)  # buffers, which torch gathers too, do not
    return {name: value for name, value in states.items() if name in trains}


def _gather_from_deepspeed(engine: Any) -> dict[str, Tensor]:
    import deepspeed  # only there if it is used

    trainable = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trainable.values())):  # does nothing below ZeRO-3
        return {name: value.detach().cpu().clone() for name, value in trainable.items()}


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, *, keep: int, writes: bool
) -> None:
    """Write a checkpoint and remove the oldest of those up to it.

    Args:
        folder: OUTPUT_DIR/checkpoints.
        model, optimizer: wrapped or not; call this on every process.
        keep: how many checkpoints to keep.
        writes: this is the process that writes.

    Raises:
        CheckpointError: it could not be written; those before it are whole.
    """
    final = folder / f"step_{state.iteration:08d}"
    in_progress = final.with_name(final.name + INCOMPLETE)
    trainable = gather_trainable(model)
    shards_itself = _is_deepspeed(model)
    optimizer_state = None if shards_itself else get_optimizer_state_dict(model, optimizer, options=_gathered())
    with _removed_on_failure(in_progress, final):
        if writes:
            shutil.rmtree(in_progress, ignore_errors=True)
            in_progress.mkdir(parents=True)
        if shards_itself:  # every process writes its share
            torch.distributed.barrier()
            model.save_checkpoint(str(in_progress), tag=_DEEPSPEED, exclude_frozen_parameters=True)  # type: ignore[operator]
            torch.distributed.barrier()
        if not writes:
            return
        save_file({name: value.contiguous() for name, value in trainable.items()}, in_progress / _TRAINABLE)
        if optimizer_state is not None:
            torch.save(optimizer_state, in_progress / _OPTIMIZER)
        (in_progress / _STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        for path in in_progress.rglob("*"):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(in_progress, final)
        sync(folder)
    until_here = [path for path in list_checkpoints(folder) if path.name <= final.name]
    for old in until_here[: -max(keep, 1)]:
        shutil.rmtree(old)


@contextlib.contextmanager
def _removed_on_failure(in_progress: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors wrap the system's errors
        shutil.rmtree(in_progress, ignore_errors=True)
        raise _cannot_be_written(final, error) from error


def _cannot_be_written(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error}); is the disk full? Earlier checkpoints are whole. Make room, then go on "
        f"with --resume (run.resume_ckpt_path=auto)"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).exists())


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `run.resume_ckpt_path` means.

    Args:
        resume: "auto" for the newest of the folder, a path, or None.
        folder: OUTPUT_DIR/checkpoints.

    Raises:
        CheckpointError: no checkpoint at that path, or None although OUTPUT_DIR holds some of a run.
    """
    known = list_checkpoints(folder)
    if resume is None:
        there = known or sorted(folder.parent.glob(checkpoint_name("*")))
        if there:
            raise CheckpointError(
                f"{folder.parent}: holds a run already, up to {there[-1].name}. Go on with it by --resume "
                f"(run.resume_ckpt_path=auto), or choose another run.output_dir"
            )
        return None
    if resume == "auto":
        return known[-1] if known else None
    path = Path(resume).expanduser()
    if (path / _STATE).exists():
        return path
    newest = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not newest:
        raise CheckpointError(f"run.resume_ckpt_path: {path} is no training checkpoint (a folder with state.json)")
    return newest[-1]


def archive_later_checkpoints(folder: Path, resumed: Path, iteration: int, iters_per_epoch: int) -> Path | None:
    """Move what a run wrote after the checkpoint that it goes back to, so that the new course writes over nothing.

    Args:
        folder: the run's `output_dir`.
        resumed: the checkpoint that the run goes on from; it stays.
        iteration: of that checkpoint.
        iters_per_epoch: tells which `checkpoint_EPOCH.pth` are later.

    Returns:
        where they are now: a new folder in `folder`; None if there are none.

    Raises:
        OSError: they cannot be moved.
    """
    written = list_checkpoints(folder / "checkpoints")
    later = [path for path in written if _iteration_of(path) >= iteration and path.resolve() != resumed.resolve()]
    for path in folder.glob(checkpoint_name("*")):
        epoch = path.stem.partition("_")[2]
        if epoch.isdecimal() and (int(epoch) + 1) * iters_per_epoch > iteration:
            later.append(path)
    if not later:
        return None
    aside = folder / f"abandoned-{iteration:08d}-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir(exist_ok=True)
    for path in later:
        os.replace(path, aside / path.name)
    sync(folder)
    return aside


def _iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put a checkpoint back in place; call it on every process.

    Raises:
        CheckpointError: it is damaged, or of a run with other trainable parts.
    """
    try:
        state = TrainingState(**json.loads((path / _STATE).read_text(encoding="utf-8")))
        trainable: dict[str, Any] = load_file(path / _TRAINABLE)
        optimizer_state = None
        if not _is_deepspeed(model):
            optimizer_state = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, *_NOT_OURS) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: damaged or not a training checkpoint ({reason}). Remove it, and --resume takes the one before it"
        ) from error
    _check_names(path, model, trainable)
    if optimizer_state is None:
        model.load_checkpoint(str(path), tag=_DEEPSPEED, load_module_strict=False)  # type: ignore[operator]
        return state
    options = StateDictOptions(full_state_dict=True, strict=False)
    if _is_sharded(model):
        set_model_state_dict(model, trainable, options=options)
    else:
        _copy_into(_trainable(model), trainable, path)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    return state


def _check_names(path: Path, model: nn.Module, trainable: Mapping[str, Any]) -> None:
    differing = sorted(_trainable(model).keys() ^ trainable.keys())
    if differing:
        raise CheckpointError(
            f"{path}: other parts trained there than the configuration names ({len(differing)} parameters differ, "
            f"the first is {differing[0]})"
        )


@torch.no_grad()
def _copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], path: Path) -> None:
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            there, here = tuple(values[name].shape), tuple(parameter.shape)
            raise CheckpointError(f"{path}: {name} has the shape {there} there, and {here} in this configuration")
        parameter.copy_(values[name])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, under its names without the wrapper of DDP."""
    named = model.named_parameters()
    return {name.removeprefix("module."): parameter for name, parameter in named if parameter.requires_grad}


def write_file(path: Path, content: Any) -> None:
    """`torch.save` under a name in progress, then renamed.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        write_whole(path, partial(torch.save, content))
    except (OSError, RuntimeError) as error:
        raise _cannot_be_written(path, error) from error


def _gathered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def _is_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed wraps the model; it has its own way to shard and to save the optimizer."""
    return type(model).__name__ == "DeepSpeedEngine"


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shares the weights out over processes.

    Only then torch's own functions are needed. They walk the state of the whole model, and that of a frozen language
    model in 8 bit names tensors which its layers do not have.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
