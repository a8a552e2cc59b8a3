"""The names of weights in saved folders, and in the model as transformers' conventions want it.

Files keep the names they always had: `video_branch.…`, `audio_branch.…` and `language_model.…`, the last a whole causal
language model. In memory its layers are part of `model`, and its output layer is `lm_head`. transformers translates in
both directions when it loads and saves, by `RENAMINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming

__all__ = ["accept_saved_names", "saved_weight_renamings", "to_model_name", "to_model_places", "to_saved_name"]

# (in files, in the model). The first row that fits a name counts.
_PREFIXES = (
    ("video_branch.", "model.video_branch."),
    ("audio_branch.", "model.audio_branch."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    # What some language models call their layers and their output layer. They are saved under the names above.
    ("language_model.transformer.", "model.language_model."),
    ("language_model.gpt_neox.", "model.language_model."),
    ("language_model.embed_out.", "lm_head."),
)


def to_model_name(saved: str) -> str:
    """Return the name that a weight has in the model; a name that is the model's already stays."""
    for in_files, in_model in _PREFIXES:
        if saved.startswith(in_files):
            return in_model + saved.removeprefix(in_files)
    return saved


def to_saved_name(name: str) -> str:
    """Return the name that a weight of the model has in files; a name that is one of files already stays."""
    for in_files, in_model in _PREFIXES:
        if name.startswith(in_model):
            return in_files + name.removeprefix(in_model)
    return name


def accept_saved_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the entries of a `state_dict` with names of files those of the model: a hook of `load_state_dict`."""
    for name in list(state_dict):
        if name.startswith(prefix):
            state_dict[prefix + to_model_name(name.removeprefix(prefix))] = state_dict.pop(name)


def to_model_places(device_map: Any) -> Any:
    """Return a device map with the names of files as one with the names of the model; anything else as it is."""
    if not isinstance(device_map, Mapping):
        return device_map
    places: dict[str, Any] = {}
    for name, place in device_map.items():
        # A causal language model is two modules here.
        if name == "language_model":
            places |= {"model.language_model": place, "lm_head": place}
        else:
            places[to_model_name(f"{name}.").removesuffix(".")] = place
    return places


def saved_weight_renamings() -> list[WeightRenaming]:
    """Return the same rows for transformers."""
    # Turned around for saving, the last row comes first, and must be one of the names that are written.
    rows = [(f"^{in_files}", f"^{in_model}") for in_files, in_model in reversed(_PREFIXES)]
    return [WeightRenaming(*(pattern.replace(".", r"\.") for pattern in row)) for row in rows]
