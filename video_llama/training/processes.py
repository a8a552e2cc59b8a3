"""Several processes as one run, through accelerate: set up, checked against what was asked for, and agreed on sums."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from omegaconf import OmegaConf
from torch import Tensor

from video_llama.config import RunConfig
from video_llama.errors import ConfigError
from video_llama.utils.devices import resolve_device, resolve_dtype

__all__ = [
    "build_accelerator",
    "check_launcher",
    "check_processes",
    "describe_processes",
    "mixed_precision",
    "sum_over_processes",
    "training_device",
]

logger = logging.getLogger(__name__)

# What MPI says of a job and of one machine, where accelerate looks for it.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


_FSDP_COMMAND = (
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_cpu_ram_efficient_loading false train.py …"
)


def build_accelerator(run: RunConfig, dtype: str | torch.dtype) -> Accelerator:
    """Accelerate's view of this run, as torchrun, accelerate launch or plain Python started it.

    Of several processes on one machine each has its own GPU as torch's current device: accelerate sees to that.

    Args:
        run: device, precision and trackers.
        dtype: of the frozen weights, as in `model.dtype`.

    Raises:
        ConfigError: fewer processes, or another way of sharing the work, than was asked for; or a precision that
            cannot train.
    """
    check_launcher()
    _check_fsdp()
    precision = mixed_precision(run, dtype)
    if run.amp and precision == "no" and mixed_precision(run, "auto") != "no":
        logger.warning(
            "run.amp has no effect on frozen weights in float32, which it would cast anew at every step: everything is "
            "computed in float32; with model.dtype: auto a run takes half precision"
        )
    accelerator = Accelerator(
        # With cpu=True accelerate would ignore DeepSpeed.
        cpu=training_device(run).type == "cpu" and not _asks_for("DEEPSPEED"),
        mixed_precision=precision,
        log_with=list(run.trackers) or None,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if _asks_for("FSDP") and accelerator.distributed_type is DistributedType.MULTI_CPU:
        _shard_on_cpu(accelerator)
    check_processes(accelerator, run)
    return accelerator


def check_launcher() -> None:
    """Find out a launcher whose processes do not know how to become one run; each would train for itself.

    Raises:
        ConfigError: srun or mpirun started several processes, and neither torchrun nor accelerate lies between.
    """
    if "WORLD_SIZE" in os.environ:  # set by torchrun and accelerate for each process that they start
        return
    num_tasks = _tasks_of_srun()
    if num_tasks > 1:
        raise ConfigError(
            f"srun started {num_tasks} tasks of this command, which would train for themselves in one run.output_dir; "
            f"let srun start one launcher on each node: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES "
            f"--nproc_per_node=GPUS --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 train.py … (or accelerate "
            f"launch)"
        )
    num_processes, num_here = (max(map(_number, names)) for names in (_MPI_SIZES, _MPI_LOCAL_SIZES))
    if num_processes > 1 and num_here != num_processes and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"MPI started {num_processes} processes of this command, which do not know where the first one runs "
            f"(MASTER_ADDR); start it with torchrun --nproc_per_node=… train.py … or accelerate launch instead"
        )


def check_processes(accelerator: Accelerator, run: RunConfig) -> None:
    """Compare what there is with what was asked for: some launch paths fall back to one process in silence.

    Raises:
        ConfigError: they differ.
    """
    by_environment = max(map(_number, ["WORLD_SIZE"] if "WORLD_SIZE" in os.environ else _MPI_SIZES))
    asked = max(run.world_size, by_environment, _processes_of_launcher())
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"{asked} processes were asked for, but this run has {accelerator.num_processes}; start it with "
            f"torchrun --nproc_per_node={asked} train.py …"
        )
    if _asks_for("DEEPSPEED") and run.accum_grad_iters > 1:
        raise ConfigError("run.accum_grad_iters must be 1 with DeepSpeed, which would scale the gradients once more")
    for name in ("FSDP", "DEEPSPEED"):
        if _asks_for(name) and accelerator.distributed_type is not DistributedType[name]:
            raise ConfigError(f"{name} was asked for, but accelerate set up {accelerator.distributed_type.value}")


def describe_processes(accelerator: Accelerator) -> str:
    """How many processes there really are, and how they share the work."""
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no process group"
    return (
        f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, {backend}, "
        f"device {accelerator.device}, mixed precision {accelerator.mixed_precision}"
    )


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Element by element, over all processes."""
    if accelerator.num_processes == 1:
        return values
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    summed: list[float] = total.tolist()
    return summed


def training_device(run: RunConfig) -> torch.device:
    """The kind of device that a run trains on: `run.device`, else a GPU of CUDA or ROCm if there is one, else the CPU.

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
    """The precision of autocast as accelerate names it: that of the frozen weights, which it then never casts.

    Args:
        run: says whether there is autocast at all (`amp`).
        dtype: of the frozen weights, as in `model.dtype`; "auto" is what the device computes in.

    Raises:
        ConfigError: float16 without the loss scaling that it needs, or bfloat16 on a GPU that does not compute in it.
    """
    device = training_device(run)
    precision, by_device = resolve_dtype(dtype, device), resolve_dtype("auto", device)
    if precision == torch.float16 and (device.type == "cpu" or not run.amp):
        raise ConfigError(
            "float16 trains on a GPU with run.amp: True only, whose loss scaling keeps small gradients; "
            "set model.dtype to bfloat16 or float32"
        )
    if precision == torch.bfloat16 and device.type == "cuda" and by_device == torch.float16:
        raise ConfigError("this GPU does not compute in bfloat16; set model.dtype to auto, float16 or float32")
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(precision, "no") if run.amp else "no"


def _check_fsdp() -> None:
    """Refuse what accelerate does with FSDP unless it is told otherwise.

    Raises:
        ConfigError: FSDP 1, which flattens frozen and trained weights of different types into one; or a way of loading
            that leaves the weights of all processes but the first without values.
    """
    if not _asks_for("FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"FSDP 1, accelerate's default, cannot shard frozen and trained weights of different types; "
            f"use FSDP 2: {_FSDP_COMMAND}"
        )
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            f"FSDP's cpu_ram_efficient_loading is not supported: every process reads the weights itself; "
            f"turn it off: {_FSDP_COMMAND}"
        )


def _asks_for(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _tasks_of_srun() -> int:
    """The tasks of the job step that this process belongs to; 1 in a batch script itself, whatever it was allotted."""
    if "SLURM_PROCID" not in os.environ or not {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return 1
    return _number("SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in os.environ else _number("SLURM_NTASKS")


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 1


def _processes_of_launcher() -> int:
    """The processes that an `accelerate launch` which started this one was asked for; 1 if there is none."""
    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    if not any(Path(word).name == "accelerate" or word == "accelerate.commands.launch" for word in words[:3]):
        return 1
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        options.setdefault(name.replace("-", "_"), value or following)
    if "__num_processes" in options:
        return int(options["__num_processes"])
    file = Path(options.get("__config_file", default_config_file))  # the default is what `accelerate config` wrote
    return int(OmegaConf.load(file).get("num_processes") or 1) if file.is_file() else 1


def _shard_on_cpu(accelerator: Any) -> None:
    """FSDP2 over gloo: accelerate's own code can do it, but only turns it on for accelerators."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    for state in (accelerator.state, PartialState()):  # one is refreshed from the other
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
