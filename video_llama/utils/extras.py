"""Packages that only some uses need: imported when needed, and an error that says how to install them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from video_llama.errors import ConfigError

__all__ = ["EXTRAS", "how_to_install", "import_extra", "require_extra"]

EXTRAS = {
    "bitsandbytes": "quantization",
    "decord": "decord",
    "gradio": "demo",
    "matplotlib": "plots",
    "pycocoevalcap": "metrics",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "webdataset": "train",
}
"""Of each importable package, the extra of video_llama that installs it (pyproject.toml)."""


def how_to_install(package: str) -> str:
    """The command that installs a package, through an extra if one has it."""
    return f'pip install "video_llama[{EXTRAS[package]}]"' if package in EXTRAS else f"pip install {package}"


def require_extra(package: str, purpose: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: a key of `EXTRAS`.
        purpose: what needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{purpose}: {package} is not installed: {how_to_install(package)}")


def import_extra(module: str, purpose: str) -> Any:
    """Import a package of `EXTRAS`, or a module of one.

    Raises:
        ConfigError: the package is not installed. What goes wrong inside of it comes through as it is.
    """
    require_extra(module.partition(".")[0], purpose)
    return importlib.import_module(module)
