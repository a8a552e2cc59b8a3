"""The content of the frames of a clip or an image, and its position at each moment.

Lengths are shares of the image's side, x to the right and y downwards; time is from 0 (first frame) to 1 (last).

The direction of motion shows only in the order of the frames, not in one frame nor in their set. Start and end are
symmetric around the path's middle, which has the same distribution for both directions; and what travels along one
axis also sways along the other, to a similar extent and symmetrically in time, so the set of positions does not show
the axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from examples.tiny_world.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    HELD_OUT_COLOURS,
    HELD_OUT_MOTIONS,
    MOTIONS,
    POSITIONS,
    SHAPES,
    SIZES,
    is_held_out,
)

__all__ = ["Look", "Scene", "random_scene"]

# Distance of objects from the image's border.
_MARGIN = 0.015
_MIN_TRAVEL, _MAX_TRAVEL = 0.24, 0.55
# Of the travel: gives both axes the same variance over the clip.
_SWAY = 0.41
# Of clips without motion; few, because they alone can be recognised in shuffled frames.
_STILL_SHARE = 0.06
# Of clips in which the colour or the shape changes halfway.
_ORDER_SHARE = 0.2

Rgb = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """The look of all objects of a scene for a while.

    Attributes:
        shape: word of `SHAPES`.
        colour: word of `COLOURS`.
        rgb: the scene's shade of it.
    """

    shape: str
    colour: str
    rgb: Rgb


@dataclass(frozen=True)
class Scene:
    """One to four equal objects that move together on a plain background.

    Attributes:
        look: of the objects, at first.
        later: their look from `change_time` on, with another colour or another shape; None if nothing changes.
        size, count, motion, background: words of the vocabulary; motion is None in a still image.
        radius: of the circle around an object.
        angle: by which the objects are turned, in radians.
        offsets: of the objects from their common centre.
        centre: of the path that the common centre takes.
        travel: length of that path along the motion's direction.
        sway, sway_periods: amplitude (signed) and number of the swings across it.
        change_time: when the look changes.
        background_rgb, gradient: the background's shade, and its increase in levels from top to bottom.
    """

    look: Look
    later: Look | None
    size: str
    count: str
    motion: str | None
    background: str
    radius: float
    angle: float
    offsets: tuple[Point, ...]
    centre: Point
    travel: float
    sway: float
    sway_periods: int
    change_time: float
    background_rgb: Rgb
    gradient: float

    @property
    def looks(self) -> list[Look]:
        """Return the one look, or both in their order."""
        return [self.look] if self.later is None else [self.look, self.later]

    @property
    def changes(self) -> str | None:
        """Return the attribute that changes halfway: "colour", "shape" or None."""
        if self.later is None:
            return None
        return "colour" if self.later.colour != self.look.colour else "shape"

    @property
    def order(self) -> str:
        """Return the order of a change: "red, then blue", "circle, then star" or "nothing"."""
        if self.later is None:
            return "nothing"
        if self.changes == "colour":
            return f"{self.look.colour}, then {self.later.colour}"
        return f"{self.look.shape}, then {self.later.shape}"

    @property
    def unseen_pairs(self) -> list[tuple[str, str]]:
        """Return the held-out (shape, colour) and (shape, motion) of this scene."""
        coloured = {(look.shape, look.colour) for look in self.looks} & HELD_OUT_COLOURS
        moving = {(look.shape, str(self.motion)) for look in self.looks} & HELD_OUT_MOTIONS
        return sorted(coloured | moving)

    @property
    def position(self) -> str:
        """Return the ninth of the image that holds the common centre of a still image's objects."""
        column, row = (min(2, int(3 * place)) for place in self.centre)
        return POSITIONS[row][column]

    def look_at(self, time: float) -> Look:
        """Return the look of all objects at a time from 0 to 1."""
        return self.look if self.later is None or time < self.change_time else self.later

    def centre_at(self, time: float) -> Point:
        """Return the objects' common centre at a time from 0 to 1."""
        along = self.travel * (time - 0.5)
        across = self.sway * math.cos(2 * math.pi * self.sway_periods * time)
        x, y = MOTIONS[self.motion or "still"]
        return self.centre[0] + x * along + abs(y) * across, self.centre[1] + y * along + abs(x) * across

    def places_at(self, time: float) -> list[Point]:
        """Return the centre of each object at a time from 0 to 1."""
        x, y = self.centre_at(time)
        return [(x + dx, y + dy) for dx, dy in self.offsets]


