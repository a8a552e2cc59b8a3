"""torch's own switches for a run: TF32, deterministic algorithms, and layers compiled with `torch.compile`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from video_llama.errors import ConfigError
from video_llama.model.frozen import requires_gradients
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.processes import is_sharded

__all__ = ["CompiledLayers", "check_compiler", "prepare_determinism", "training_switches"]

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare_determinism() -> None:
    """Make cuBLAS add up in one order, unless the variable is set already; it is read when a GPU is first used."""
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")


@contextlib.contextmanager
def training_switches(accelerator: Accelerator, deterministic: bool) -> Iterator[None]:
    """Set what decides over speed and bits while a run computes, and put it back afterwards.

    Where nothing is autocast, matrix products of float32 weights take TF32 on a GPU: 10 bits of mantissa, many times
    the speed. Answers in float32 outside of training stay exact.

    Args:
        accelerator: of the run.
        deterministic: use only algorithms that give the same bits each time; an operation that has none is an error.
    """
    with contextlib.ExitStack() as restored:
        if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if deterministic:
            restored.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            # Not with warn_only: attention has a deterministic kernel, but takes it only if it must.
            torch.use_deterministic_algorithms(True)
            cudnn = torch.backends.cudnn
            restored.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
            restored.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
            cudnn.benchmark = False
            cudnn.deterministic = True
        yield


class CompiledLayers:
    """Layers of the language model and of the Q-Formers that train, compiled while a step runs.

    Weights are inputs of the compiled code, so it serves all layers of a kind. It is compiled when a layer is first
    called, and once more, for any length, when a length differs. The modules stay what they are, with their names.
    Outside of a step nothing is compiled: in generation, the cache of keys and values would have every layer compiled
    by itself.

    Args:
        model: what trains in it requires gradients.
        options: of `torch.compile`.
    """

    def __init__(self, model: VideoLlamaForConditionalGeneration, **options: Any) -> None:
        self._compiled: list[tuple[nn.Module, Any]] = []
        for layer in _layers(model):
            layer.compile(**options)
            # Set aside: until `in_use` the layer runs as it was.
            self._compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Run the layers compiled, in the forward pass and where checkpointing repeats it."""
        # DDP would cut a compiled module up to overlap communication; a single layer needs none of that.
        with torch._dynamo.config.patch(optimize_ddp=False):
            for layer, compiled in self._compiled:
                layer._compiled_call_impl = compiled
            try:
                yield
            finally:
                for layer, _ in self._compiled:
                    layer._compiled_call_impl = None


def _layers(model: VideoLlamaForConditionalGeneration) -> list[nn.Module]:
    kinds = set(model.language_model._no_split_modules or ())
    layers = [module for module in model.language_model.modules() if type(module).__name__ in kinds]
    qformers: list[Any] = []
    if isinstance(model.video_branch.attention, Blip2QFormerModel):
        qformers.append(model.video_branch.attention)
    if model.audio_branch is not None:
        qformers.append(model.audio_branch.audio_qformer)
    for qformer in qformers:
        if requires_gradients(qformer):
            layers += qformer.encoder.layer
    return layers


def check_compiler(accelerator: Accelerator) -> None:
    """Compile something small, forward and backward, to find out what is missing before a model is loaded.

    Raises:
        ConfigError: it cannot be compiled, and why; or weights are sharded.
    """
    if is_sharded(accelerator):
        kind = accelerator.distributed_type.value
        raise ConfigError(f"run.compile: with {kind} nothing is compiled; set run.compile: False")
    values = torch.ones(8, device=accelerator.device, requires_grad=True)
    try:
        torch.compile(_small)(values).backward()
    except Exception as error:
        # Dynamo, Inductor, Triton and the C compiler each have errors of their own.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"run.compile: torch.compile does not work here ({reason}); it needs a C++ compiler, on a GPU triton, a C "
            "compiler and Python's header files (python3-dev). Install them, or set run.compile: False"
        ) from error


def _small(values: Tensor) -> Tensor:
    return (values * values.sin()).sum()
