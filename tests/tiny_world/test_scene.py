"""What scenes there are, and that motion can be told from the order of frames only."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from examples.tiny_world.world.scene import Scene
from examples.tiny_world.world.vocabulary import (
    ATTRIBUTES,
    COUNTS,
    HELD_OUT_COLOURS,
    HELD_OUT_MOTIONS,
    MOTIONS,
    SIZES,
)
from tests.tiny_world.conftest import random_scenes

TIMES = np.linspace(0, 1, 21)
SCENES = random_scenes(1500)
DIRECTIONS = [motion for motion in MOTIONS if motion != "still"]


def path(scene: Scene) -> np.ndarray:
    """The common centre along the motion and across it: (times, 2)."""
    centres = np.array([scene.centre_at(time) for time in TIMES])
    x, y = MOTIONS[scene.motion or "still"]
    return np.stack([centres @ (x, y), centres @ (abs(y), abs(x))], axis=1)


def test_every_value_of_every_attribute_occurs() -> None:
    for attribute in ("size", "count", "motion", "background"):
        assert {getattr(scene, attribute) for scene in SCENES} == set(ATTRIBUTES[attribute])
    for attribute in ("shape", "colour"):
        assert {getattr(scene.look, attribute) for scene in SCENES} == set(ATTRIBUTES[attribute])
    assert {scene.position for scene in random_scenes(300, moving=False)} == set(ATTRIBUTES["position"])


def test_no_direction_is_much_more_common_than_another() -> None:
    counts = Counter(scene.motion for scene in SCENES)
    assert max(counts[way] for way in DIRECTIONS) < 1.3 * min(counts[way] for way in DIRECTIONS)
    assert 0 < counts["still"] < 0.1 * len(SCENES)


@pytest.mark.parametrize("scenes", [SCENES, random_scenes(300, moving=False)], ids=["clips", "pictures"])
def test_objects_stay_in_view_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        places = np.array([scene.places_at(time) for time in TIMES])  # (times, objects, 2)
        assert places.shape[1] == COUNTS[scene.count]
        assert (places - scene.radius).min() > 0
        assert (places + scene.radius).max() < 1
        for first, second in combinations(scene.offsets, 2):
            assert np.hypot(*np.subtract(first, second)) > 2 * scene.radius


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_objects_go_where_their_motion_says_and_end_as_far_across_as_they_began(motion: str) -> None:
    for scene in (scene for scene in SCENES if scene.motion == motion):
        along, across = path(scene).T
        assert (np.diff(along) > 0).all()
        assert along[-1] - along[0] > 0.2
        assert across[-1] == pytest.approx(across[0])


def test_still_objects_and_those_of_pictures_do_not_move() -> None:
    for scene in [*(scene for scene in SCENES if scene.motion == "still"), *random_scenes(20, moving=False)]:
        assert scene.centre_at(0.0) == scene.centre_at(0.37) == scene.centre_at(1.0)


def test_a_clip_backwards_is_a_clip_of_the_opposite_motion() -> None:
    """So the same set of frames, without its order, shows both."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for scene in (scene for scene in SCENES if scene.motion in opposite):
        reverse = replace(scene, motion=opposite[scene.motion or ""])
        for time in TIMES:
            assert reverse.centre_at(time) == pytest.approx(scene.centre_at(1 - time))


def test_the_places_of_a_clip_spread_as_far_across_the_motion_as_along_it() -> None:
    """So the set of frames does not show the axis either."""
    spreads = np.array([path(scene).std(axis=0) for scene in SCENES if scene.motion in DIRECTIONS])
    along, across = spreads.mean(axis=0)
    assert across == pytest.approx(along, rel=0.2)
    assert 0.25 < (spreads[:, 1] > spreads[:, 0]).mean() < 0.75


def test_training_never_shows_a_held_out_combination() -> None:
    for scene in random_scenes(1500, held_out=False):
        assert scene.unseen_pairs == []
        for look in scene.looks:
            assert (look.shape, look.colour) not in HELD_OUT_COLOURS
            assert (look.shape, scene.motion) not in HELD_OUT_MOTIONS


def test_elsewhere_every_held_out_combination_comes_and_is_named() -> None:
    named = {pair for scene in SCENES for pair in scene.unseen_pairs}
    assert named == HELD_OUT_COLOURS | HELD_OUT_MOTIONS
    share = np.mean([bool(scene.unseen_pairs) for scene in SCENES])
    assert 0.15 < share < 0.4


def test_in_some_clips_colour_or_shape_changes_halfway_and_nothing_else() -> None:
    changing = [scene for scene in SCENES if scene.changes]
    assert 0.1 < len(changing) / len(SCENES) < 0.3
    assert {scene.changes for scene in changing} == {"colour", "shape"}
    for scene in changing:
        before, after = scene.look_at(0.39), scene.look_at(0.61)
        kept = "shape" if scene.changes == "colour" else "colour"
        assert getattr(before, kept) == getattr(after, kept)
        assert scene.order == f"{getattr(before, scene.changes)}, then {getattr(after, scene.changes)}"
    for scene in SCENES:
        if not scene.changes:
            assert (scene.order, scene.look_at(1.0)) == ("nothing", scene.look)


def test_pictures_neither_move_nor_change() -> None:
    assert all((scene.motion, scene.later) == (None, None) for scene in random_scenes(100, moving=False))


def test_large_objects_are_clearly_larger_than_small_ones() -> None:
    radii = {size: [scene.radius for scene in SCENES if scene.size == size] for size in SIZES}
    assert min(radii["large"]) > 1.4 * max(radii["small"])


@pytest.mark.parametrize(
    ("centre", "position"),
    [((0.2, 0.2), "top left"), ((0.5, 0.1), "top"), ((0.9, 0.5), "right"), ((0.4, 0.6), "centre")],
)
def test_the_position_is_the_ninth_of_the_picture_that_holds_the_centre(
    centre: tuple[float, float], position: str
) -> None:
    assert replace(SCENES[0], centre=centre).position == position
