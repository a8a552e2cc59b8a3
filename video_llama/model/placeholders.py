"""Where media go in a prompt: the ids that stand for them, and the features put there."""

from __future__ import annotations

from torch import Tensor

from video_llama.model.configuration import VideoLlamaConfig

__all__ = ["check_number", "find_placeholders", "splice_features"]


def find_placeholders(input_ids: Tensor, config: VideoLlamaConfig) -> tuple[Tensor, Tensor]:
    """Find where the media of a batch go.

    On a GPU this waits for the device: call it while the ids are on the CPU where possible.

    Args:
        input_ids: (batch, length), int64.
        config: names the placeholder ids.

    Returns:
        positions of images and of audio in the flattened ids, (positions,), int64 each, on the device of the ids.
    """
    ids = input_ids.flatten()
    return (ids == config.image_token_id).nonzero()[:, 0], (ids == config.audio_token_id).nonzero()[:, 0]


def splice_features(inputs_embeds: Tensor, positions: Tensor | None, features: Tensor | None, modality: str) -> Tensor:
    """Replace the embeddings at the placeholder positions by media features, in order of appearance.

    Args:
        inputs_embeds: (batch, length, width).
        positions: (positions,), int64, of placeholders among the batch * length embeddings; None puts the features
            nowhere, and only lets their gradient of zero reach the branch.
        features: (items, tokens, width), on any device; items of the whole batch, first sample first.
        modality: "image" or "audio", for the error message.

    Returns:
        (batch, length, width), with the dtype and the device of `inputs_embeds`; differentiable in both inputs.

    Raises:
        ValueError: the number of placeholders is not items * tokens.
    """
    if positions is not None:
        check_number(len(positions), features, modality)
    if features is None:
        return inputs_embeds
    if positions is None:
        return inputs_embeds + (features * 0).sum().to(inputs_embeds)
    length = inputs_embeds.shape[1]
    rows = (positions // length).to(inputs_embeds.device, non_blocking=True)
    columns = (positions % length).to(inputs_embeds.device, non_blocking=True)
    # No view of a flat tensor: a compiled first layer would be compiled once more for it.
    return inputs_embeds.index_put((rows, columns), features.flatten(0, 1).to(inputs_embeds))


def check_number(positions: int, features: Tensor | None, modality: str) -> None:
    """Check that there are as many placeholders as features.

    Args:
        positions: the number of placeholders.
        features: as for `splice_features`.

    Raises:
        ValueError: the number of placeholders is not items * tokens.
    """
    items = tokens = 0
    if features is not None:
        items, tokens = features.shape[:2]
    if positions != items * tokens:
        raise ValueError(
            f"the prompt holds {positions} {modality} placeholder ids, but {items} {modality} item(s) of "
            f"{tokens} tokens were given; each item needs one run of placeholders"
        )
