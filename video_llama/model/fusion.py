"""Put media features where the prompt says they go."""

from __future__ import annotations

from torch import Tensor

__all__ = ["splice_features"]


def splice_features(inputs_embeds: Tensor, positions: Tensor, features: Tensor, what: str) -> Tensor:
    """Replace the embeddings at the placeholder positions by media features, in order of appearance.

    Args:
        inputs_embeds: (batch, length, width).
        positions: (batch, length), bool, True on placeholders.
        features: (items, tokens, width), on any device; items of the whole batch, first sample first.
        what: "image" or "sound", for the error message.

    Returns:
        (batch, length, width), with the dtype and the device of `inputs_embeds`; differentiable in both inputs.

    Raises:
        ValueError: the number of placeholders is not items * tokens.
    """
    placeholders, available = int(positions.sum()), features.shape[0] * features.shape[1]
    if placeholders != available:
        raise ValueError(
            f"the prompt holds {placeholders} {what} placeholder ids, but {features.shape[0]} {what} item(s) of "
            f"{features.shape[1]} tokens were given; each item needs one run of placeholders"
        )
    return inputs_embeds.masked_scatter(positions[..., None], features.to(inputs_embeds))
