"""The frame encoders that `model.frame_encoder` names: frames in, tokens of every frame out.

An entry of `FRAME_ENCODERS` is a class with the three methods of `FrameEncoder`. The module that it builds maps
(frames, 3, image_size, image_size) to (frames, num_tokens, hidden_size), each frame by itself.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from video_llama.errors import CheckpointError, ConfigError, translate_foreign
from video_llama.model.configuration import VideoLlamaVisionConfig
from video_llama.model.encoder_configuration import FrameEncoderConfig
from video_llama.model.eva_vit import build_eva_vit
from video_llama.model.towers import (
    Encoder,
    build_tower,
    load_tower_weights,
    output_shape,
    read_tower_config,
    take_keys,
)
from video_llama.registry import FRAME_ENCODERS

__all__ = ["FrameEncoder"]


class FrameEncoder(Encoder):
    """One kind of frame encoder; its configuration is a `FrameEncoderConfig`."""


@FRAME_ENCODERS.register("eva_vit_g")
class EvaFrameEncoder(FrameEncoder):
    """The published one: EVA ViT-g (Fang et al. 2022). Its weights are `model.vit_ckpt`."""

    @classmethod
    def read(cls, keys: dict[str, Any]) -> VideoLlamaVisionConfig:
        """Return the published configuration."""
        take_keys(keys, "model.frame_encoder")
        return VideoLlamaVisionConfig()

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return nothing: the weights are those of `model.vit_ckpt`."""
        return {}

    @classmethod
    def build(cls, config: VideoLlamaVisionConfig) -> nn.Module:
        """Build timm's Eva as BLIP-2 uses it."""
        return build_eva_vit(config)


class TransformersFrames(nn.Module):
    """A vision tower of transformers: pixels to the states of its last layer."""

    def __init__(self, config: FrameEncoderConfig) -> None:
        super().__init__()
        self.model = build_tower(config.settings["config"])
        own = getattr(self.model.config, "image_size", config.image_size)
        # Those that always fit their position table to the image take no such argument.
        self._options = {} if own in (config.image_size, [config.image_size] * 2) else _interpolation(self.model)

    def forward(self, frames: Tensor) -> Tensor:
        """Map (frames, 3, height, width) to (frames, tokens, width)."""
        states: Tensor = self.model(pixel_values=frames, **self._options).last_hidden_state
        return states

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass."""
        model: Any = self.model
        model.gradient_checkpointing_enable({"use_reentrant": False})


@FRAME_ENCODERS.register("transformers")
class TransformersFrameEncoder(FrameEncoder):
    """The vision tower of a model of transformers: SigLIP (Zhai et al. 2023), CLIP (Radford et al. 2021), DINOv2, …

    Its keys: `path`, a folder or hub id; `image_size`, if it differs from that of its image processor.
    """

    @classmethod
    def read(cls, keys: dict[str, Any]) -> FrameEncoderConfig:
        """Return the configuration; size, mean and std are those of the model's image processor."""
        given = take_keys(keys, "model.frame_encoder (transformers)", path=..., image_size=None)
        folder = Path(given["path"])
        with translate_foreign(CheckpointError, folder, "it needs the settings of an image processor"):
            processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = given["image_size"] or _side(processor, folder)
        config = FrameEncoderConfig(
            name="transformers",
            image_size=size,
            mean=list(processor.image_mean),
            std=list(processor.image_std),
            settings={"config": read_tower_config(folder)},
        )
        return _measured(config, cls)

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights of the tower."""
        return {f"model.{name}": value for name, value in load_tower_weights(Path(keys["path"])).items()}

    @classmethod
    def build(cls, config: FrameEncoderConfig) -> nn.Module:
        """Build the tower."""
        return TransformersFrames(config)


class TimmFrames(nn.Module):
    """A vision transformer of timm, without its head: pixels to all tokens behind its last norm."""

    def __init__(self, config: FrameEncoderConfig) -> None:
        super().__init__()
        settings = config.settings
        with translate_foreign(ConfigError, f"timm's model {settings['model']!r}", "see timm.list_models()"):
            self.model: Any = timm.create_model(
                settings["model"], num_classes=0, img_size=config.image_size, **settings["args"]
            )

    def forward(self, frames: Tensor) -> Tensor:
        """Map (frames, 3, height, width) to (frames, tokens, width)."""
        states: Tensor = self.model.forward_features(frames)
        return states

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass."""
        self.model.set_grad_checkpointing(enable)


