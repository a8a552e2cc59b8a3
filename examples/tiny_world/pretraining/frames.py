"""Single frames with all that is known of them: what the frame encoder and the Q-Former are pretrained on."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from examples.tiny_world.world.drawing import draw_frame
from examples.tiny_world.world.facts import Facts, facts_of
from examples.tiny_world.world.layouts import media_file
from examples.tiny_world.world.samples import random_sample
from examples.tiny_world.world.scene import Scene, random_scene
from examples.tiny_world.world.vocabulary import ATTRIBUTES, COLOURS, HELD_OUT_COLOURS
from video_llama.constants import IGNORE_INDEX
from video_llama.media.image import resize_image
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.transforms import normalize_frames

__all__ = ["FRAME_ATTRIBUTES", "MAX_OBJECTS", "FramePool", "load_frame_pool"]

logger = logging.getLogger(__name__)

FRAME_ATTRIBUTES = ("shape", "colour", "size", "count", "background", "position")
MAX_OBJECTS = 4

_IMAGE_SIZE = 128  # of drawn pictures, as the corpus has them
_JPEG_QUALITIES = (25, 95)
_MIN_CONTRAST = 60  # levels of some channel between an object without a named colour and its background
_MIN_FORBIDDEN_CONTRAST = 70  # and the colour in which training must not show its shape


@dataclass(frozen=True)
class FramePool:
    """Frames in memory.

    Attributes:
        pixels: (frames, height, width, 3), uint8.
        labels: (frames, attributes), int64: which value of each of `FRAME_ATTRIBUTES`; `IGNORE_INDEX` for a colour or
            a background that has no name.
        places: (frames, MAX_OBJECTS, 2), float32: the objects' centres, x and y as shares of the side; -1 where there
            is no further object.
        radius: (frames,), float32, as a share of the side.
        centre: (frames, 2), float32: the objects' common centre.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    places: NDArray[np.float32]
    radius: NDArray[np.float32]
    centre: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, chosen: NDArray[np.int64], media: MediaProcessor) -> Tensor:
        """Normalised frames (len(chosen), 3, height, width)."""
        return normalize_frames(self.pixels[chosen], media.mean, media.std)

    def attribute(self, name: str, chosen: NDArray[np.int64]) -> Tensor:
        """Labels (len(chosen),) of one attribute."""
        return torch.from_numpy(self.labels[chosen, FRAME_ATTRIBUTES.index(name)])

    def facts(self, index: int) -> Facts:
        """What is true of one frame, as of a still picture."""
        numbers = zip(FRAME_ATTRIBUTES, self.labels[index], strict=True)
        return Facts("picture", {name: ATTRIBUTES[name][number] for name, number in numbers})

    def named(self) -> FramePool:
        """The frames whose attributes all have names, of which a caption can be made."""
        keep = (self.labels >= 0).all(axis=1)
        return FramePool(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))

    def split(self, num_held_back: int) -> tuple[FramePool, FramePool]:
        """All but some frames, and those, which are from the pool's end."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        cut = len(self) - num_held_back
        return FramePool(*(field[:cut] for field in fields)), FramePool(*(field[cut:] for field in fields))


def load_frame_pool(file: Path, corpus: Path, media: MediaProcessor, num_drawn: int, num_clips: int) -> FramePool:
    """Read the pool from a file, or make and write it.

    Half of it are the frames that the model would sample of the training clips, decoded; the others are drawn for this
    purpose, with combinations of attributes that training may show, and compressed more or less. Half of the drawn
    ones have colours without a name, so that a shape is known by its outline and not by the colours it may have; none
    of these is like the colour that training must not show that shape in.

    Args:
        file: a `.npz`.
        corpus: what `make_clipworld.py` wrote.
        media: how frames are sampled and scaled.
        num_drawn: pictures to draw.
        num_clips: clips to decode, at most.
    """
    names = [field.name for field in dataclasses.fields(FramePool)]
    if not file.exists():
        settings = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        rows = [*_decode(corpus / "train", int(settings["seed"]), media, num_clips)]
        rows += _draw(int(settings["seed"]), media.image_size, num_drawn)
        order = np.random.default_rng(0).permutation(len(rows))
        columns = [np.stack([rows[index][number] for index in order]) for number in range(len(names))]
        np.savez(file.with_suffix(".incomplete.npz"), allow_pickle=False, **dict(zip(names, columns, strict=True)))
        file.with_suffix(".incomplete.npz").rename(file)
    with np.load(file) as arrays:
        return FramePool(*(arrays[name] for name in names))


_Row = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]


def _decode(split: Path, seed: int, media: MediaProcessor, num_clips: int) -> Iterator[_Row]:
    total = sum(1 for line in (split / "ground_truth.jsonl").open() if '"kind": "clip"' in line)
    for index in tqdm(range(min(total, num_clips)), "decoding clips", unit="clip"):
        sample = random_sample(seed, "train", "clip", index)
        assert sample.scene is not None
        video, _ = media.process_video(split / media_file(sample), audio=False)
        for frame, number in zip(video.frames, video.indices, strict=True):
            yield _row(frame, sample.scene, number / max(1, sample.num_frames - 1))


def _draw(seed: int, size: int, count: int) -> Iterator[_Row]:
    for index in tqdm(range(count), "drawing pictures", unit="picture"):
        rng = np.random.default_rng([seed, 77, index])
        scene, time = random_scene(rng, moving=rng.random() < 0.5, held_out=False), rng.random()
        if index % 2:
            scene = dataclasses.replace(scene, **_unnamed_colours(scene, rng))
        row = _row(_compressed(draw_frame(scene, _IMAGE_SIZE, time), size, rng), scene, time)
        if index % 2:
            row[1][[FRAME_ATTRIBUTES.index("colour"), FRAME_ATTRIBUTES.index("background")]] = IGNORE_INDEX
        yield row


def _unnamed_colours(scene: Scene, rng: Generator) -> dict[str, Any]:
    """Any colours for a scene's objects and background that can be told apart, with their fields' names."""
    background = rng.integers(256, size=3)
    shapes = {look.shape for look in scene.looks}
    forbidden = [np.array(COLOURS[colour]) for shape, colour in HELD_OUT_COLOURS if shape in shapes]
    while True:
        colour = rng.integers(256, size=3)
        far = min((np.abs(colour - other).max() for other in forbidden), default=255) >= _MIN_FORBIDDEN_CONTRAST
        if far and np.abs(colour - background).max() >= _MIN_CONTRAST:
            break
    red, green, blue = (int(level) for level in colour)
    rgb = red, green, blue
    later = None if scene.later is None else dataclasses.replace(scene.later, rgb=rgb)
    return {
        "look": dataclasses.replace(scene.look, rgb=rgb),
        "later": later,
        "background_rgb": tuple(int(level) for level in background),
    }


def _compressed(picture: NDArray[np.uint8], size: int, rng: Generator) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=int(rng.integers(*_JPEG_QUALITIES)))
    with Image.open(buffer) as image:
        if rng.random() < 0.5:
            return resize_image(image, size)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _row(frame: NDArray[np.uint8], scene: Scene, time: float) -> _Row:
    still = dataclasses.replace(scene, look=scene.look_at(time), later=None, motion=None, centre=scene.centre_at(time))
    values = facts_of(still, None).values
    labels = np.array([ATTRIBUTES[name].index(values[name]) for name in FRAME_ATTRIBUTES])
    places = np.full((MAX_OBJECTS, 2), -1, dtype=np.float32)
    places[: len(scene.offsets)] = scene.places_at(time)
    return frame, labels, places, np.float32(scene.radius), np.array(still.centre, dtype=np.float32)
