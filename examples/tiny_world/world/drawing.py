"""Scenes as pixels. Only the square around each object is drawn with antialiasing; the rest is background."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from examples.tiny_world.world.scene import Look, Scene

__all__ = ["draw_clip", "draw_frame"]

_SUPERSAMPLING = 8
# Positions are rounded to this part of a pixel, so that a clip needs few different masks.
_SUBPIXELS = 4
_MaskKey = tuple[str, int, int]
Outline = list[tuple[float, float]]


def draw_clip(scene: Scene, num_frames: int, image_size: int) -> NDArray[np.uint8]:
    """Return all frames of a clip, from time 0 to time 1: (frames, height, width, 3), uint8, RGB."""
    masks: dict[_MaskKey, NDArray[np.float32]] = {}
    background = _draw_background(scene, image_size)
    times = [index / max(1, num_frames - 1) for index in range(num_frames)]
    return np.stack([_draw_objects(scene, time, background, masks) for time in times])


def draw_frame(scene: Scene, image_size: int, time: float = 0.0) -> NDArray[np.uint8]:
    """Return one moment of a scene, or a still image: (height, width, 3), uint8, RGB."""
    return _draw_objects(scene, time, _draw_background(scene, image_size), {})


def _draw_background(scene: Scene, image_size: int) -> NDArray[np.float32]:
    """Return (height, width, 3), float32 from 0 to 255."""
    slope = scene.gradient * (np.arange(image_size) / image_size - 0.5)  # (height,)
    rows = np.array(scene.background_rgb) + slope[:, None]  # (height, 3)
    return np.repeat(np.clip(rows, 0, 255)[:, None], image_size, axis=1).astype(np.float32)


def _draw_objects(
    scene: Scene, time: float, background: NDArray[np.float32], masks: dict[_MaskKey, NDArray[np.float32]]
) -> NDArray[np.uint8]:
    frame, image_size, look = background.copy(), len(background), scene.look_at(time)
    rgb = np.array(look.rgb, dtype=np.float32)
    half = math.ceil(scene.radius * image_size) + 1
    for place in scene.places_at(time):
        fine_x, fine_y = (round(share * image_size * _SUBPIXELS) for share in place)
        key = (look.shape, fine_x % _SUBPIXELS, fine_y % _SUBPIXELS)
        if key not in masks:
            masks[key] = _draw_mask(look, scene, key[1] / _SUBPIXELS, key[2] / _SUBPIXELS, half, image_size)
        left, top = fine_x // _SUBPIXELS - half, fine_y // _SUBPIXELS - half
        # An object keeps a margin inside the image, but its square may reach over the border.
        x, y = max(left, 0), max(top, 0)
        mask = masks[key][y - top :, x - left :][: image_size - y, : image_size - x]
        patch = frame[y : y + mask.shape[0], x : x + mask.shape[1]]  # (mask height, mask width, 3)
        patch += (rgb - patch) * mask[:, :, None]
    return np.round(frame).astype(np.uint8)


def _draw_mask(look: Look, scene: Scene, x: float, y: float, half: int, image_size: int) -> NDArray[np.float32]:
    """Return the coverage of each pixel around an object: (2 half + 1, 2 half + 1), from 0 to 1.

    Args:
        x, y: the object's centre, in pixels from the corner of the middle pixel.
        half: pixels to each side of the middle pixel.
    """
    side = 2 * half + 1
    canvas = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING), 0)
    draw = ImageDraw.Draw(canvas)
    scale, radius = _SUPERSAMPLING, scene.radius * image_size
    for outline, fill in _outlines(look.shape):
        points = _turned(outline, scene.angle)
        draw.polygon([((half + x + radius * px) * scale, (half + y + radius * py) * scale) for px, py in points], fill)
    return (np.asarray(canvas.reduce(_SUPERSAMPLING)) / 255).astype(np.float32)


def _outlines(shape: str) -> list[tuple[Outline, int]]:
    """Return polygons in the unit circle, y downwards, and their fill: 255 object, 0 hole."""
    # Half the width of a cross's bars.
    arm = 0.34
    reach = math.sqrt(1 - arm**2)
    cross = [(arm, reach), (arm, arm), (reach, arm), (reach, -arm), (arm, -arm), (arm, -reach)]
    polygons: dict[str, list[tuple[Outline, int]]] = {
        "circle": [(_regular(48, 0.92), 255)],
        "square": [(_regular(4, 1.0, math.pi / 4), 255)],
        "triangle": [(_regular(3), 255)],
        "star": [(_star(5, 0.42), 255)],
        "cross": [([*cross, *((-x, -y) for x, y in cross)], 255)],
        "ring": [(_regular(48, 0.95), 255), (_regular(48, 0.5), 0)],
    }
    return polygons[shape]


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> Outline:
    """Return a regular polygon, one corner on top."""
    angles = [2 * math.pi * corner / corners + turn for corner in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star(points: int, inner: float) -> Outline:
    outer_corners, inner_corners = _regular(points), _regular(points, inner, math.pi / points)
    return [corner for pair in zip(outer_corners, inner_corners, strict=True) for corner in pair]


def _turned(outline: Outline, angle: float) -> Outline:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in outline]
