"""Pretraining of the frame encoder: classify the whole frame and every patch of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.tiny_world.pretraining.frames import FRAME_ATTRIBUTES, FramePool
from examples.tiny_world.pretraining.steps import StepSchedule, run_steps
from examples.tiny_world.world.vocabulary import ATTRIBUTES
from video_llama.constants import IGNORE_INDEX
from video_llama.model.video_branch import VideoBranch
from video_llama.processor.media_processor import MediaProcessor

__all__ = ["AttributeHeads", "train_vision_encoder"]

logger = logging.getLogger(__name__)

# Weight of the many patches without an object.
_BACKGROUND_WEIGHT = 0.2
_MEASURED_FRAMES = 1000


class AttributeHeads(nn.Module):
    """One linear layer for each attribute of a frame, and one for its objects' common centre."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name])) for name in FRAME_ATTRIBUTES})
        self.centre = nn.Linear(width, 2)

    def losses(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return cross-entropies by attribute, and the centre's distance.

        Args:
            states: (len(chosen), 1 or more, width); the first for the first attribute and so on, or one for all.
            pool, chosen: which frames.
        """
        losses = {
            name: F.cross_entropy(head(state), pool.attribute(name, chosen)) for name, head, state in self._read(states)
        }
        centre = self.centre(_state_of("position", states))
        return losses | {"centre": 10 * F.smooth_l1_loss(centre, torch.from_numpy(pool.centre[chosen]), beta=0.05)}

    def accuracies(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, float]:
        """Shares of right values by attribute, and the mean error of the centre in shares of the side."""
        right = {}
        for name, head, state in self._read(states):
            target = pool.attribute(name, chosen)
            right[name] = float((head(state).argmax(-1) == target)[target != IGNORE_INDEX].float().mean())
        error = (self.centre(_state_of("position", states)) - torch.from_numpy(pool.centre[chosen])).abs().mean()
        return right | {"centre_error": float(error)}

    def _read(self, states: Tensor) -> Iterator[tuple[str, nn.Module, Tensor]]:
        for name, head in self.heads.items():
            yield name, head, _state_of(name, states)


def _state_of(attribute: str, states: Tensor) -> Tensor:
    """What an attribute is read from: (frames, width) of (frames, states, width)."""
    return states[:, 0] if states.shape[1] == 1 else states[:, FRAME_ATTRIBUTES.index(attribute)]


class PatchHeads(nn.Module):
    """What object a patch lies on, if any: shape and colour (class 0 is none); and whether its centre is there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1 + len(ATTRIBUTES[name])) for name in ("shape", "colour")})
        self.centre = nn.Linear(width, 1)

    def losses(self, states: Tensor, pool: FramePool, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return cross-entropies over all patches; `states` is (len(chosen), patches, width)."""
        on_object = _patches_on_objects(pool, chosen, states.shape[1])  # (frames, patches)
        losses = {}
        for name, head in self.heads.items():
            value = pool.attribute(name, chosen)
            value = torch.where(value == IGNORE_INDEX, value, 1 + value)  # class 0 is the background
            target = torch.where(on_object, value[:, None], 0)
            logits = head(states)
            weight = logits.new_ones(logits.shape[-1])
            weight[0] = _BACKGROUND_WEIGHT
            losses[f"patch_{name}"] = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)
        has_centre = _patches_with_centres(pool, chosen, states.shape[1])  # (frames, patches)
        logits = self.centre(states)[..., 0]
        losses["patch_centre"] = F.binary_cross_entropy_with_logits(logits, has_centre, pos_weight=logits.new_tensor(5))
        return losses


def _patches_with_centres(pool: FramePool, chosen: NDArray[np.int64], num_patches: int) -> Tensor:
    """Return (frames, patches), float, 1 where an object's centre is: one for each object, for counting."""
    side = round(num_patches**0.5)
    places = pool.places[chosen]  # (frames, objects, 2), negative where there is no further object
    columns, rows = np.clip((places * side).astype(int), 0, side - 1).transpose(2, 0, 1)
    frame, number = np.nonzero(places[:, :, 0] >= 0)
    grid = np.zeros((len(chosen), num_patches), dtype=np.float32)
    grid[frame, (rows * side + columns)[frame, number]] = 1
    return torch.from_numpy(grid)


def _patches_on_objects(pool: FramePool, chosen: NDArray[np.int64], num_patches: int) -> Tensor:
    """Return (frames, patches), bool: the patch's middle is within an object's circle."""
    side = round(num_patches**0.5)
    middles = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)  # (patches, 2), x and y
    offsets = grid[None, :, None] - pool.places[chosen][:, None]  # (frames, patches, objects, 2)
    distance = np.linalg.norm(offsets, axis=-1)
    return torch.from_numpy((distance < pool.radius[chosen][:, None, None]).any(axis=-1))


def _init_positions(encoder: nn.Module) -> None:
    """Set initial values that speed up learning of which patches are neighbours, and what is in them.

    The position table starts as sines and cosines of a patch's column and row, and the patch projection keeps the
    size of its input; from small random values of both, shapes were not learnt for hundreds of steps.
    """
    parameters = dict(encoder.named_parameters())
    table = parameters["pos_embed"]  # (1, 1 + patches, width)
    side, width = math.isqrt(table.shape[1] - 1), table.shape[2]
    frequencies = 1.5 / 20 ** torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    grid = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)], dim=-1)  # columns, then rows
    with torch.no_grad():
        table[0, 0] = 0
        table[0, 1:] = grid / 2
    projection = parameters["patch_embed.proj.weight"]
    nn.init.normal_(projection, std=projection[0].numel() ** -0.5)


def train_vision_encoder(
    branch: VideoBranch,
    media: MediaProcessor,
    pool: FramePool,
    schedule: StepSchedule,
    folder: Path,
    batch_size: int = 64,
) -> None:
    """Train `vision_encoder` and `vision_norm` of a branch in place."""
    _init_positions(branch.vision_encoder)
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
        of_frame = modules["frame"].losses(states[:, :1], train, chosen)  # type: ignore[operator]
        return of_frame | modules["patch"].losses(states[:, 1:], train, chosen)  # type: ignore[operator]

    def measure() -> Mapping[str, float]:
        everything = np.arange(len(held_back))
        states = torch.cat([encode(held_back, part)[:, :1] for part in np.array_split(everything, 8)])
        return modules["frame"].accuracies(states, held_back, everything)  # type: ignore[operator]

    run_steps("vision", modules, step, schedule, folder, seed=1, measure=measure, in_half=True)
