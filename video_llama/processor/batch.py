"""Encoded prompts and their media as one batch: truncation, padding, and what trainers want beside the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature

from video_llama.processor.collate import pad_ids, pad_items
from video_llama.processor.prompt import EncodedPrompt

__all__ = ["BatchOptions", "convert_batch", "make_batch", "pad_media", "text_types"]

# The numbers of transformers' `mm_token_type_ids`.
_TEXT, _IMAGE, _VIDEO, _AUDIO = range(4)


@dataclass(frozen=True)
class BatchOptions:
    """How prompts form a batch.

    Args:
        padding: True or "longest"; "max_length" pads to `max_length`; False requires prompts of equal length.
        padding_side: left for generation, right for training; by default the tokenizer's, which a processor sets to
            left.
        max_length: of prompts, in tokens; with `truncation` or `padding="max_length"`.
        truncation: cut longer prompts off, never within the ids of a media item.
        pad_to_multiple_of: make the length a multiple of this.
        return_tensors: "pt", "np", or None for ids and masks as lists, of which none is padded if `padding` is False.
        add_special_tokens: begin strings with BOS, if the tokenizer does so. Chat prompts always begin as the weights
            were trained.
        return_mm_token_type_ids: add (prompts, length), int64: 0 text and padding, 1 images, 2 videos, 3 audio.
        return_assistant_tokens_mask: add `assistant_masks`, (prompts, length), int64: 1 on answers and what ends them.

    Raises:
        ValueError: a setting that makes no sense.
    """

    padding: bool | str = True
    padding_side: Literal["left", "right"] | None = None
    max_length: int | None = None
    truncation: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    add_special_tokens: bool = True
    return_mm_token_type_ids: bool = False
    return_assistant_tokens_mask: bool = False

    def __post_init__(self) -> None:
        if self.return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors can be 'pt', 'np' or None, not {self.return_tensors!r}")
        if self.padding_side not in ("left", "right", None):
            raise ValueError(f"padding_side can be 'left' or 'right', not {self.padding_side!r}")
        if self.padding not in (True, False, "longest", "max_length"):
            raise ValueError(f"padding can be True, False, 'longest' or 'max_length', not {self.padding!r}")
        is_filled = self.padding == "max_length"
        if self.max_length is None and (self.truncation or is_filled):
            raise ValueError("truncation and padding='max_length' need max_length")
        if self.max_length is not None and not self.truncation and not is_filled:
            raise ValueError("max_length needs truncation=True or padding='max_length'")

    def target_length(self, longest: int) -> int:
        """Return the length of a batch whose longest prompt has so many tokens.

        Raises:
            ValueError: a prompt is longer than `max_length`, which all are to have.
        """
        length = longest
        if self.padding == "max_length" and self.max_length is not None:
            if longest > self.max_length:
                raise ValueError(f"a prompt has {longest} tokens, more than max_length={self.max_length}; truncate it")
            length = self.max_length
        step = self.pad_to_multiple_of or 1
        return -(-length // step) * step

    def truncate(self, prompt: EncodedPrompt, media_ids: Sequence[int], side: str) -> EncodedPrompt:
        """Return a prompt of at most `max_length` tokens.

        Raises:
            ValueError: media would be cut off.
        """
        length = self.max_length
        if not self.truncation or length is None or len(prompt.input_ids) <= length:
            return prompt
        kept, cut = slice(0, length), slice(length, None)
        if side == "left":
            kept, cut = slice(-length, None), slice(0, -length)
        if set(media_ids) & set(prompt.input_ids[cut]):
            raise ValueError(f"max_length={length} would cut media off the prompt; allow more tokens or fewer media")
        return EncodedPrompt(prompt.input_ids[kept], prompt.is_answer[kept])


def make_batch(
    prompts: Sequence[EncodedPrompt], visuals: Sequence[Any], audios: Sequence[Tensor], tokenizer: Any,
    options: BatchOptions,
) -> BatchFeature:  # fmt: skip
    """Return prompts and media as the model's inputs; tensors as `VideoLlamaProcessor.__call__` says.

    Args:
        prompts, visuals, audios: the prompts, and the media of all of them.
        tokenizer: has the id of padding, and the side of it where the options name none.
        options: how prompts form a batch.

    Raises:
        ValueError: prompts of unequal length without padding, or too long ones.
    """
    ids = [prompt.input_ids for prompt in prompts]
    if options.padding is False and options.return_tensors and len({len(prompt) for prompt in ids}) > 1:
        raise ValueError("prompts of unequal length cannot form a batch; pass padding=True")
    length = options.target_length(max(map(len, ids)))
    batch: dict[str, Any] = {}
    side = options.padding_side or tokenizer.padding_side
    batch["input_ids"], batch["attention_mask"] = pad_ids(ids, tokenizer.pad_token_id, side, length)
    batch |= pad_media(visuals, audios)
    if options.return_assistant_tokens_mask:
        answers = [[int(is_answer) for is_answer in prompt.is_answer] for prompt in prompts]
        batch["assistant_masks"], _ = pad_ids(answers, 0, side, length)
    return BatchFeature(batch)


def convert_batch(batch: BatchFeature, options: BatchOptions) -> BatchFeature:
    """Return a batch in the form that `return_tensors` says."""
    if options.return_tensors == "np":
        return BatchFeature({name: _as_array(value) for name, value in batch.items()})
    if options.return_tensors == "pt":
        return batch
    if "attention_mask" not in batch:
        return batch
    is_token = [row.bool() for row in batch["attention_mask"]]
    lists: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape == batch["attention_mask"].shape:
            lists[name] = value.tolist()
            if options.padding is False:
                lists[name] = [row[kept].tolist() for row, kept in zip(value, is_token, strict=True)]
    return BatchFeature({**batch, **lists})


def _as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def pad_media(visuals: Sequence[Any], audios: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return media as the model's inputs, without masks that nothing needs.

    Args:
        visuals: `VideoFrames`, or tensors as the model takes them.
    """
    batch: dict[str, Tensor | None] = {}
    if visuals:
        pixels = [getattr(item, "pixel_values", item) for item in visuals]
        batch["pixel_values"], batch["frame_mask"] = pad_items(pixels)
    if audios:
        batch["audio_values"], batch["segment_mask"] = pad_items(audios)
    return {name: tensor for name, tensor in batch.items() if tensor is not None}


def text_types(
    input_ids: Tensor, image_token_id: int, audio_token_id: int, is_video: Sequence[bool], tokens_each: int
) -> Tensor:
    """Return the kind of each id by the numbers of `mm_token_type_ids`.

    Args:
        input_ids: (prompts, length), int64.
        is_video: of the images and videos in order of appearance; each has `tokens_each` ids.
    """
    types = torch.full_like(input_ids, _TEXT).masked_fill_(input_ids == audio_token_id, _AUDIO)
    kinds = torch.tensor([_VIDEO if video else _IMAGE for video in is_video], dtype=types.dtype)
    types[input_ids == image_token_id] = kinds.repeat_interleave(tokens_each)
    return types
