"""Find the model that a training run wrote: its configuration with the checkpoint of its last epoch, or its best."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from video_llama.config import ModelConfig, load_config
from video_llama.errors import CheckpointError
from video_llama.model.parts import AUDIO_PARTS, trained_parts

__all__ = [
    "BEST",
    "CONFIG_FILE",
    "TrainedRun",
    "adapter_beside",
    "adapter_name",
    "checkpoint_name",
    "find_trained_run",
    "run_checkpoint",
]

CONFIG_FILE = "config.yaml"
BEST = "best"
_CHECKPOINT = re.compile(r"checkpoint_(\d+|best)\.pth")


def checkpoint_name(epoch: int | str) -> str:
    """Return the name of the file that an epoch of a run writes, or of its best weights, as in the original."""
    return f"checkpoint_{epoch}.pth"


def adapter_name(epoch: int | str) -> str:
    """Return the name of the adapter's folder beside the file of the same epoch."""
    return f"adapter_{epoch}"


def adapter_beside(checkpoint: Path) -> Path:
    """Return the folder of the adapter that belongs to a `checkpoint_EPOCH.pth`, whether there is one or not."""
    return checkpoint.with_name(adapter_name(checkpoint.stem.partition("_")[2]))


@dataclass(frozen=True)
class TrainedRun:
    """A run as a model.

    Args:
        section: the model section of its configuration, with the checkpoint of what was trained in the place of what
            the run started from, and its adapter.
        checkpoint: that file.
        base: `model.ckpt` of the run itself.
    """

    section: ModelConfig
    checkpoint: Path
    base: str | None


def find_trained_run(path: str | os.PathLike[str]) -> TrainedRun | None:
    """Return what a run's configuration and its checkpoint say of the model that it trained.

    Args:
        path: an `output_dir`, which stands for the file that `run_checkpoint` says, or a `checkpoint_EPOCH.pth` or
            `adapter_EPOCH` in it; None is returned for anything else.

    Raises:
        CheckpointError: as `run_checkpoint`.
        ConfigError: its configuration cannot be read.
    """
    path = Path(path).expanduser()
    if path.name.startswith("adapter_"):
        path = path.with_name(checkpoint_name(path.name.removeprefix("adapter_")))
    if path.is_file() and _CHECKPOINT.fullmatch(path.name) and (path.parent / CONFIG_FILE).is_file():
        checkpoint, folder = path, path.parent
    else:
        found = run_checkpoint(path)
        if found is None:
            return None
        checkpoint, folder = found, path
    config = load_config(folder / CONFIG_FILE).model
    # A checkpoint of a run holds only what was trained. A frozen branch keeps the file that the configuration names.
    trained, base = trained_parts(config), config.ckpt
    if adapter_beside(checkpoint).is_dir():
        config.adapter = str(adapter_beside(checkpoint))
    if trained & AUDIO_PARTS:
        config.ckpt_2 = str(checkpoint)
    if trained - AUDIO_PARTS:
        config.ckpt = str(checkpoint)
    return TrainedRun(config, checkpoint, base)


def run_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that the folder of a run stands for; None if the folder is no run's.

    That is the one of its last epoch or, with `run.load_best_model_at_end`, the one of its lowest validation loss.

    Raises:
        CheckpointError: the run has not finished an epoch, or not validated.
        ConfigError: its configuration cannot be read.
    """
    if not ((folder / CONFIG_FILE).is_file() and (folder / "log.jsonl").is_file()):
        return None
    if load_config(folder / CONFIG_FILE).run.load_best_model_at_end:
        best = folder / checkpoint_name(BEST)
        if not best.is_file():
            raise CheckpointError(
                f"{folder}: this training run stands for its best checkpoint (run.load_best_model_at_end), but there "
                f"is no {best.name} yet: it has not validated. Name one of its checkpoint_EPOCH.pth instead"
            )
        return best
    # Compare epochs as numbers: as text, checkpoint_10 would come before checkpoint_9.
    matches = ((_CHECKPOINT.fullmatch(file.name), file) for file in folder.iterdir())
    found = [(int(match[1]), file) for match, file in matches if match and match[1] != BEST]
    if not found:
        raise CheckpointError(f"{folder}: this training run has not finished an epoch; there is no checkpoint_0.pth")
    return max(found)[1]
