"""What the two branches do alike: ask a Q-Former with learned queries, and number the things it looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

__all__ = ["ask_qformer", "position_rows", "trains"]


def ask_qformer(qformer: Blip2QFormerModel, query_tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Let learned queries gather what they need from encoder states (Li et al., BLIP-2, 2023, section 3.1).

    Args:
        qformer: the querying transformer.
        query_tokens: (1, queries, width), shared by the batch.
        states: (batch, tokens, encoder_width).
        mask: (batch, tokens), True where a token may be looked at; None for all.

    Returns:
        (batch, queries, width).
    """
    queries = query_tokens.expand(len(states), -1, -1)
    answer = qformer(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask)
    return answer.last_hidden_state


def position_rows(table: Tensor, lengths: Tensor, padded_length: int) -> Tensor:
    """Position embeddings for sequences of the given lengths.

    Up to the table's size these are its first rows. A longer sequence stretches the table linearly over itself,
    first and last row at its ends, so that any number of frames or segments can be read.

    Args:
        table: (rows, width).
        lengths: (batch,), int64, the true length of each sequence.
        padded_length: what the batch is padded to.

    Returns:
        (batch, padded_length, width), zeros where nothing is.
    """
    rows = table.new_zeros(len(lengths), padded_length, table.shape[1])
    for row, length in zip(rows, lengths.tolist(), strict=True):
        row[:length] = table[:length] if length <= len(table) else _stretch(table, length)
    return rows


def _stretch(table: Tensor, length: int) -> Tensor:
    columns = table.T[None].float()  # (1, width, rows)
    return F.interpolate(columns, size=length, mode="linear", align_corners=True)[0].T.to(table.dtype)


def trains(*modules: nn.Module) -> bool:
    """Whether gradients are wanted for any parameter of the modules; frozen encoders run without a graph."""
    return torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters())
