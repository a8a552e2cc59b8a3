"""Put media features where the prompt says they go."""

from __future__ import annotations

from torch import Tensor

from video_llama.model.configuration import VideoLlamaConfig

__all__ = ["find_placeholders", "splice_features"]


def find_placeholders(input_ids: Tensor, config: VideoLlamaConfig) -> tuple[Tensor, Tensor]:
    """Find where the media of a batch go.

    On a GPU this waits for it: who has the ids on the CPU calls it there.

    Args:
        input_ids: (batch, length), int64.
        config: names the placeholder ids.

    Returns:
        positions of images and of sounds in the flattened ids, (positions,), int64 each, on the device of the ids.
    """
    ids = input_ids.flatten()
    return (ids == config.image_token_id).nonzero()[:, 0], (ids == config.audio_token_id).nonzero()[:, 0]


def splice_features(inputs_embeds: Tensor, positions: Tensor, features: Tensor, what: str) -> Tensor:
    """Replace the embeddings at the placeholder positions by media features, in order of appearance.

    Args:
        inputs_embeds: (batch, length, width).
        positions: (positions,), int64, of placeholders among the batch * length embeddings.
        features: (items, tokens, width), on any device; items of the whole batch, first sample first.
        what: "image" or "sound", for the error message.

    Returns:
        (batch, length, width), with the dtype and the device of `inputs_embeds`; differentiable in both inputs.

    Raises:
        ValueError: the number of placeholders is not items * tokens.
    """
    placeholders, available = len(positions), features.shape[0] * features.shape[1]
    if placeholders != available:
        raise ValueError(
            f"the prompt holds {placeholders} {what} placeholder ids, but {features.shape[0]} {what} item(s) of "
            f"{features.shape[1]} tokens were given; each item needs one run of placeholders"
        )
    rows, columns = (
        index.to(inputs_embeds.device, non_blocking=True)
        for index in (positions // inputs_embeds.shape[1], positions % inputs_embeds.shape[1])
    )
    # No view of something flat: what compiles a layer would do so once more for its first input.
    return inputs_embeds.index_put((rows, columns), features.flatten(0, 1).to(inputs_embeds))