def random_scene(rng: Generator, *, moving: bool = True, held_out: bool = True) -> Scene:
    """Draw a scene.

    Args:
        rng: all randomness comes from here.
        moving: for a clip; False gives a still image.
        held_out: allow combinations that training must not show.
    """
    while True:
        motion = _random_motion(rng) if moving else None
        look, later = _random_looks(rng, changing=moving)
        if held_out or not any(is_held_out(one.shape, one.colour, motion) for one in (look, later or look)):
            break
    size, count, background = _word(rng, SIZES), _word(rng, COUNTS), _word(rng, BACKGROUNDS)
    radius = SIZES[size] * rng.uniform(0.94, 1.06)
    offsets = _random_offsets(rng, COUNTS[count], size, radius)
    # The greatest distance of the common centre from the image's centre, in x and in y.
    reach = 0.5 - _MARGIN - radius - np.abs(offsets).max(axis=0)  # (2,)
    direction = np.abs(MOTIONS[motion or "still"])
    travel = sway = 0.0
    if direction.any():
        room_along, room_across = float(reach @ direction), float(reach @ (1 - direction))
        travel = rng.uniform(_MIN_TRAVEL, min(_MAX_TRAVEL, 2 * room_along))
        sway = min(_SWAY * travel * rng.uniform(0.85, 1.15), room_across) * rng.choice([-1, 1])
    free = np.maximum(reach - direction * travel / 2 - (1 - direction) * abs(sway), 0)
    centre = 0.5 + rng.uniform(-free, free)
    return Scene(
        look=look,
        later=later,
        size=size,
        count=count,
        motion=motion,
        background=background,
        radius=float(radius),
        angle=float(rng.uniform(-0.15, 0.15)),
        offsets=tuple((float(x), float(y)) for x, y in offsets),
        centre=(float(centre[0]), float(centre[1])),
        travel=float(travel),
        sway=float(sway),
        sway_periods=int(rng.integers(1, 3)),
        change_time=float(rng.uniform(0.4, 0.6)),
        background_rgb=_shade(rng, BACKGROUNDS[background]),
        gradient=float(rng.uniform(-16, 16)),
    )


def _word(rng: Generator, words: dict[str, float] | dict[str, int] | dict[str, Rgb] | tuple[str, ...]) -> str:
    return str(rng.choice(list(words)))


def _random_motion(rng: Generator) -> str:
    if rng.random() < _STILL_SHARE:
        return "still"
    return str(rng.choice([motion for motion in MOTIONS if motion != "still"]))


def _random_looks(rng: Generator, changing: bool) -> tuple[Look, Look | None]:
    shape, colour = _word(rng, SHAPES), _word(rng, COLOURS)
    look = Look(shape, colour, _shade(rng, COLOURS[colour]))
    if not changing or rng.random() >= _ORDER_SHARE:
        return look, None
    if rng.random() < 0.5:
        colour = str(rng.choice([other for other in COLOURS if other != colour]))
        return look, Look(shape, colour, _shade(rng, COLOURS[colour]))
    return look, Look(str(rng.choice([other for other in SHAPES if other != shape])), colour, look.rgb)


def _shade(rng: Generator, rgb: Rgb) -> Rgb:
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-10, 11, size=3), 0, 255)
    return int(red), int(green), int(blue)


def _random_offsets(rng: Generator, count: int, size: str, radius: float) -> np.ndarray:
    """Return centres of objects that do not touch, in a loose grid, around their common middle: (count, 2)."""
    side = 2 if size == "large" else int(rng.integers(2, 4))
    step = radius * rng.uniform(2.15, 2.15 if size == "large" else 2.4)
    cells = rng.choice(side * side, size=count, replace=False)
    offsets = np.stack([cells % side, cells // side], axis=1) * step  # (count, 2)
    offsets = offsets + rng.uniform(-1, 1, size=offsets.shape) * (step - 2.1 * radius) / 2
    return offsets - (offsets.min(axis=0) + offsets.max(axis=0)) / 2
