"""Packages that only some features need: import them when needed, or say how to install them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from video_llama.errors import ConfigError

__all__ = ["EXTRAS", "how_to_install", "import_extra", "is_installed", "require_extra"]

EXTRAS = {
    "aiohttp": "remote",
    "bitsandbytes": "quantization",
    "datasets": "datasets",
    "decord": "decord",
    "gcsfs": "remote",
    "gradio": "demo",
    "matplotlib": "plots",
    "peft": "lora",
    "pillow_heif": "heif",
    "pyarrow": "tables",
    "pycocoevalcap": "metrics",
    "ray": "ray",
    "s3fs": "remote",
    "tensorboard": "trackers",
    "vllm": "vllm",
    "wandb": "trackers",
    "webdataset": "train",
}
"""The extra of video_llama (pyproject.toml) that installs a package."""


def how_to_install(package: str) -> str:
    """Return the command that installs a package, through an extra if one has it."""
    if package in EXTRAS:
        return f'pip install "video_llama[{EXTRAS[package]}]"'
    return f"pip install {package}"


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require_extra(package: str, purpose: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: a key of `EXTRAS`.
        purpose: what needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    if not is_installed(package):
        raise ConfigError(f"{purpose}: {package} is not installed: {how_to_install(package)}")


def import_extra(module: str, purpose: str) -> Any:
    """Import a package of `EXTRAS`, or a module of one.

    Raises:
        ConfigError: the package is not installed. Its own import errors are passed on.
    """
    require_extra(module.partition(".")[0], purpose)
    return importlib.import_module(module)
