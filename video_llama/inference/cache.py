"""Features of media items that were encoded before, found by what the items contain and not by what they are called."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MAX_ITEMS", "MediaCache", "weights_version"]

MAX_ITEMS = 64
"""That a model keeps which was loaded for answering."""


class MediaCache:
    """The features of the items that were asked for last; several threads may ask.

    An item's content is that of the tensor the model takes, so the same frames of another file are found, and the
    same file read with other settings is not. Hashing a clip takes some milliseconds, encoding it a hundred times as
    long.

    Args:
        max_items: that are kept; a clip of a 7B model takes 0.3 MB in half precision. 0, the default, keeps none.
    """

    def __init__(self, max_items: int = 0) -> None:
        self.max_items = max_items
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, values: Tensor, branch: nn.Module | None, encode: Callable[[], Tensor]) -> Tensor:
        """The features of an item, encoded now if they are not kept.

        Args:
            values: what the item's branch takes.
            branch: what encodes it; what it gave before one of its weights was changed in place no longer counts.
            encode: computes the features.
        """
        if not self.max_items or branch is None:
            return encode()
        key = f"{content_key(values)} {weights_version(branch)}"
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


def weights_version(branch: nn.Module) -> int:
    """Another one after each step of an optimizer and each loading of weights."""
    return sum(parameter._version for parameter in branch.parameters() if not parameter.is_inference())


def content_key(values: Tensor) -> str:
    """A digest of shape, type and numbers."""
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
