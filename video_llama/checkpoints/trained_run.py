"""The output folder of a training run as a model: its configuration with the checkpoint that it wrote."""

from __future__ import annotations

import os
import re
from pathlib import Path

from video_llama.config import ModelConfig, load_config
from video_llama.errors import CheckpointError

__all__ = ["CONFIG_FILE", "checkpoint_name", "find_trained_run", "newest_checkpoint"]

CONFIG_FILE = "config.yaml"
_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pth")


def checkpoint_name(epoch: int | str) -> str:
    """The file that an epoch of a run writes, as in the original."""
    return f"checkpoint_{epoch}.pth"


def find_trained_run(path: str | os.PathLike[str]) -> ModelConfig | None:
    """The model that a run trained, from its last epoch or from the one whose `checkpoint_EPOCH.pth` is given.

    Args:
        path: an `output_dir`, or a checkpoint in it.

    Returns:
        the model section of the run's configuration, with the trained branch's checkpoint; None if the path is
        something else.

    Raises:
        CheckpointError: the run has not finished an epoch.
        ConfigError: its configuration cannot be read.
    """
    path = Path(path).expanduser()
    is_file = path.is_file() and _CHECKPOINT.fullmatch(path.name) is not None
    folder = path.parent if is_file else path
    if not (folder / CONFIG_FILE).is_file() or not (is_file or _is_run(folder)):
        return None
    config = load_config(folder / CONFIG_FILE).model
    checkpoint = str(path if is_file else newest_checkpoint(folder))
    if not config.frozen_audio_Qformer:
        config.ckpt_2 = checkpoint
    if not (config.frozen_video_Qformer and config.frozen_llama_proj):
        config.ckpt = checkpoint
    return config


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the last epoch of a run wrote; None if the folder is no run's.

    Raises:
        CheckpointError: the run has not finished an epoch.
    """
    if not _is_run(folder):
        return None
    found = [(int(match[1]), file) for file in folder.iterdir() if (match := _CHECKPOINT.fullmatch(file.name))]
    if not found:
        raise CheckpointError(f"{folder}: this training run has not finished an epoch; there is no checkpoint_0.pth")
    return max(found)[1]


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / "log.jsonl").is_file()
