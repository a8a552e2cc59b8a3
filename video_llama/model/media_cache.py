"""Features of media items that were encoded before, found by what the items contain and not by what they are called."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MediaCache"]

MAX_ITEMS = 64


class MediaCache:
    """The features of the items that were asked for last; several threads may ask.

    An item's content is that of the tensor the model takes, so the same frames of another file are found, and the
    same file read with other settings is not. Hashing a clip takes some milliseconds, encoding it a hundred times as
    long.

    Args:
        max_items: that are kept; a clip of a 7B model takes 0.3 MB in half precision. 0 keeps none.
    """

    def __init__(self, max_items: int = MAX_ITEMS) -> None:
        self.max_items = max_items
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, values: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """The features of an item, encoded now if they are not kept.

        Args:
            values: what the item's branch takes.
            encode: computes the features.
        """
        if not self.max_items:
            return encode()
        key = content_key(values)
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        features = encode()
        with self._lock:
            self._features[key] = features
            while len(self._features) > self.max_items:
                self._features.popitem(last=False)
        return features

    def clear(self) -> None:
        """Forget all, for instance because the weights have changed."""
        with self._lock:
            self._features.clear()


def content_key(values: Tensor) -> str:
    """A digest of shape, type and numbers."""
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
