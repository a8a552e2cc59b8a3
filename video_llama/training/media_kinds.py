"""Media of kinds that only some processes of a run with sharded weights have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from video_llama.data.batches import Batch
from video_llama.data.sample_processor import InputName, MediaInput
from video_llama.training.processes import is_sharded, sum_over_processes

__all__ = ["complete_media"]

_NAMES: tuple[InputName, ...] = ("pixel_values", "audio_values", "audio_pixel_values")

# The shape of a frame or segment, the type of its values, and whether it is from the feature cache.
_Kind = tuple[torch.Size, torch.dtype, bool]


def complete_media(accelerator: Accelerator, batch: Batch, earlier: Sequence[Batch] = ()) -> None:
    """Give a batch one item of zeros for each kind of media that only other processes have.

    All processes gather the sharded weights of a branch together, and sum up its gradients: if one of them left the
    branch out, the others would wait for ever. Nothing is done where weights are not sharded.

    Args:
        batch: of this process, with its media encoded if they are to be; `along` is set.
        earlier: batches, completed before, whose gradients are exchanged with those of this one. It gets their kinds as
            well: a batch that leads to nothing that trains has no backward pass, and would exchange nothing.
    """
    if not is_sharded(accelerator):
        return
    # Within a batch number all items of a kind are alike: they are of one dataset, and the cache holds all or none.
    own = _kinds(batch.media)
    kinds = _kinds(item for other in earlier for item in (*other.media, *other.along))
    counts = sum_over_processes(accelerator, [float(name in own) for name in _NAMES])
    if any(count not in (0, accelerator.num_processes) for count in counts):
        for others in gather_object([own]):
            kinds |= others
    batch.along = [
        MediaInput(name, torch.zeros(1, *shape, dtype=dtype), is_encoded=is_encoded)
        for name, (shape, dtype, is_encoded) in kinds.items()
        if name not in own
    ]


def _kinds(media: Iterable[MediaInput]) -> dict[InputName, _Kind]:
    return {item.name: (item.values.shape[1:], item.values.dtype, item.is_encoded) for item in media}
