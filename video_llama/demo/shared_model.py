"""One model for several conversations: one computation at a time, and the attention of its Q-Formers."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from video_llama.checkpoints.memory import read_device_memory
from video_llama.conversation import Conversation
from video_llama.errors import DeviceError, OutOfMemoryError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.utils.devices import release_memory

__all__ = ["SharedModel", "attention_shares"]

logger = logging.getLogger(__name__)


class SharedModel(VideoLlama):
    """A `VideoLlama` that threads may use at the same time; they wait for each other.

    Keys and values that conversations keep for their next questions share a budget: those of the conversations that
    were answered longest ago are dropped first, and computed again when they are needed. Where memory runs out, all
    are dropped.

    Args:
        model: the loaded model.
        kept_bytes: the budget; by default half of what the device has free now, the other half being for the work.

    Attributes:
        failure: gets the error of a device that failed for good; no computation succeeds then.
    """

    def __init__(self, model: VideoLlama, kept_bytes: int | None = None) -> None:
        super().__init__(model.model, model.processor)
        self.failure: Future[NoReturn] = Future()
        if kept_bytes is None and (memory := read_device_memory(self.device)) is not None:
            kept_bytes = memory.free // 2
        self.kept_bytes = kept_bytes
        self._lock = threading.Lock()
        # In the order of their last use.
        self._caches: weakref.WeakKeyDictionary[PrefixCache, None] = weakref.WeakKeyDictionary()
        self._shares: weakref.WeakKeyDictionary[EncodedMedia, list[float]] = weakref.WeakKeyDictionary()

    def encode(self, media: VideoFrames | AudioSegments | Tensor) -> EncodedMedia:
        """Encode as `VideoLlama.encode` does, and record the attention unless `media` is a bare tensor."""
        qformer: nn.Module | None = None
        parts = 0
        if isinstance(media, AudioSegments) and self.model.audio_branch is not None:
            qformer, parts = self.model.audio_branch.audio_qformer, len(self.prepare_values(media))
        elif isinstance(media, VideoFrames):
            qformer, parts = self.model.video_branch.attention, len(media.pixel_values)
        if qformer is None:
            with self._watched():
                return super().encode(media)
        # The hooks record every item that passes the Q-Former, so one thread at a time encodes.
        with self._watched(), self._lock, _recorded_attention(qformer) as attention:
            encoded = super().encode(media)
        self._shares[encoded] = attention_shares(attention, parts)
        return encoded

    def shares(self, encoded: EncodedMedia) -> list[float]:
        """Return each frame's or segment's share of the attention of the branch's last Q-Former; they add up to 1.

        Empty for a connector without attention.
        """
        return self._shares.get(encoded, [])

    def prepare(self, conversation: Conversation, media: Sequence[EncodedMedia]) -> Prompt:
        """Prepare a prompt as `VideoLlama.prepare` does."""
        with self._watched():
            return super().prepare(conversation, media)

    def _run(self, prompt: Any, options: Any, cache: PrefixCache | None, **extra: Any) -> list[int]:
        with self._watched(), self._lock:
            ids = super()._run(prompt, options, cache, **extra)
            if cache is not None:
                # Taken out and put in again: the cache used last becomes the last one in order.
                self._caches.pop(cache, None)
                self._caches[cache] = None
                self._drop_caches_beyond(self.kept_bytes)
            return ids

    def _drop_caches_beyond(self, kept_bytes: int | None) -> None:
        """Clear the caches that were used longest ago, until the others take no more than `kept_bytes`."""
        caches = list(self._caches)
        total = sum(cache.num_bytes for cache in caches)
        for cache in caches:
            if kept_bytes is None or total <= kept_bytes:
                return
            total -= cache.num_bytes
            cache.clear()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Free the caches where memory runs out, and record a device that failed."""
        try:
            yield
        except OutOfMemoryError:
            logger.warning("out of memory: the keys and values of all conversations are dropped, to be computed again")
            with self._lock:
                self._drop_caches_beyond(0)
            release_memory()
            raise
        except DeviceError as error:
            # Another thread was first.
            with contextlib.suppress(InvalidStateError):
                self.failure.set_exception(error)
            raise


def attention_shares(attention: list[Tensor], parts: int) -> list[float]:
    """Return the mean attention over layers, heads and queries of each part of the input.

    Args:
        attention: one (1, heads, queries, tokens) per layer, rows that add up to 1.
        parts: frames or segments; each has the same number of tokens, in order.
    """
    mean = torch.stack([layer[0].float().mean(dim=(0, 1)) for layer in attention]).mean(dim=0)  # (tokens,)
    return mean.reshape(parts, -1).sum(dim=1).tolist()


@contextmanager
def _recorded_attention(qformer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the attention of every cross-attention layer, computed again from its queries and keys."""
    recorded: list[Tensor] = []

    def record(layer: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        heads = layer.num_attention_heads
        # The fused attention kernel does not return its weights, so they are computed here from the same inputs.
        query = layer.query(given["hidden_states"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = layer.key(given["encoder_hidden_states"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        recorded.append((query @ key.transpose(-1, -2) * layer.scaling).float().softmax(dim=-1))

    layers = [module for name, module in qformer.named_modules() if name.endswith("crossattention.attention")]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
