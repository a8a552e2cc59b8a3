"""Checkpoints to read, compare and break."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from video_llama.checkpoints.weight_files import Weights
from video_llama.checkpoints.weight_mapping import to_our_name
from video_llama.config import ModelConfig
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import load_pretrained_model
from video_llama.model.weight_names import to_saved_name
from video_llama.registry import MODELS

VL, AL = "VL_random_tiny.pth", "AL_random_tiny.pth"

T = TypeVar("T")
Edit = Callable[[dict[str, Tensor]], object]


def load_checkpoint(path: Path | str, **options: Any) -> VideoLlama:
    """`load_pretrained_model` in float32 on the CPU, unless told otherwise."""
    return load_pretrained_model(path, **{"device": "cpu", "half": False, **options})


def build_checkpoint(
    folder: Path, *, device: str = "cpu", for_training: bool = False, options: Any = None, **settings: Any
) -> VideoLlama:
    """What a YAML with these settings in its model section builds of a folder in the original layout."""
    config = ModelConfig(**{"ckpt": str(folder / VL), "ckpt_2": str(folder / AL), "dtype": "float32", **settings})
    return MODELS.build(config.arch, config, device=device, for_training=for_training, **(options or {}))


class HeldWeights(Weights):
    """Named tensors (they may be on the meta device) in the place of an opened file."""

    def __init__(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(Path(path), {name: tensor.to("meta") for name, tensor in tensors.items()})
        self._tensors = dict(tensors)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensors[name].to(dtype=dtype, copy=True)


def original_to_ours(weights: Mapping[str, T]) -> dict[str, T]:
    """The same values under our names; names that are none of the model's are left out."""
    renamed = {to_our_name(name): value for name, value in weights.items()}
    return {name: value for name, value in renamed.items() if name is not None}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file of weights."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("model", content)


def edit_tensors(path: Path, edit: Edit) -> None:
    """Change the tensors of one file in place, its form kept."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return
    content = torch.load(path, weights_only=True)
    edit(content.get("model", content))
    torch.save(content, path)


def assert_equal_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model under the names that files have."""
    return {to_saved_name(name): tensor for name, tensor in model.state_dict().items()}


class RunsCode:
    """What an unsafe pickle holds: opening it would make the folder `was_here`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was_here",)
