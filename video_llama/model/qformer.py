"""What the two branches do alike: ask a Q-Former with learned queries, and number the things it looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from video_llama.model.precision import keeping_float32
from video_llama.model.train_mode import requires_gradients

__all__ = [
    "CHUNK_SIZE",
    "ChunkSize",
    "QFormer",
    "as_frozen",
    "encode_in_chunks",
    "position_rows",
    "run_qformer",
    "trains",
]

ChunkSize = int | Literal["auto"] | None
"""Frames or segments that an encoder takes at once: a number, what suits its device, or (None) all."""

CHUNK_SIZE = 32
"""Frames, or segments of audio, that go through an encoder at once on a CPU, and twice as many on a GPU; more need more
memory and gain nothing."""


class QFormer(Blip2QFormerModel):
    """BLIP-2's Q-Former, which stays in float32 where all else becomes float16, as transformers' BLIP-2 keeps it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QFormer:
        super()._apply(keeping_float32(fn, torch.float16), recurse)
        return self


def run_qformer(qformer: Blip2QFormerModel, query_tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
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
    if hasattr(embedding, "_hf_hook"):  # its weight is brought in when it is called, and only then
        return embedding(torch.arange(embedding.num_embeddings))
    return embedding.weight


def _fit_rows(table: Tensor, length: int) -> Tensor:
    if length <= len(table):
        return table[:length]
    if torch.are_deterministic_algorithms_enabled():
        return _stretch_in_order(table, length)
    columns = table.T[None].float()  # (1, width, rows)
    stretched = F.interpolate(columns, size=length, mode="linear", align_corners=True)  # (1, width, length)
    return stretched[0].T.to(table.dtype)


def _stretch_in_order(table: Tensor, length: int) -> Tensor:
    """The same up to rounding, with a backward pass that adds up in one order on a GPU, too: torch's own has none."""
    places = torch.arange(length, device=table.device) * ((len(table) - 1) / (length - 1))
    before = places.long().clamp(max=len(table) - 2)
    share = (places - before)[:, None]
    return torch.lerp(table[before].float(), table[before + 1].float(), share).to(table.dtype)


def encode_in_chunks(encode: Callable[[Tensor], Tensor], items: Tensor, chunk_size: ChunkSize) -> Tensor:
    """The same as `encode(items)`, with the memory of one chunk however many items there are.

    Args:
        encode: maps (items, ...) to (items, ...), each item by itself.
        items: (items, ...), on the encoder's device.
        chunk_size: None for all, as encoders need it whose weights are shared out: all processes must run them equally
            often.
    """
    if chunk_size == "auto":
        chunk_size = 2 * CHUNK_SIZE if items.is_cuda else CHUNK_SIZE
    if chunk_size is None or len(items) <= chunk_size:
        return encode(items)
    return torch.cat([encode(part) for part in items.split(chunk_size)])


def trains(*modules: nn.Module) -> bool:
    """Whether gradients are wanted for any parameter of the modules; frozen encoders run without a graph."""
    return torch.is_grad_enabled() and any(map(requires_gradients, modules))


@contextlib.contextmanager
def as_frozen(device_type: str, *modules: nn.Module) -> Iterator[None]:
    """Run encoders of which nothing trains without a graph and without autocast.

    They get their inputs in their weights' own precision, in which they compute here as they do when they answer or
    fill the feature cache; autocast would only cast norms and attention to float32 and back. Modules of which
    something trains run as everything else does.

    Args:
        device_type: where they run, e.g. "cuda".
        modules: the encoders.
    """
    has_autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if not has_autocast and not torch.is_grad_enabled():
        yield
        return
    is_trained = any(map(requires_gradients, modules))
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and is_trained))
        if has_autocast and not is_trained:
            settings.enter_context(torch.autocast(device_type, enabled=False))
        yield
