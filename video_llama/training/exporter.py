"""The files of weights that a run writes for use: of each epoch, and of the best validation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from video_llama.checkpoints.adapters import save_adapter
from video_llama.checkpoints.original_layout import is_transformers_folder
from video_llama.checkpoints.trained_run import BEST, adapter_name, checkpoint_name
from video_llama.config import Config
from video_llama.model.parts import adapter_layers
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.checkpoints import cannot_be_written, gather_trainable, rename_folder, write_file
from video_llama.training.export import original_checkpoint
from video_llama.utils.files import INCOMPLETE, write_whole

__all__ = ["Exporter"]

_RECORD = "checkpoints.json"


class Exporter:
    """Write `checkpoint_EPOCH.pth` and `checkpoint_best.pth` in the original's layout, and `adapter_EPOCH` beside them.

    `checkpoints.json` beside them says which file is the best and which the last, and what each holds.

    Args:
        folder: `run.output_dir`.
        model: plain, with the frozen parts; what trains is gathered from `wrapped`, which may be shared out.
        config: of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: VideoLlamaForConditionalGeneration,
        wrapped: nn.Module,
        config: Config,
    ) -> None:
        self._accelerator, self._folder = accelerator, folder
        self._model, self._wrapped, self._config = model, wrapped, config

    @property
    def best_file(self) -> Path:
        """Return the path of the best weights."""
        return self._folder / checkpoint_name(BEST)

    def export(self, epoch: int, iteration: int) -> None:
        """Write the weights as those of an epoch; call it on every process.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._export(epoch, "last", epoch, iteration)

    def export_best(self, epoch: int, iteration: int, **figures: float) -> None:
        """Write the weights as the best so far, with the figures that they are best by; call it on every process.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._export(BEST, BEST, epoch, iteration, **figures)

    def best_iteration(self) -> int | None:
        """Return the iteration whose weights the best file holds, None if there is none."""
        if not self.best_file.exists():
            return None
        iteration: int | None = self._read().get(BEST, {}).get("iteration")
        return iteration

    def _export(self, name: int | str, kind: str, epoch: int, iteration: int, **figures: float) -> None:
        # Gathering needs every process, although only one of them writes.
        trained = gather_trainable(self._wrapped)
        if self._accelerator.is_main_process:
            file = checkpoint_name(name)
            # The adapter first: a checkpoint that is there has its adapter beside it.
            if adapter_layers(self._model):
                self._write_adapter(self._folder / adapter_name(name))
            write_file(self._folder / file, original_checkpoint(self._model, trained, self._config, epoch))
            what = {"file": file, "epoch": epoch, "iteration": iteration, **figures}
            content = json.dumps({**self._read(), kind: what}, indent=2) + "\n"
            write_whole(self._folder / _RECORD, lambda partial: partial.write_text(content, encoding="utf-8"))
        self._accelerator.wait_for_everyone()

    def _write_adapter(self, folder: Path) -> None:
        in_progress = folder.with_name(folder.name + INCOMPLETE)
        shutil.rmtree(in_progress, ignore_errors=True)
        base = self._config.model.ckpt
        if base is not None and not is_transformers_folder(Path(base).expanduser()):
            # Other checkpoints are a part of the model that the adapter belongs to.
            base = None
        try:
            save_adapter(self._model, in_progress, base)
            rename_folder(in_progress, folder)
        except (OSError, SafetensorError) as error:
            raise cannot_be_written(folder, error) from error

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads((self._folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Absent in the folders of older versions; written anew with the next file.
            return {}
        return record if isinstance(record, dict) else {}
