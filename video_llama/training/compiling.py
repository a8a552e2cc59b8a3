"""The layers that a step goes back through, compiled: one compilation for all layers of a kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from video_llama.errors import ConfigError
from video_llama.model.frozen import requires_gradients
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["CompiledLayers", "check_compiler"]


class CompiledLayers:
    """Layers of the language model and of the Q-Formers that train, compiled with `torch.compile` while a step runs.

    Weights are inputs of what is compiled, so it serves all layers of a kind. It is compiled when a layer is first
    called, and once more when a length differs, then for any length. The modules stay what they are, with their names;
    outside of a step nothing is compiled, as a cache of keys and values would have every layer compiled by itself.

    Args:
        model: what trains in it requires gradients.
        options: of `torch.compile`.
    """

    def __init__(self, model: VideoLlamaForConditionalGeneration, **options: Any) -> None:
        self._compiled: list[tuple[nn.Module, Any]] = []
        for layer in _layers(model):
            layer.compile(**options)
            self._compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Meanwhile, the layers run compiled, in the forward pass and where checkpointing repeats it."""
        with torch._dynamo.config.patch(optimize_ddp=False):  # layers need no cutting up for DDP
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
    qformers = [model.video_branch.video_qformer]
    if model.audio_branch is not None:
        qformers.append(model.audio_branch.audio_qformer)
    for qformer in qformers:
        if requires_gradients(qformer):
            layers += qformer.encoder.layer
    return layers


def check_compiler(device: torch.device) -> None:
    """Compile something small, forward and backward, to find out what is missing before a model is loaded.

    Raises:
        ConfigError: it cannot be compiled, and why.
    """
    values = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(_small)(values).backward()
    except Exception as error:  # of Dynamo, of Inductor, of Triton, of a C compiler
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"run.compile: torch.compile does not work here ({reason}); it needs a C++ compiler, on a GPU triton, a C "
            "compiler and Python's header files (python3-dev). Install them, or set run.compile: False"
        ) from error


def _small(values: Tensor) -> Tensor:
    return (values * values.sin()).sum()
