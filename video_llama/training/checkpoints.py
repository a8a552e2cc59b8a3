"""Training checkpoints: written whole or not at all, found again, and read back exactly.

OUTPUT_DIR/checkpoints/step_00001000/
  trainable.safetensors     what trains, under our names
  optimizer.pt              the optimizer's state, by the same names (with DeepSpeed: its own folder)
  state.json                where the run stood, with the scale of the loss in float16
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
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
from torch.distributed.tensor import DTensor

from video_llama.checkpoints.trained_run import adapter_beside, checkpoint_name
from video_llama.errors import CheckpointError
from video_llama.model.weight_names import to_model_name, to_saved_name
from video_llama.utils.files import INCOMPLETE, sync, write_whole

__all__ = [
    "TrainingState",
    "archive_later_checkpoints",
    "cannot_be_written",
    "checkpoint_identity",
    "find_checkpoint",
    "gather_trainable",
    "list_checkpoints",
    "load_checkpoint",
    "rename_folder",
    "save_checkpoint",
    "write_file",
]

_NAME = re.compile(r"step_(\d{8})")
_TRAINABLE, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.pt", "state.json"
_DEEPSPEED = "deepspeed"
# What reading a cut-off or foreign file raises: of the system, of json, of TrainingState, of torch and of safetensors.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@dataclass
class TrainingState:
    """State of a run; everything random follows from it and the seed.

    Args:
        iteration: batches that each process has learned from.
        samples_seen, samples_bad: of all processes, each time one was drawn; the unreadable ones included in both.
        bad_ids: which samples cannot be used, each once, sorted.
        seed, batch_size, world_size, accum_grad_iters: what the order of samples depends on.
        validation_due: here the run validates, and had not when this was written.
        scaler: of the loss, in float16: its scale and how long it has held; None in other precisions.
        settings: all that the result depends on, from `resume.describe_run`; empty in checkpoints of older versions.
        best_loss, best_iteration: the lowest validation loss, and where the run had it; None before a validation.
        early_stopping_counter: validations since then that were not better by `run.early_stopping_threshold`.
        window: losses and norms since the last line of the log, from `TrainWindow.kept`.
        streams: of each process, where the streamed datasets stand.
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
    settings: dict[str, Any] = field(default_factory=dict)
    best_loss: float | None = None
    best_iteration: int | None = None
    early_stopping_counter: int = 0
    window: dict[str, Any] = field(default_factory=dict)
    streams: list[dict[str, Any]] = field(default_factory=list)


