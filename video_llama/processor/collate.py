"""Items of unequal length as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["pad_ids", "pad_items"]


def pad_items(items: Sequence[Tensor], device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
    """Stack media items; shorter ones end in zeros.

    Args:
        items: (length_i, …) each, with equal shapes behind the length.
        device: where the batch goes, by default where the items are. Each item is copied to its place in the batch
            there, and the host pads nothing; from pinned memory to a GPU, it does not wait either.

    Returns:
        (items, longest, …), and a bool mask (items, longest) that is False on padding; None without padding.

    Raises:
        ValueError: the shapes behind the length differ, or the types do.
    """
    if len(types := {item.dtype for item in items}) > 1:
        raise ValueError(f"media items of different types cannot form a batch: {sorted(map(str, types))}")
    shapes = {tuple(item.shape[1:]) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"media items of different sizes cannot form a batch: {sorted(shapes)}")
    device = torch.device(items[0].device if device is None else device)
    lengths = [len(item) for item in items]
    is_padded = min(lengths) < max(lengths)
    shape = (len(items), max(lengths), *items[0].shape[1:])
    # Zeros are needed only where something is padded; otherwise every value is overwritten.
    stacked = (torch.zeros if is_padded else torch.empty)(shape, dtype=items[0].dtype, device=device)
    for row, item in zip(stacked, items, strict=True):
        row[: len(item)].copy_(item, non_blocking=device.type == "cuda")
    if not is_padded:
        return stacked, None
    # True at the positions below each item's length.
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return stacked, mask.to(device, non_blocking=device.type == "cuda")


def pad_ids(
    prompts: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Stack prompts as input_ids and attention_mask, (prompts, length), int64 each; by default of the longest one."""
    if length is None:
        length = max(len(prompt) for prompt in prompts)

    def fill(prompt: Sequence[int], value: int) -> list[int]:
        padding = [value] * (length - len(prompt))
        return [*padding, *prompt] if side == "left" else [*prompt, *padding]

    ids = torch.tensor([fill(prompt, pad_id) for prompt in prompts], dtype=torch.long)
    mask = torch.tensor([fill([1] * len(prompt), 0) for prompt in prompts], dtype=torch.long)
    return ids, mask
