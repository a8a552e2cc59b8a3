"""`Config` as the original's scripts use it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from video_llama.config import Config as Configuration
from video_llama.config import load_config

__all__ = ["Config"]

logger = logging.getLogger(__name__)


class Config:
    """A configuration file with the overrides of the command line.

    Args:
        args: has `cfg_path` and, if there are overrides, `options`: a list of `section.key=value`.

    Attributes:
        configuration: the same as dataclasses, as `load_config` returns it.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; as `load_config`.
    """

    def __init__(self, args: Any) -> None:
        options: Sequence[str] = getattr(args, "options", None) or ()
        self.configuration: Configuration = load_config(args.cfg_path, options)
        self.config: DictConfig = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(self.configuration)))

    @property
    def model_cfg(self) -> DictConfig:
        """Return the model section."""
        return self.config.model

    @property
    def run_cfg(self) -> DictConfig:
        """Return the run section."""
        return self.config.run

    @property
    def datasets_cfg(self) -> DictConfig:
        """Return the sections of the datasets by name."""
        return self.config.datasets

    def pretty_print(self) -> None:
        """Log all settings as YAML."""
        logger.info("\n%s", OmegaConf.to_yaml(self.config))

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain dictionaries."""
        return dict(OmegaConf.to_container(self.config))