def gather_trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains, whole and on the CPU, under the model's own names; call it on every process."""
    trainable = _trainable(model)
    if _is_sharded(model):
        states: dict[str, Any] = get_model_state_dict(model, options=_gathered())
        # torch gathers buffers, too, which do not train.
        return {name: value for name, value in states.items() if name in trainable}
    with contextlib.ExitStack() as gathered:
        if _is_deepspeed(model):
            # An optional package, there if its engine is. Below ZeRO-3 the parameters are whole, and this does nothing.
            import deepspeed

            gathered.enter_context(deepspeed.zero.GatheredParameters(list(trainable.values())))
        return {name: value.detach().cpu().clone() for name, value in trainable.items()}


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, *, keep: int, writes: bool
) -> None:
    """Write a checkpoint, then remove the oldest of those up to it.

    Call it on every process; of several, the one with `writes` writes. `folder` is OUTPUT_DIR/checkpoints.

    Raises:
        CheckpointError: it could not be written; those before it are whole.
    """
    final = folder / f"step_{state.iteration:08d}"
    in_progress = final.with_name(final.name + INCOMPLETE)
    # Gathering needs every process, although only one of them writes.
    trainable = gather_trainable(model)
    optimizer_state = None
    if not _is_deepspeed(model):
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=_gathered())
    try:
        if writes:
            # What a kill left of an earlier attempt.
            shutil.rmtree(in_progress, ignore_errors=True)
            in_progress.mkdir(parents=True)
        if _is_deepspeed(model):
            # Every process writes its share of the optimizer's state into the folder.
            torch.distributed.barrier()
            model.save_checkpoint(str(in_progress), tag=_DEEPSPEED, exclude_frozen_parameters=True)  # type: ignore[operator]
            torch.distributed.barrier()
        if not writes:
            return
        saved = {to_saved_name(name): value.contiguous() for name, value in trainable.items()}
        save_file(saved, in_progress / _TRAINABLE)
        if optimizer_state is not None:
            torch.save(_renamed(optimizer_state, to_saved_name), in_progress / _OPTIMIZER)
        (in_progress / _STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        rename_folder(in_progress, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save and safetensors wrap the system's errors in their own.
        shutil.rmtree(in_progress, ignore_errors=True)
        raise cannot_be_written(final, error) from error
    # Higher numbers are of a course that the run has left; they are not counted among the newest.
    until_here = [path for path in list_checkpoints(folder) if path.name <= final.name]
    for old in until_here[: -max(keep, 1)]:
        shutil.rmtree(old)


def rename_folder(in_progress: Path, final: Path) -> None:
    """Give a folder its final name once all of its content is on the disk, so that a power cut leaves no half of it."""
    # The order matters: first the contents, then the name, then the folder that holds the name.
    for path in in_progress.rglob("*"):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(in_progress, final)
    sync(final.parent)


def write_file(path: Path, content: Any) -> None:
    """Write a file whole with `torch.save`.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        write_whole(path, partial(torch.save, content))
    except (OSError, RuntimeError) as error:
        raise cannot_be_written(path, error) from error


def cannot_be_written(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error}); is the disk full? Earlier checkpoints are whole. Make room, then go on "
        f"with --resume (run.resume_ckpt_path=auto)"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).exists())


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None to start from the beginning.

    Args:
        resume: `run.resume_ckpt_path`: "auto" for the newest of `folder` (OUTPUT_DIR/checkpoints), a path, or None.

    Raises:
        CheckpointError: no checkpoint at that path, or None although OUTPUT_DIR holds some of a run.
    """
    known = list_checkpoints(folder)
    if resume is None:
        # A folder with exported checkpoints alone holds a run, too, which must not be overwritten.
        there = known or sorted(folder.parent.glob(checkpoint_name("*")))
        if there:
            raise CheckpointError(
                f"{folder.parent}: already contains a run (latest: {there[-1].name}). Continue it with "
                f"--resume (run.resume_ckpt_path=auto), or choose another run.output_dir"
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


def checkpoint_identity(path: Path) -> str | None:
    """Return a digest of what a checkpoint holds, the same for the same checkpoint; None if it is not there."""
    digest = hashlib.sha256()
    try:
        for name in (_STATE, _TRAINABLE):
            with (path / name).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def archive_later_checkpoints(
    folder: Path, resumed: Path, iteration: int, iters_per_epoch: int, others: Sequence[Path] = ()
) -> Path | None:
    """Move what a run wrote after `iteration`, to which it goes back, so that nothing is written over.

    Args:
        folder: the run's `output_dir`.
        resumed: the checkpoint that the run goes on from; it stays.
        iteration: of that checkpoint.
        iters_per_epoch: tells which `checkpoint_EPOCH.pth` are later.
        others: more files that are later.

    Returns:
        the new folder in `folder` that holds it now; None if there is nothing.
    """
    later = list(others)
    for path in list_checkpoints(folder / "checkpoints"):
        written_at = int(path.name.removeprefix("step_"))
        if written_at >= iteration and path.resolve() != resumed.resolve():
            later.append(path)
    for path in folder.glob(checkpoint_name("*")):
        epoch = path.stem.partition("_")[2]
        # Epochs count from 0, so the file of an epoch is written after (epoch + 1) * iters_per_epoch iterations.
        if epoch.isdecimal() and (int(epoch) + 1) * iters_per_epoch > iteration:
            later.append(path)
    later += [adapter_beside(path) for path in later if path.suffix == ".pth" and adapter_beside(path).is_dir()]
    if not later:
        return None
    archive = folder / f"abandoned-{iteration:08d}-{time.strftime('%Y%m%d-%H%M%S')}"
    archive.mkdir(exist_ok=True)
    for path in later:
        os.replace(path, archive / path.name)
    sync(folder)
    return archive


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Read a checkpoint back into model and optimizer; call it on every process.

    Raises:
        CheckpointError: it is damaged, or of a run with other trainable parts.
    """
    optimizer_state = None
    try:
        state = TrainingState(**json.loads((path / _STATE).read_text(encoding="utf-8")))
        values: dict[str, Any] = {to_model_name(name): value for name, value in load_file(path / _TRAINABLE).items()}
        if not _is_deepspeed(model):
            optimizer_state = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
            optimizer_state = _renamed(optimizer_state, to_model_name)
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: damaged or not a training checkpoint ({reason}). Remove it, and --resume takes the one before it"
        ) from error
    trainable = _trainable(model)
    # Compare names before anything is changed: after an error the model is as it was.
    differing = sorted(trainable.keys() ^ values.keys())
    if differing:
        raise CheckpointError(
            f"{path}: this checkpoint trained other parameters than the configuration ({len(differing)} differ, "
            f"first: {differing[0]})"
        )
    # DeepSpeed reads weights and optimizer itself, each process its own share.
    if optimizer_state is None:
        model.load_checkpoint(str(path), tag=_DEEPSPEED, load_module_strict=False)  # type: ignore[operator]
        return state
    for name, parameter in trainable.items():
        there, here = tuple(values[name].shape), tuple(parameter.shape)
        if there != here:
            raise CheckpointError(f"{path}: {name} has the shape {there} there, and {here} in this configuration")
    options = StateDictOptions(full_state_dict=True, strict=False)
    if _is_sharded(model):
        set_model_state_dict(model, values, options=options)
    else:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(values[name])
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    return state


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by their names without the wrapper of DDP or DeepSpeed."""
    named = model.named_parameters()
    return {name.removeprefix("module."): parameter for name, parameter in named if parameter.requires_grad}


def _renamed(optimizer_state: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return the state of an optimizer with other names of the parameters."""
    states = {rename(name): state for name, state in optimizer_state["state"].items()}
    groups = [{**group, "params": list(map(rename, group["params"]))} for group in optimizer_state["param_groups"]]
    return {**optimizer_state, "state": states, "param_groups": groups}


def _gathered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def _is_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed wraps the model; it has its own way to shard and to save the optimizer."""
    return type(model).__name__ == "DeepSpeedEngine"


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP 2 shares the weights out over processes.

    Only then torch's own functions are needed. They walk the state of the whole model, and that of a frozen language
    model in 8 bit names tensors which its layers do not have.
    """
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
