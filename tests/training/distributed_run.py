"""Train as one of several processes: `torchrun --nproc_per_node=2 -m tests.training.distributed_run CONFIG …`."""

from __future__ import annotations

import logging
import sys

import torch

from video_llama.config import load_config
from video_llama.training.trainer import Trainer


def drop_nothing(model: torch.nn.Module) -> None:
    """Take all dropout out of a model, also that of attention weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trainer = Trainer(load_config(sys.argv[1], sys.argv[2:]))
    drop_nothing(trainer.model)  # two processes draw otherwise than one
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
