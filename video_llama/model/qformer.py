"""What the two branches do alike: ask a Q-Former with learned queries, and number the things it looks at."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

__all__ = [
    "PICTURES_AT_ONCE",
    "ask_qformer",
    "encode_in_parts",
    "execution_device",
    "is_offloaded",
    "position_rows",
    "trains",
]

PICTURES_AT_ONCE = 32
"""Frames, or segments of sound, that go through an encoder at once; more would need more memory and gain nothing."""


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


def position_rows(embedding: nn.Embedding, length: int, mask: Tensor | None = None) -> Tensor:
    """Position embeddings for sequences of frames or segments.

    Up to the table's size these are its first rows. A longer sequence stretches the table linearly over itself,
    first and last row at its ends, so that any number of frames or segments can be read.

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
    rows = [F.pad(_fit_rows(table, real), (0, 0, 0, length - real)) for real in mask.sum(dim=1).tolist()]
    return torch.stack(rows)


def _all_rows(embedding: nn.Embedding) -> Tensor:
    if is_offloaded(embedding):  # its weight is brought in when it is called, and only then
        return embedding(torch.arange(embedding.num_embeddings))
    return embedding.weight


def _fit_rows(table: Tensor, length: int) -> Tensor:
    if length <= len(table):
        return table[:length]
    columns = table.T[None].float()  # (1, width, rows)
    stretched = F.interpolate(columns, size=length, mode="linear", align_corners=True)  # (1, width, length)
    return stretched[0].T.to(table.dtype)


def encode_in_parts(encode: Callable[[Tensor], Tensor], pictures: Tensor, at_once: int | None) -> Tensor:
    """The same as `encode(pictures)`, with the memory of `at_once` pictures however many there are.

    Args:
        encode: maps (pictures, ...) to (pictures, ...), each picture by itself.
        pictures: (pictures, ...).
        at_once: None for all, as encoders need it whose weights are shared out: all processes must run them equally
            often.
    """
    if at_once is None or len(pictures) <= at_once:
        return encode(pictures)
    return torch.cat([encode(part) for part in pictures.split(at_once)])


def trains(*modules: nn.Module) -> bool:
    """Whether gradients are wanted for any parameter of the modules; frozen encoders run without a graph."""
    return torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters())


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings weights in for each call of a layer, and takes them away again."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where a layer computes: the device of its weights, or the one that accelerate brings the weight to."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if place is None else torch.device(place)
