"""The encoders and connectors that a model section names, in place of the published ones: sizes and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_llama.checkpoints.hub import LANGUAGE_MODEL_PATTERNS, resolve_source
from video_llama.checkpoints.weight_files import Weights
from video_llama.config import ModelConfig
from video_llama.errors import ConfigError
from video_llama.registry import AUDIO_ENCODERS, CONNECTORS, FRAME_ENCODERS, Registry, import_plugins

__all__ = ["EncoderWeights", "chosen_part", "chosen_sizes", "connector_sizes"]

_TABLES: dict[str, Registry[Any]] = {"frame_encoder": FRAME_ENCODERS, "audio_encoder": AUDIO_ENCODERS}
PUBLISHED = {"frame_encoder": "eva_vit_g", "audio_encoder": "imagebind", "connector": "qformer"}
"""The names of the published parts, by the key of the model section."""
# Where an encoder lies in the model, by names of files.
_PLACES = {"frame_encoder": "video_branch.vision_encoder.", "audio_encoder": "audio_branch.audio_encoder."}


class EncoderWeights(Weights):
    """The weights of an encoder that its own library has loaded, under our names.

    Args:
        kind: "frame_encoder" or "audio_encoder".
        keys: what `chosen_part` returned.
    """

    def __init__(self, kind: str, keys: dict[str, Any]) -> None:
        loaded: dict[str, Tensor] = _TABLES[kind].get(keys["name"]).load(keys)
        self._tensors = {_PLACES[kind] + name: value for name, value in loaded.items()}
        path = Path(str(keys.get("path") or keys["name"]))
        super().__init__(path, {name: value.to("meta") for name, value in self._tensors.items()})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensors[name].to(dtype=dtype, copy=True)


def chosen_part(section: ModelConfig, kind: str) -> dict[str, Any] | None:
    """Return the keys of an encoder, its `path` a local folder or file; None for the published one.

    Raises:
        ConfigError: no name, an unknown one, or a module of `model.plugins` that cannot be imported.
        CheckpointError: there is nothing at its path.
    """
    keys: dict[str, Any] = dict(getattr(section, kind))
    import_plugins(section.plugins, "model.plugins")
    if not keys:
        return None
    if not isinstance(keys.get("name"), str):
        raise ConfigError(f"model.{kind} needs the key name: {', '.join(_TABLES[kind].names())}")
    _TABLES[kind].get(keys["name"])
    if keys["name"] == PUBLISHED[kind]:
        return None
    if keys.get("path") is not None:
        keys["path"] = str(resolve_source(keys["path"], f"model.{kind}.path", LANGUAGE_MODEL_PATTERNS))
    return keys


def chosen_sizes(kind: str, keys: dict[str, Any]) -> Any:
    """Return the configuration of an encoder whose keys `chosen_part` returned.

    Raises:
        ConfigError, CheckpointError: as the encoder's own `read`.
    """
    entry = _TABLES[kind].get(keys["name"])
    config = entry.read(keys)
    config.name = keys["name"]
    if not entry.__module__.startswith("video_llama."):
        # Only for the message where it is missing.
        config.module = entry.__module__
    return config


def connector_sizes(section: ModelConfig) -> dict[str, Any]:
    """Return the fields of `VideoLlamaConfig` that `model.connector` sets.

    Raises:
        ConfigError: an unknown connector, or unknown keys of it.
    """
    import_plugins(section.plugins, "model.plugins")
    if not section.connector:
        return {}
    keys = {"name": PUBLISHED["connector"], **section.connector}
    fields: dict[str, Any] = CONNECTORS.get(keys["name"]).configure(keys)
    return fields
