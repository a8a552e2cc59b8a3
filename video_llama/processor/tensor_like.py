"""Media items that can stand where scripts expect the tensor they hold, and tensors that can stand for items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_llama.errors import MediaError

__all__ = ["TensorLike", "as_frames", "as_segments"]

Item = TypeVar("Item", bound="TensorLike")


class TensorLike(ABC):
    """The part of a tensor's interface that scripts use on what `process_video` and its like return.

    What moves or converts the tensor, and what takes some of its frames or segments (a slice, a list or a 1-d tensor
    of positions), gives an item with everything known about them. Everything else gives plain tensors: an integer
    index, iteration, `unsqueeze`, torch's functions.
    """

    @property
    @abstractmethod
    def tensor(self) -> Tensor:
        """Return what the model takes: (frames, 3, height, width) or (segments, 1, mel_bins, mel_frames)."""

    @abstractmethod
    def with_tensor(self: Item, tensor: Tensor) -> Item:
        """Return the same item with another form of its tensor."""

    @abstractmethod
    def take(self: Item, places: Sequence[int]) -> Item:
        """Return an item of some of the frames or segments, in the given order."""

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor)

    def __getitem__(self: Item, index: Any) -> Item | Tensor:
        if isinstance(index, (slice, list, np.ndarray, Tensor)):
            # Let numpy turn slices, masks and negative numbers into plain positions.
            places = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
            if places.ndim == 1:
                return self.take(places.tolist())
        return self.tensor[index]

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the tensor."""
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        """Return the number of dimensions of the tensor, 4."""
        return self.tensor.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the tensor."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the tensor."""
        return self.tensor.device

    def size(self, *dim: int) -> Any:
        """Return what `torch.Tensor.size` does."""
        return self.tensor.size(*dim)

    def numel(self) -> int:
        """Return the number of values of the tensor."""
        return self.tensor.numel()

    def to(self: Item, *args: Any, **kwargs: Any) -> Item:
        """Return the same item on another device, in another type, or both; arguments as of `torch.Tensor.to`."""
        return self.with_tensor(self.tensor.to(*args, **kwargs))

    def half(self: Item) -> Item:
        """Return the same item in float16."""
        return self.to(torch.float16)

    def float(self: Item) -> Item:
        """Return the same item in float32."""
        return self.to(torch.float32)

    def cpu(self: Item) -> Item:
        """Return the same item in the CPU's memory."""
        return self.to("cpu")

    def cuda(self: Item, device: torch.device | str | int | None = None) -> Item:
        """Return the same item on a GPU, the current one unless another is named."""
        return self.to("cuda" if device is None else device)

    def unsqueeze(self, dim: int) -> Tensor:
        """Return the tensor with one more dimension; what is known besides, such as the frames' times, is lost."""
        return self.tensor.unsqueeze(dim)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.generic]:
        values = self.tensor.detach().cpu()
        # Numpy has no bfloat16.
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return np.array(array, dtype=dtype) if copy else np.asarray(array, dtype=dtype)

    # How torch.as_tensor and torch.tensor read foreign arrays.
    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let torch's functions see the tensor: `torch.stack([frames, others])`, `torch.mean(frames)`."""
        named = {name: _unwrapped(value) for name, value in (kwargs or {}).items()}
        return function(*_unwrapped(tuple(args)), **named)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, TensorLike):
        return value.tensor
    # Only plain tuples and lists are searched: subclasses such as named tuples are built in other ways.
    return type(value)(map(_unwrapped, value)) if type(value) in (tuple, list) else value


def as_frames(values: Tensor) -> Tensor:
    """Return the frames of one video as (frames, 3, height, width).

    Args:
        values: that, (1, frames, 3, height, width), or one frame (3, height, width); normalised floating point.

    Raises:
        MediaError: another order of dimensions, several videos, no frames, or integers.
    """
    frames = values[0] if values.ndim == 5 and len(values) == 1 else values[None] if values.ndim == 3 else values
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        reason = f"a tensor of shape {tuple(values.shape)} is no (frames, 3, height, width)"
        raise MediaError("frames", reason, _how_to_order(values))
    if not frames.is_floating_point():
        hint = "frames are normalised floating point: read them with process_video or process_images"
        raise MediaError("frames", f"a tensor of {values.dtype}", hint)
    return frames


def _how_to_order(values: Tensor) -> str:
    shape = tuple(values.shape)
    if 0 in shape:
        return "there is nothing to see"
    if values.ndim in (3, 4) and shape[-1] == 3:
        return f"put the channels before the height: tensor.permute({'2, 0, 1' if values.ndim == 3 else '0, 3, 1, 2'})"
    if values.ndim == 4 and shape[0] == 3:
        return "put the frames before the channels: tensor.transpose(0, 1)"
    if values.ndim == 5 and shape[:2] == (1, 3):
        return "put the frames before the channels: tensor[0].transpose(0, 1)"
    if values.ndim == 5 and shape[2] == 3:
        return "several videos are given as a list: list(tensor)"
    return "give the frames of one video in this order, in RGB"


def as_segments(values: Tensor) -> Tensor:
    """Return the audio of one file as (segments, 1, mel_bins, mel_frames).

    Args:
        values: that, (1, segments, 1, mel_bins, mel_frames), or one segment (1, mel_bins, mel_frames); normalised
            log-mel.

    Raises:
        MediaError: another order of dimensions, several sounds, or no segments.
    """
    segments = values[0] if values.ndim == 5 and len(values) == 1 else values[None] if values.ndim == 3 else values
    if segments.ndim != 4 or segments.shape[1] != 1 or not segments.numel() or not segments.is_floating_point():
        reason = f"a tensor of shape {tuple(values.shape)} and type {values.dtype}"
        raise MediaError("audio", reason, "give normalised log-mel (segments, 1, mel_bins, mel_frames) of one sound")
    return segments
