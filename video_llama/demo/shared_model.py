"""One model for several conversations: one computation at a time, and where its Q-Formers looked."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from video_llama.model.generation import PrefixCache
from video_llama.model.inference import EncodedMedia, VideoLlama
from video_llama.processor.media import AudioSegments, VideoFrames

__all__ = ["SharedModel", "attention_shares"]


class SharedModel(VideoLlama):
    """A `VideoLlama` that threads may use at the same time; they wait for each other.

    What it encodes, it also measures: `shares(encoded)` says which part of the attention of the branch's last
    Q-Former went to each frame or segment.
    """

    def __init__(self, model: VideoLlama) -> None:
        super().__init__(model.model, model.processor)
        self._lock = threading.Lock()
        self._shares: weakref.WeakKeyDictionary[EncodedMedia, list[float]] = weakref.WeakKeyDictionary()

    def encode(self, media: VideoFrames | AudioSegments | Tensor) -> EncodedMedia:
        """As `VideoLlama.encode`, with the attention recorded unless `media` is a bare tensor."""
        if isinstance(media, AudioSegments) and self.model.audio_branch is not None:
            qformer, parts = self.model.audio_branch.audio_qformer, len(self.prepare_values(media))
        elif isinstance(media, VideoFrames):
            qformer, parts = self.model.video_branch.video_qformer, len(media.pixel_values)
        else:
            return super().encode(media)
        with self._lock, _recorded_attention(qformer) as attention:
            encoded = super().encode(media)
        self._shares[encoded] = attention_shares(attention, parts)
        return encoded

    def shares(self, encoded: EncodedMedia) -> list[float]:
        """For every frame or segment its share of the attention; the shares add up to 1."""
        return self._shares[encoded]

    def _run(self, prompt: Any, options: Any, cache: PrefixCache | None, **extra: Any) -> list[int]:
        with self._lock:
            return super()._run(prompt, options, cache, **extra)


def attention_shares(attention: list[Tensor], parts: int) -> list[float]:
    """The mean over layers, heads and queries of what each part of the input got.

    Args:
        attention: one (1, heads, queries, tokens) per layer, rows that add up to 1.
        parts: frames or segments; each has the same number of tokens, in order.
    """
    mean = torch.stack([layer[0].float().mean(dim=(0, 1)) for layer in attention]).mean(dim=0)  # (tokens,)
    return mean.reshape(parts, -1).sum(dim=1).tolist()


@contextmanager
def _recorded_attention(qformer: nn.Module) -> Iterator[list[Tensor]]:
    """The attention of every cross-attention layer, computed from its queries and keys when the layer runs."""
    recorded: list[Tensor] = []
    handles = []

    def record(layer: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        queries, states = given["hidden_states"], given["encoder_hidden_states"]
        heads = layer.num_attention_heads
        query = layer.query(queries).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = layer.key(states).unflatten(-1, (heads, -1)).transpose(1, 2)
        recorded.append((query @ key.transpose(-1, -2) * layer.scaling).float().softmax(dim=-1))

    for name, module in qformer.named_modules():
        if name.endswith("crossattention.attention"):
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
