"""What all prompts of a run begin with is computed once."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from video_llama.model.video_llama import cache_argument

__all__ = ["SharedPrefix"]

_MIN_PREFIX = 8  # a shorter common beginning is not worth a forward pass of its own


class KnownPrompt(Protocol):
    """A prompt of which is known what stands where: a token id, or something else for media."""

    @property
    def keys(self) -> Sequence[Hashable]: ...

    @property
    def inputs_embeds(self) -> Tensor: ...


class SharedPrefix:
    """Keys and values of what all prompts of a run begin with: the system prompt, up to the first media."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self._states: Cache | None = None

    @torch.inference_mode()
    def take(self, model: PreTrainedModel, prompts: Sequence[KnownPrompt]) -> tuple[int, Cache | None]:
        """How many positions the prompts have in common, and their states, once for each prompt.

        The states are computed when the prompts begin otherwise than those before; 0 and None if too little is
        in common.
        """
        length = _common_length([prompt.keys for prompt in prompts])
        if length < _MIN_PREFIX:
            return 0, None
        if self.keys[:length] != list(prompts[0].keys[:length]):
            computed = DynamicCache()
            embeds = prompts[0].inputs_embeds[:, :length]
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **{cache_argument(model.forward): computed})
            self.keys, self._states = list(prompts[0].keys[:length]), computed  # together, or not at all
        states = copy.deepcopy(self._states)
        assert states is not None
        if surplus := len(self.keys) - length:
            states.crop(-surplus)
        if len(prompts) > 1:
            states.batch_repeat_interleave(len(prompts))
        return length, states


def _common_length(keys: Sequence[Sequence[Hashable]]) -> int:
    """Leading positions that are the same text everywhere; always short of the last position."""
    shortest = min(len(row) for row in keys) - 1
    for position in range(shortest):
        first = keys[0][position]
        if not isinstance(first, int) or any(row[position] != first for row in keys):
            return position
    return max(0, shortest)
