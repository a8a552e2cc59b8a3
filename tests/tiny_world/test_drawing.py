"""Frames show what the scene says, at the place and time that it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.tiny_world.world.drawing import draw_clip, draw_frame
from examples.tiny_world.world.scene import Scene
from examples.tiny_world.world.vocabulary import BACKGROUNDS, COLOURS, COUNTS, MOTIONS, SHAPES
from tests.tiny_world.conftest import random_scenes

SIZE = 96
SCENES = random_scenes(60)
STILL = replace(
    SCENES[0], later=None, angle=0.0, radius=0.2, offsets=((0.0, 0.0),), centre=(0.5, 0.5), travel=0, sway=0
)


def covered(frame: NDArray[np.uint8], rgb: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Where a frame has nearly this colour: (height, width)."""
    return np.abs(frame.astype(int) - rgb).max(axis=-1) < 12


def count_areas(mask: NDArray[np.bool_]) -> int:
    """Connected areas of a mask."""
    left, number = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        number += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            neighbours = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= neighbours
            edge += neighbours
    return number


def nearest(rgb: NDArray[np.uint8], words: dict[str, tuple[int, int, int]]) -> str:
    """The word whose colour is nearest."""
    return min(words, key=lambda word: float(np.abs(rgb.astype(int) - words[word]).sum()))


@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_each_object_has_its_colour_at_its_place(time: float) -> None:
    for scene in SCENES:
        frame, look = draw_frame(scene, SIZE, time), scene.look_at(time)
        for x, y in scene.places_at(time):
            x += 0.72 * scene.radius if look.shape == "ring" else 0.0  # a ring is hollow
            assert nearest(frame[int(y * SIZE), int(x * SIZE)], COLOURS) == look.colour


def test_the_rest_is_background() -> None:
    for scene in SCENES:
        assert nearest(draw_frame(scene, SIZE)[0, 0], BACKGROUNDS) == scene.background


def test_as_many_objects_can_be_counted_as_the_scene_has() -> None:
    for scene in SCENES:
        assert count_areas(covered(draw_frame(scene, 128), scene.look.rgb)) == COUNTS[scene.count]


def test_the_pixels_move_as_the_scene_says() -> None:
    for scene in (scene for scene in SCENES if scene.motion != "still"):
        frames = draw_clip(scene, 12, SIZE)
        first, last = (
            np.argwhere(covered(frame, look.rgb)).mean(axis=0)[::-1] / SIZE
            for frame, look in ((frames[0], scene.look), (frames[-1], scene.looks[-1]))
        )
        moved = (last - first) @ MOTIONS[scene.motion or "still"]
        assert moved == pytest.approx(scene.travel, abs=0.03)


def test_the_look_changes_at_its_time() -> None:
    for scene in (scene for scene in SCENES if scene.changes == "colour"):
        frames = draw_clip(scene, 11, SIZE)
        for index, frame in enumerate(frames):
            shown, hidden = scene.looks if index / 10 < scene.change_time else reversed(scene.looks)
            assert covered(frame, shown.rgb).sum() > 5 * covered(frame, hidden.rgb).sum()


def masks(radius: float = 0.3) -> dict[str, NDArray[np.bool_]]:
    """Each shape alone in the middle."""
    shapes = {shape: replace(STILL.look, shape=shape) for shape in SHAPES}
    return {s: covered(draw_frame(replace(STILL, look=k, radius=radius), SIZE), k.rgb) for s, k in shapes.items()}


def test_no_two_shapes_look_alike() -> None:
    drawn = masks()
    for shape in SHAPES:
        for other in SHAPES:
            union, both = (drawn[shape] | drawn[other]).sum(), (drawn[shape] & drawn[other]).sum()
            assert both / union < (0.8 if shape != other else 1.1), (shape, other)


def test_shapes_stand_upright() -> None:
    for shape, mask in masks().items():
        assert (mask == mask[:, ::-1]).mean() > 0.97, shape  # the same to the left and to the right
    widths = [width for width in masks()["triangle"].sum(axis=1) if width]
    assert widths[0] < 5
    assert widths[-1] > 40


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.505, 0.497)])
def test_edges_are_antialiased_and_follow_parts_of_a_pixel(place: tuple[float, float]) -> None:
    circle = replace(STILL, look=replace(STILL.look, shape="circle", rgb=(255, 255, 255)), background_rgb=(0, 0, 0))
    frame = draw_frame(replace(circle, gradient=0.0, centre=place), SIZE)[:, :, 0] / 255
    assert 20 < ((frame > 0.1) & (frame < 0.9)).sum() < 200
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    middle = (frame * columns).sum() / frame.sum(), (frame * rows).sum() / frame.sum()
    assert middle == pytest.approx((place[0] * SIZE, place[1] * SIZE), abs=0.2)


def test_a_clip_is_its_frames_at_equal_steps() -> None:
    scene: Scene = SCENES[1]
    frames = draw_clip(scene, 5, SIZE)
    assert (frames.shape, frames.dtype) == ((5, SIZE, SIZE, 3), np.uint8)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, draw_frame(scene, SIZE, index / 4))
