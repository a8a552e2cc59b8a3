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

from torch import Tensor

from video_llama.checkpoints.memory import read_device_memory
from video_llama.conversation import Conversation
from video_llama.errors import DeviceError, OutOfMemoryError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.inference.explain import attention_shares, reading_qformer, recorded_attention
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.utils.devices import release_memory

__all__ = ["SharedModel"]

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
        qformer = reading_qformer(self, media)
        if qformer is None:
            with self._watched():
                return super().encode(media)
        # The hooks record every item that passes the Q-Former, so one thread at a time encodes.
        with self._watched(), self._lock, recorded_attention(qformer) as attention:
            encoded = super().encode(media)
        parts = len(media)
        if isinstance(media, AudioSegments):
            # Brought to the model's form, which may have another number of segments.
            parts = len(self.prepare_values(media))
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
