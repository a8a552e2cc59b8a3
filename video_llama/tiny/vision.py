"""Pretraining of the frame encoder: what is in a frame, and where, told by the whole and by every patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from video_llama.clipworld.vocabulary import ATTRIBUTES
from video_llama.model.video_branch import VideoBranch
from video_llama.processor.media import MediaProcessor
from video_llama.tiny.frames import FRAME_ATTRIBUTES, FramePool
from video_llama.tiny.steps import Schedule, run_steps

__all__ = ["AttributeHeads", "train_vision_encoder"]

logger = logging.getLogger(__name__)

_BACKGROUND_WEIGHT = 0.2  # of the many patches without an object
_MEASURED_FRAMES = 1000


class AttributeHeads(nn.Module):
    """One linear layer for each attribute of a frame, and one for its objects' common centre."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name])) for name in FRAME_ATTRIBUTES})
        self.centre = nn.Linear(width, 2)

    def losses(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """Cross-entropies by attribute, and the centre's distance; `states` is (len(chosen), width)."""
        losses = {
            name: F.cross_entropy(head(states), pool.attribute(name, chosen)) for name, head in self.heads.items()
        }
        distance = F.smooth_l1_loss(self.centre(states), torch.from_numpy(pool.centre[chosen]), beta=0.05)
        return losses | {"centre": 10 * distance}

    def accuracies(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, float]:
        """Shares of right values by attribute, and the mean error of the centre in shares of the side."""
        right = {
            name: float((head(states).argmax(-1) == pool.attribute(name, chosen)).float().mean())
            for name, head in self.heads.items()
        }
        error = (self.centre(states) - torch.from_numpy(pool.centre[chosen])).abs().mean()
        return right | {"centre_error": float(error)}


class PatchHeads(nn.Module):
    """What object a patch lies on, if any: its shape and its colour; class 0 is none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1 + len(ATTRIBUTES[name])) for name in ("shape", "colour")})

    def losses(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """Cross-entropies over all patches; `states` is (len(chosen), patches, width)."""
        on_object = _patches_on_objects(pool, chosen, states.shape[1])  # (frames, patches)
        losses = {}
        for name, head in self.heads.items():
            target = torch.where(on_object, 1 + pool.attribute(name, chosen)[:, None], 0)
            logits = head(states)
            weight = logits.new_ones(logits.shape[-1])
            weight[0] = _BACKGROUND_WEIGHT
            losses[f"patch_{name}"] = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)
        return losses


def _patches_on_objects(pool: FramePool, chosen: NDArray[np.int64], num_patches: int) -> Tensor:
    """(frames, patches), bool: the patch's middle lies within an object's circle."""
    side = round(num_patches**0.5)
    middles = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)  # (patches, 2), x and y
    offsets = grid[None, :, None] - pool.places[chosen][:, None]  # (frames, patches, objects, 2)
    distance = np.linalg.norm(offsets, axis=-1)
    return torch.from_numpy((distance < pool.radius[chosen][:, None, None]).any(axis=-1))


def train_vision_encoder(
    branch: VideoBranch, media: MediaProcessor, pool: FramePool, schedule: Schedule, folder: Path, batch_size: int = 64
) -> None:
    """Train `vision_encoder` and `vision_norm` of a branch in place."""
    train, held_back = pool.split(min(_MEASURED_FRAMES, len(pool) // 10))
    width = branch.vision_norm.weight.shape[0]
    modules = nn.ModuleDict(
        {
            "encoder": branch.vision_encoder,
            "norm": branch.vision_norm,
            "frame": AttributeHeads(width),
            "patch": PatchHeads(width),
        }
    )

    def encode(frames: FramePool, chosen: NDArray[np.int64]) -> Tensor:
        return branch.vision_norm(branch.vision_encoder(frames.images(chosen, media)))

    def step(rng: Generator) -> Mapping[str, Tensor]:
        chosen = rng.integers(len(train), size=batch_size)
        states = encode(train, chosen)
        of_frame = modules["frame"].losses(states[:, 0], train, chosen)  # type: ignore[operator]
        return of_frame | modules["patch"].losses(states[:, 1:], train, chosen)  # type: ignore[operator]

    def measure() -> Mapping[str, float]:
        everything = np.arange(len(held_back))
        states = torch.cat([encode(held_back, part)[:, 0] for part in np.array_split(everything, 8)])
        return modules["frame"].accuracies(states, held_back, everything)  # type: ignore[operator]

    run_steps("vision", modules, step, schedule, folder, seed=1, measure=measure, in_half=True)
