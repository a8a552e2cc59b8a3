"""Run a Q-Former with learned queries and look up position embeddings, for both branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from video_llama.model.precision import keeping_float32

__all__ = ["QFormer", "position_rows", "run_qformer"]


class QFormer(Blip2QFormerModel):
    """BLIP-2's Q-Former, which stays in float32 where all else becomes float16, as transformers' BLIP-2 keeps it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QFormer:
        super()._apply(keeping_float32(fn, torch.float16), recurse)
        return self


def run_qformer(qformer: Blip2QFormerModel, query_tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pool encoder states into the outputs of learned queries (Li et al., BLIP-2, 2023, section 3.1).

    Args:
        qformer: the querying transformer.
        query_tokens: (1, queries, width), shared by the batch.
        states: (batch, tokens, encoder_width).
        mask: (batch, tokens), False on tokens that the queries must not attend to; None for none.

    Returns:
        (batch, queries, width).
    """
    queries = query_tokens.expand(len(states), -1, -1)
    output = qformer(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask)
    return output.last_hidden_state


def position_rows(embedding: nn.Embedding, length: int, mask: Tensor | None = None) -> Tensor:
    """Return the position embeddings of sequences of frames or segments.

    Up to the table's size these are its first rows. For a longer sequence the table is interpolated linearly, its
    first and last row at the ends, so that any number of frames or segments can be read.

    Args:
        embedding: the table, (rows, width).
        length: what the batch is padded to.
        mask: (batch, length), bool, False on padding, which must come last; None if nothing is padded.

    Returns:
        (batch, length, width), zeros on padding; batch is 1 (to be broadcast) without a mask.
    """
    table = _all_rows(embedding)
    if mask is None:
        return _fit_rows(table, length)[None]
    # Each sequence fits the table to its own real length.
    rows = [F.pad(_fit_rows(table, real), (0, 0, 0, length - real)) for real in mask.sum(dim=1).tolist()]
    return torch.stack(rows)


def _all_rows(embedding: nn.Embedding) -> Tensor:
    # accelerate's hook brings an offloaded weight in when its layer is called, and only then.
    if hasattr(embedding, "_hf_hook"):
        return embedding(torch.arange(embedding.num_embeddings))
    return embedding.weight


def _fit_rows(table: Tensor, length: int) -> Tensor:
    if length <= len(table):
        return table[:length]
    if torch.are_deterministic_algorithms_enabled():
        return _interpolate_in_order(table, length)
    columns = table.T[None].float()  # (1, width, rows)
    longer = F.interpolate(columns, size=length, mode="linear", align_corners=True)  # (1, width, length)
    return longer[0].T.to(table.dtype)


def _interpolate_in_order(table: Tensor, length: int) -> Tensor:
    """Interpolate as torch does up to rounding, with a backward pass that adds up in a fixed order on a GPU."""
    # Where each position lies in the table, as a fraction: the first at the first row, the last at the last row.
    places = torch.arange(length, device=table.device) * ((len(table) - 1) / (length - 1))
    # The last position takes the last pair of rows, so that there is always a row after `before`.
    before = places.long().clamp(max=len(table) - 2)
    share = (places - before)[:, None]
    return torch.lerp(table[before].float(), table[before + 1].float(), share).to(table.dtype)
