"""Clips of which no two have the same answers, and the questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.tiny_world.world.drawing import draw_clip
from examples.tiny_world.world.encoding import write_clip
from examples.tiny_world.world.scene import random_scene
from examples.tiny_world.world.sounds import draw_sound, random_sound
from examples.tiny_world.world.vocabulary import SOUNDS

__all__ = ["QUESTIONS", "Clip", "make_clips"]

# Colours that the small model tells well; every sound it knows.
COLOURS = ("red", "yellow", "pink", "cyan")
QUESTIONS = {"colour": "What colour do you see?", "sound": "And what do you hear?"}


@dataclass(frozen=True)
class Clip:
    """A clip of one large shape with a sound, and the correct answers about it."""

    path: Path
    colour: str
    sound: str


def make_clips(folder: Path, number: int) -> list[Clip]:
    """Generate clips of which no two have the same colour and sound (up to 28)."""
    clips = []
    for index in range(number):
        colour, sound = COLOURS[index % len(COLOURS)], SOUNDS[index // len(COLOURS) % len(SOUNDS)]
        rng = np.random.default_rng([20_261, index])
        scene = random_scene(rng, held_out=False)
        while (scene.look.colour, scene.size, scene.count, scene.later) != (colour, "large", "one", None):
            scene = random_scene(rng, held_out=False)
        path = folder / f"clip_{index}.mp4"
        write_clip(path, draw_clip(scene, 24, 128), 8, draw_sound(random_sound(rng, 3.0, sound)))
        clips.append(Clip(path, colour, sound))
    return clips
