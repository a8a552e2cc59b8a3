"""All attributes of the generated world and the words for their values."""

from __future__ import annotations

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLOURS",
    "COUNTS",
    "HELD_OUT_COLOURS",
    "HELD_OUT_MOTIONS",
    "MOTIONS",
    "NO_SOUND_TRACK",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "SOUNDS",
    "is_held_out",
    "plural_of",
]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (45, 70, 220),
    "yellow": (245, 220, 45),
    "orange": (245, 135, 20),
    "purple": (135, 50, 175),
    "pink": (250, 145, 200),
    "cyan": (60, 205, 215),
}
"""Colours of objects: RGB; each scene draws a shade of it."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 14),
    "white": (242, 242, 242),
    "grey": (128, 128, 128),
    "brown": (100, 62, 36),
}

SIZES: dict[str, float] = {"small": 0.085, "large": 0.145}
"""Radius of the circle around an object, as a share of the image's side."""

COUNTS: dict[str, int] = {"one": 1, "two": 2, "three": 3, "four": 4}

MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Direction in image coordinates: x to the right, y downwards."""

SOUNDS = ("rising tone", "falling tone", "beeps", "noise", "low hum", "whistle", "silence")

NO_SOUND_TRACK = "no sound track"
"""The value for a clip without audio track; "silence" is a silent track."""

POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""The objects' common centre in a still image: rows of thirds."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "count": tuple(COUNTS),
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
    "sound": (*SOUNDS, NO_SOUND_TRACK),
    "position": tuple(word for row in POSITIONS for word in row),
}
"""All values of each attribute, as in the ground truth and in the answers.

The attribute "order" has no list of its own: its values are "red, then blue", "circle, then star" (two colours or
two shapes) and "nothing".
"""

HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "green"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("star", "red"),
        ("cross", "purple"),
        ("ring", "orange"),
    }
)
"""(shape, colour) that the training split never shows."""

HELD_OUT_MOTIONS = frozenset({("circle", "up"), ("square", "left"), ("triangle", "down"), ("star", "right")})
"""(shape, motion) that the training split never shows."""


def is_held_out(shape: str, colour: str, motion: str | None = None) -> bool:
    """Return whether training never shows this shape in this colour, or with this motion."""
    return (shape, colour) in HELD_OUT_COLOURS or (shape, motion) in HELD_OUT_MOTIONS


def plural_of(noun: str) -> str:
    """Return a shape's plural: "circles", "crosses"."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"
