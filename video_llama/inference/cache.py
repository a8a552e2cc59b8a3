"""Keep what is computed once and reused: features of media, and keys and values of the beginnings of prompts."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from video_llama.model.inputs import cache_argument

__all__ = ["MAX_ITEMS", "MediaCache", "PrefixCache", "SharedPrefix", "weights_version"]

MAX_ITEMS = 64
"""Media items whose features a model keeps that `load_pretrained_model` loads."""

# A shorter common beginning does not pay for a forward pass of its own.
_MIN_PREFIX = 8


class MediaCache:
    """The features of the last `max_items` media items; several threads may use it.

    The key is a hash of the tensor that the model takes: the same frames from another file are found, and the same
    file read with other settings is not. Hashing a clip takes milliseconds, encoding it a hundred times as long, and
    the features of a clip in a 7B model take 0.3 MB in half precision.
    """

    def __init__(self, max_items: int = 0) -> None:
        self.max_items = max_items
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, values: Tensor, branch: nn.Module | None, encode: Callable[[], Tensor]) -> Tensor:
        """Return the features of what a branch takes, computed by `encode` if they are not kept.

        Features from before an in-place change of the branch's weights do not count.
        """
        # Without a branch encoding is an error, which `encode` raises.
        if not self.max_items or branch is None:
            return encode()
        # The version of the weights is part of the key: features of old weights are never found, and drop out in time.
        key = f"{content_key(values)} {weights_version(branch)}"
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        # Without the lock, so that other threads need not wait for the device.
        features = encode()
        with self._lock:
            self._features[key] = features
            # The items are in the order of their last use, so the first one is dropped.
            while len(self._features) > self.max_items:
                self._features.popitem(last=False)
        return features

    def clear(self) -> None:
        """Drop all features, for instance because the weights have changed."""
        with self._lock:
            self._features.clear()


def weights_version(branch: nn.Module) -> int:
    """Return a number that changes with each optimizer step and each loading of weights."""
    # torch counts the in-place changes of a tensor, but not of one made in inference mode.
    return sum(parameter._version for parameter in branch.parameters() if not parameter.is_inference())


def content_key(values: Tensor) -> str:
    """Return a digest of shape, dtype and values."""
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    # The hash takes bytes, so it works for every dtype, also for bfloat16, which numpy does not have.
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(eq=False)
class PrefixCache:
    """Keys and values (`states`) of what a conversation has already computed, and what stood there (`keys`).

    A new prompt reuses the positions up to the first difference, whatever caused it: a dropped turn, an edited
    question, an answer that tokenises differently.
    """

    keys: list[Hashable] = field(default_factory=list)
    states: Cache | None = None

    def take(self, keys: Sequence[Hashable]) -> Cache:
        """Hand over the states of the longest common prefix; a failure before `put` leaves an empty cache."""
        # Always short of the last key: `generate` needs a new position to compute.
        shared = _common_length(self.keys, keys[:-1])
        states, surplus = self.states, len(self.keys) - shared
        # Generation extends the states in place. If it fails, half changed states must not stay here.
        self.clear()
        if states is None or shared == 0:
            return DynamicCache()
        if surplus:
            # A negative length removes so many positions from the end: all after the first difference.
            states.crop(-surplus)
        return states

    def put(self, keys: Sequence[Hashable], states: Cache) -> None:
        """Keep the states of those `keys` that were processed."""
        self.keys = list(keys[: states.get_seq_length()])
        self.states = states

    @property
    def num_bytes(self) -> int:
        """Return the size of keys and values in bytes, on all devices together."""
        if self.states is None:
            return 0
        kept = (getattr(layer, name, None) for layer in self.states.layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def clear(self) -> None:
        """Drop everything and free its memory."""
        self.keys, self.states = [], None


class SharedPrefix:
    """Keys and values of what all prompts of a run begin with: the system prompt, up to the first media."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self._states: Cache | None = None

    @torch.inference_mode()
    def take(
        self, model: PreTrainedModel, rows: Sequence[Sequence[Hashable]], inputs_embeds: Tensor
    ) -> tuple[int, Cache | None]:
        """Return how many positions the prompts have in common, and their states, repeated for each prompt.

        Args:
            model: the language model, alone or within the whole model.
            rows: the keys of each prompt, as in `Prompt`.
            inputs_embeds: (1, length, width), the first prompt.

        Returns:
            0 and None if too little is common.
        """
        length = _common_text_length(rows)
        if length < _MIN_PREFIX:
            return 0, None
        first = list(rows[0][:length])
        # The kept states also serve a shorter beginning: they are cut below. Only other text is computed anew.
        if self.keys[:length] != first:
            computed = DynamicCache()
            cache = {cache_argument(model.forward): computed}
            model(inputs_embeds=inputs_embeds[:, :length], use_cache=True, logits_to_keep=1, **cache)
            # Only now, so that an error leaves the old keys with the old states.
            self.keys, self._states = first, computed
        # Generation extends the states in place, so each batch gets its own copy.
        states = copy.deepcopy(self._states)
        assert states is not None
        if surplus := len(self.keys) - length:
            states.crop(-surplus)
        if len(rows) > 1:
            states.batch_repeat_interleave(len(rows))
        return length, states


def _common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return how many leading keys are equal."""
    shortest = min(len(first), len(second))
    for position in range(shortest):
        if first[position] != second[position]:
            return position
    return shortest


def _common_text_length(rows: Sequence[Sequence[Hashable]]) -> int:
    """Return how many leading positions hold the same text in all rows, always short of the last position."""
    # The last position of the shortest prompt stays out: `generate` needs a new one to compute.
    length = min(_common_length(rows[0], row[:-1]) for row in rows)
    for position in range(length):
        if not isinstance(rows[0][position], int):
            return position
    return length
