"""Items of unequal length as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["pad_ids", "pad_items"]


def pad_items(items: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack media items; shorter ones end in zeros.

    Args:
        items: (length_i, …) each, with equal shapes behind the length.

    Returns:
        (items, longest, …), and a bool mask (items, longest) that is False on padding; None without padding.

    Raises:
        ValueError: the shapes behind the length differ.
    """
    shapes = {tuple(item.shape[1:]) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"media items of different sizes cannot form a batch: {sorted(shapes)}")
    lengths = torch.tensor([len(item) for item in items])
    stacked = torch.nn.utils.rnn.pad_sequence(list(items), batch_first=True)  # (items, longest, …)
    mask = torch.arange(stacked.shape[1]) < lengths[:, None]
    return stacked, None if bool(mask.all()) else mask


def pad_ids(prompts: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Stack prompts as input_ids and attention_mask, (prompts, longest), int64 each."""
    length = max(len(prompt) for prompt in prompts)

    def fill(prompt: Sequence[int], value: int) -> list[int]:
        padding = [value] * (length - len(prompt))
        return [*padding, *prompt] if side == "left" else [*prompt, *padding]

    ids = torch.tensor([fill(prompt, pad_id) for prompt in prompts], dtype=torch.long)
    mask = torch.tensor([fill([1] * len(prompt), 0) for prompt in prompts], dtype=torch.long)
    return ids, mask
