"""Encoders of transformers: found in a model's folder, and built again from what our config.json keeps of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging as transformers_logging

from video_llama.errors import CheckpointError, ConfigError, translate_foreign

__all__ = ["Encoder", "build_tower", "fill_buffers", "load_tower_weights", "read_tower_config", "take_keys"]

# What whole models call the part that reads images or audio.
_PLACES = ("vision_model", "audio_model", "vision_tower", "audio_tower")
# Of no meaning for a module that is part of another model.
_NOT_KEPT = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path")
_SMALL_VOCABULARY = {"vocab_size": 4, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


class Encoder(ABC):
    """One kind of encoder; what a package of others derives from, by `FrameEncoder` or `AudioEncoder`."""

    @classmethod
    @abstractmethod
    def read(cls, keys: dict[str, Any]) -> Any:
        """Return the configuration that the keys of the encoder's section describe.

        Args:
            keys: as the user wrote them, `name` included; `path`, if it is there, is a local folder.

        Raises:
            ConfigError: unknown keys.
            CheckpointError: a file is missing or damaged.
        """

    @classmethod
    @abstractmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights, by their names in the module that `build` returns.

        Raises:
            CheckpointError: they are missing or damaged.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: Any) -> nn.Module:
        """Return the module; its weights are loaded later, and it may be built on the meta device."""


def take_keys(keys: dict[str, Any], kind: str, **known: Any) -> dict[str, Any]:
    """Return the values of the keys that a part knows, `known` giving their defaults; `...` stands for none.

    Raises:
        ConfigError: a key that it does not know, or one without default is missing.
    """
    unknown = sorted(set(keys) - set(known) - {"name"})
    if unknown:
        raise ConfigError(f"{kind}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
    missing = [name for name, default in known.items() if default is ... and name not in keys]
    if missing:
        raise ConfigError(f"{kind} needs the key {' and '.join(missing)}")
    return {name: keys.get(name, default) for name, default in known.items()}


def read_tower_config(folder: Path) -> dict[str, Any]:
    """Return what `build_tower` needs of a model's configuration: that of the model, with as little text as possible.

    Raises:
        CheckpointError: the configuration is missing, damaged, or of a kind that transformers does not know.
    """
    with translate_foreign(CheckpointError, folder, "no configuration of a model that transformers knows"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = getattr(config, "text_config", None)
    if text is not None:
        _update(text, num_hidden_layers=0, **_SMALL_VOCABULARY)
    if config.is_encoder_decoder:
        _update(config, decoder_layers=0, decoder_start_token_id=1, **_SMALL_VOCABULARY)
    return _plain(config.to_diff_dict())


def build_tower(config: dict[str, Any]) -> nn.Module:
    """Build an encoder from what `read_tower_config` returned; its values are still to be loaded."""
    given = dict(config)
    with translate_foreign(ConfigError, f"the encoder of type {given.get('model_type')!r}", "update transformers"):
        return _tower_of(AutoModel.from_config(AutoConfig.for_model(given.pop("model_type"), **given)))


def fill_buffers(encoder: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give buffers that no file of weights holds the values that `build` computes for them.

    They are empty after a model was built on the meta device. Models of transformers fill their own.
    """
    names = set(dict(encoder.named_buffers())) - set(encoder.state_dict())
    for place, module in encoder.named_modules():
        if isinstance(module, PreTrainedModel):
            names = {name for name in names if place and not name.startswith(f"{place}.")}
    if not names:
        return
    with torch.device("cpu"):
        values = dict(build().named_buffers())
    for name in names:
        init.copy_(encoder.get_buffer(name), values[name])


def load_tower_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the encoder in a model's folder, by the names that `build_tower`'s module has.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with translate_foreign(CheckpointError, folder):
            model, info = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
    tower = _tower_of(model)
    used = {id(value) for value in tower.state_dict(keep_vars=True).values()}
    missing = [name for name, value in model.state_dict(keep_vars=True).items() if id(value) in used]
    missing = sorted(set(missing) & set(info["missing_keys"]))
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights of the encoder are missing, the first is {missing[0]}")
    return dict(tower.state_dict())


def output_shape(build: Callable[[], nn.Module], *shape: int) -> torch.Size:
    """Return the shape of what an encoder returns for values of a shape; nothing is computed where that works."""

    def run(device: str) -> torch.Size:
        with torch.device(device), torch.no_grad():
            returned: Tensor = build()(torch.zeros(shape))
        return returned.shape

    try:
        return run("meta")
    except (RuntimeError, NotImplementedError):
        # Some releases of transformers look at values, which tensors on the meta device do not have.
        return run("cpu")


def _tower_of(model: nn.Module) -> nn.Module:
    for place in _PLACES:
        found = getattr(model, place, None)
        if found is not None:
            return found
    config: Any = model.config
    if config.is_encoder_decoder:
        encoder: Any = model
        return encoder.get_encoder()
    return model


def _update(config: PreTrainedConfig, **values: Any) -> None:
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items() if name not in _NOT_KEPT}
    return values
