"""Several processes as one run, through accelerate: set-up, checks against what was asked for, and sums."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    get_int_from_env,
    parse_flag_from_env,
)
from torch import Tensor

from video_llama.config import RunConfig
from video_llama.errors import ConfigError, VideoLlamaError
from video_llama.utils.devices import resolve_device, resolve_dtype

__all__ = [
    "build_accelerator",
    "check_launcher",
    "check_processes",
    "describe_processes",
    "from_main_process",
    "is_of_other_process",
    "is_sharded",
    "mixed_precision",
    "sum_over_processes",
    "training_device",
]

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# The number of processes of an MPI job, and of those on this machine, in the variables that accelerate reads.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")

_FSDP_COMMAND = (
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_cpu_ram_efficient_loading false train.py …"
)


def build_accelerator(run: RunConfig, dtype: str | torch.dtype) -> Accelerator:
    """Build accelerate's view of this run, as torchrun, accelerate launch or plain Python started it.

    Raises:
        ConfigError: the processes, or how they share the work, are not what was asked for; or a precision that cannot
            train.
    """
    check_launcher()
    precision = mixed_precision(run, dtype)
    if run.amp and precision == "no" and mixed_precision(run, "auto") != "no":
        logger.warning(
            "run.amp has no effect on frozen weights in float32, which it would cast anew at every step: everything is "
            "computed in float32; with model.dtype: auto a run takes half precision"
        )
    accelerator = Accelerator(
        # With cpu=True accelerate would ignore DeepSpeed.
        cpu=training_device(run).type == "cpu" and not _uses("DEEPSPEED"),
        mixed_precision=precision,
        log_with=list(run.trackers) or None,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if _uses("FSDP") and accelerator.distributed_type is DistributedType.MULTI_CPU:
        # accelerate turns FSDP on for accelerators only, but its code shards over gloo as well. There are two states,
        # and each access refreshes one from the other.
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    check_processes(accelerator, run)
    return accelerator


def check_launcher() -> None:
    """Refuse launchers whose processes would each train for itself, and ways of FSDP that do not work here.

    Raises:
        ConfigError: srun or mpirun started several processes without torchrun or accelerate in between; FSDP 1, which
            flattens frozen and trained weights of different types into one; or FSDP with a way of loading that leaves
            the weights of all processes but the first without values.
    """
    if _uses("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"FSDP 1, accelerate's default, cannot shard frozen and trained weights of different types; "
            f"use FSDP 2: {_FSDP_COMMAND}"
        )
    if _uses("FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            f"FSDP's cpu_ram_efficient_loading is not supported: every process reads the weights itself; "
            f"turn it off: {_FSDP_COMMAND}"
        )
    # torchrun and accelerate set WORLD_SIZE for each process that they start.
    if "WORLD_SIZE" in os.environ:
        return
    launcher = "srun"
    num_started = 1
    # A batch script itself is one process, whatever was allotted to it; srun's tasks have a step.
    if "SLURM_PROCID" in os.environ and {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        num_started = get_int_from_env(("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), 1)
    # accelerate makes one run of MPI's processes on one machine, or where they know the address of the first.
    num_mpi = get_int_from_env(_MPI_SIZES, 1)
    if num_started == 1 and num_mpi != get_int_from_env(_MPI_LOCAL_SIZES, 1) and "MASTER_ADDR" not in os.environ:
        launcher = "MPI"
        num_started = num_mpi
    if num_started > 1:
        raise ConfigError(
            f"{launcher} started {num_started} processes of this command, each of which would train by itself in the "
            f"same run.output_dir; start one launcher on each node instead, for instance: srun --ntasks-per-node=1 "
            f"torchrun --nnodes=$SLURM_NNODES --nproc_per_node=GPUS --rdzv_backend=c10d "
            f"--rdzv_endpoint=FIRST_NODE:29500 train.py … (or accelerate launch)"
        )


def check_processes(accelerator: Accelerator, run: RunConfig) -> None:
    """Compare what there is with what was asked for: some launchers silently fall back to one process.

    Raises:
        ConfigError: they differ.
    """
    asked = max(run.world_size, get_int_from_env(("WORLD_SIZE", *_MPI_SIZES), 1))
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"{asked} processes were asked for, but this run has {accelerator.num_processes}; start it with "
            f"torchrun --nproc_per_node={asked} train.py …"
        )
    # accelerate launch sets its precision for every process, and an address only if it was asked for several of them.
    # Without GPUs it then still starts a single one, without WORLD_SIZE.
    is_alone = asked == 1 and "WORLD_SIZE" not in os.environ
    if is_alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch was asked for several processes, but this run has 1; start it with "
            "torchrun --nproc_per_node=… train.py … (or, if 1 is right, without MASTER_ADDR in the environment)"
        )
    if _uses("DEEPSPEED") and run.accum_grad_iters > 1:
        raise ConfigError("run.accum_grad_iters must be 1 with DeepSpeed, which would scale the gradients once more")
    for name in ("FSDP", "DEEPSPEED"):
        if _uses(name) and accelerator.distributed_type is not DistributedType[name]:
            raise ConfigError(f"{name} was asked for, but accelerate set up {accelerator.distributed_type.value}")


def describe_processes(accelerator: Accelerator) -> str:
    """Say how many processes there really are, and how they share the work."""
    backend = "no process group"
    if torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
    return (
        f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, {backend}, "
        f"device {accelerator.device}, mixed precision {accelerator.mixed_precision}"
    )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are shared out over processes, so that all of them must run each part together."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def from_main_process(compute: Callable[[], Value]) -> Value:
    """Return what the main process computes, on every process; its error is raised on all of them."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = compute()
        except (VideoLlamaError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    value: Value = outcome[0]
    return value


def is_of_other_process(error: RuntimeError) -> bool:
    """Return whether an error says that another process of the run ended or does not answer."""
    # gloo's have no class of their own, but begin with the place in its source.
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sum values over all processes, element by element."""
    if accelerator.num_processes == 1:
        return values
    # In float64, because float32 would round large counts of tokens.
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    summed: list[float] = total.tolist()
    return summed


def training_device(run: RunConfig) -> torch.device:
    """Return the kind of device to train on: `run.device`, else a GPU of CUDA or ROCm if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device, or training does not run on it.
    """
    if run.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = resolve_device(run.device)
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"training runs on cuda (with ROCm, too) and on cpu, not on {device.type}")
    return device


def mixed_precision(run: RunConfig, dtype: str | torch.dtype) -> str:
    """Return the precision of autocast as accelerate names it: that of the frozen weights, which are then never cast.

    Raises:
        ConfigError: float16 without the loss scaling that it needs, or bfloat16 on a GPU that does not compute in it.
    """
    device = training_device(run)
    precision = resolve_dtype(dtype, device)
    if precision == torch.float16 and (device.type == "cpu" or not run.amp):
        raise ConfigError(
            "float16 trains on a GPU with run.amp: True only, whose loss scaling keeps small gradients; "
            "set model.dtype to bfloat16 or float32"
        )
    is_old_gpu = device.type == "cuda" and resolve_dtype("auto", device) == torch.float16
    if precision == torch.bfloat16 and is_old_gpu:
        raise ConfigError("this GPU does not compute in bfloat16; set model.dtype to auto, float16 or float32")
    if not run.amp:
        return "no"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision, "no")


def _uses(name: str) -> bool:
    """Whether accelerate launch was asked for FSDP or DEEPSPEED."""
    return parse_flag_from_env(f"ACCELERATE_USE_{name}")
