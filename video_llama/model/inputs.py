"""The arguments of `forward` and `generate`: those that are media, and those of the language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["MEDIA_INPUTS", "cache_argument", "check_embeds_alone", "decoder_inputs", "pop_media"]

MEDIA_INPUTS = (
    *("pixel_values", "frame_mask", "audio_values", "segment_mask", "audio_pixel_values"),
    *("frame_tokens", "segment_vectors", "video_features", "audio_features", "placeholders"),
)
"""Arguments of `forward` and `generate` that are media, features of media, or their places."""


def pop_media(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `get_inputs_embeds` out of those of `forward` or `generate`."""
    return {name: arguments.pop(name) for name in MEDIA_INPUTS if name in arguments}


def check_embeds_alone(**others: Any) -> None:
    """Check that nothing is given beside `inputs_embeds` that these hold already.

    Raises:
        ValueError: something is; it would have no effect.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"inputs_embeds hold the prompt and its media already: leave out {', '.join(given)}")


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return what a language model of this version of transformers calls the keys and values of earlier tokens."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def decoder_inputs(
    forward: Callable[..., Any], attention_mask: Tensor | None, position_ids: Tensor | None, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments of a language model beside its embeddings.

    Args:
        forward: of the language model.
        attention_mask, position_ids: as for `VideoLlamaForConditionalGeneration.forward`.
        kwargs: the cache, under either name, and what is passed on as it is.
    """
    # What processors may add for models that mask images otherwise.
    kwargs.pop("mm_token_type_ids", None)
    # `cache` is the name in newer versions of transformers.
    past = kwargs.pop("past_key_values", None)
    past = kwargs.pop("cache", past)
    if position_ids is None and past is None and attention_mask is not None and attention_mask.ndim == 2:
        # Left padding must not shift positions.
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    if past is not None:
        kwargs[cache_argument(forward)] = past
    return kwargs | {"attention_mask": attention_mask, "position_ids": position_ids}