@FRAME_ENCODERS.register("timm")
class TimmFrameEncoder(FrameEncoder):
    """A vision transformer of timm (Wightman 2019).

    Its keys: `model`, timm's name, with its weights from the hub; `path`, a file of weights in their place;
    `image_size`, `args` (arguments of `timm.create_model`).
    """

    @classmethod
    def read(cls, keys: dict[str, Any]) -> FrameEncoderConfig:
        """Return the configuration; size, mean and std are those of timm's pretrained configuration."""
        given = _timm_keys(keys)
        with translate_foreign(ConfigError, f"timm's model {given['model']!r}", "see timm.list_models()"):
            with torch.device("meta"):
                model: Any = timm.create_model(given["model"], num_classes=0, **given["args"])
            data = timm.data.resolve_model_data_config(model)
        config = FrameEncoderConfig(
            name="timm",
            image_size=given["image_size"] or data["input_size"][-1],
            mean=list(data["mean"]),
            std=list(data["std"]),
            settings={"model": given["model"], "args": given["args"]},
        )
        return _measured(config, cls)

    @classmethod
    def load(cls, keys: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights, from a file or from the hub."""
        given = _timm_keys(keys)
        config = cls.read(keys)
        source: dict[str, Any] = {"pretrained": True}
        if given["path"] is not None:
            source = {"checkpoint_path": str(given["path"])}
        with translate_foreign(CheckpointError, f"the weights of timm's model {given['model']!r}"):
            model = timm.create_model(
                given["model"], num_classes=0, img_size=config.image_size, **given["args"], **source
            )
        return {f"model.{name}": value for name, value in model.state_dict().items()}

    @classmethod
    def build(cls, config: FrameEncoderConfig) -> nn.Module:
        """Build the transformer."""
        return TimmFrames(config)


def _timm_keys(keys: dict[str, Any]) -> dict[str, Any]:
    given = take_keys(keys, "model.frame_encoder (timm)", model=..., path=None, image_size=None, args=None)
    return given | {"args": dict(given["args"] or {})}


def _side(processor: Any, folder: Path) -> int:
    """Return the side of the square that an image processor cuts or resizes images to."""
    size = getattr(processor, "crop_size", None) or processor.size
    sides = {int(value) for name in ("height", "width", "shortest_edge") if (value := _get(size, name))}
    if len(sides) != 1:
        raise ConfigError(f"{folder}: its image processor gives no square ({size}); set model.frame_encoder.image_size")
    return sides.pop()


def _get(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def _interpolation(model: nn.Module) -> dict[str, bool]:
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return {"interpolate_pos_encoding": True}
    return {}


def _measured(config: FrameEncoderConfig, entry: type[FrameEncoder]) -> FrameEncoderConfig:
    """Fill in what the module returns for one frame, found by shapes alone.

    Raises:
        ConfigError: no tokens: a convolutional network, or a model that wants other inputs.
    """
    size = config.image_size
    where = f"model.frame_encoder ({config.name}), frames of {size} pixels"
    with translate_foreign(ConfigError, where, "choose another model.frame_encoder.image_size, or another model"):
        shape = output_shape(lambda: entry.build(config), 1, 3, size, size)
    if len(shape) != 3:
        raise ConfigError(f"model.frame_encoder ({config.name}): it returns {tuple(shape)}, no tokens of each frame")
    config.num_tokens, config.hidden_size = shape[1], shape[2]
    # Tokens of patches fill a square; class token and registers come first.
    config.num_prefix_tokens = shape[1] - math.isqrt(shape[1]) ** 2
    return config
