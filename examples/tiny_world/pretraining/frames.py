"""Single frames with their labels, to pretrain the frame encoder and the Q-Former on."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterator, Mapping
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
from video_llama.errors import DatasetError
from video_llama.media.image import resize_image
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.transforms import normalize_frames
from video_llama.utils.files import write_whole
from video_llama.utils.jsonl import read_jsonl

__all__ = ["FRAME_ATTRIBUTES", "MAX_OBJECTS", "FramePool", "load_frame_pool", "save_arrays"]

logger = logging.getLogger(__name__)

FRAME_ATTRIBUTES = ("shape", "colour", "size", "count", "background", "position")
MAX_OBJECTS = 4

# Of drawn images, as in the corpus.
_IMAGE_SIZE = 128
_JPEG_QUALITIES = (25, 95)
# Levels of some channel between an object without a named colour and its background, and the colour in which training
# must not show its shape.
_MIN_CONTRAST = 60
_MIN_FORBIDDEN_CONTRAST = 70


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
        """Return normalised frames, (len(chosen), 3, height, width)."""
        return normalize_frames(self.pixels[chosen], media.mean, media.std)

    def attribute(self, name: str, chosen: NDArray[np.int64]) -> Tensor:
        """Return labels, (len(chosen),), of one attribute."""
        return torch.from_numpy(self.labels[chosen, FRAME_ATTRIBUTES.index(name)])

    def facts(self, index: int) -> Facts:
        """Return the facts of one frame, as of a still image."""
        numbers = zip(FRAME_ATTRIBUTES, self.labels[index], strict=True)
        return Facts("picture", {name: ATTRIBUTES[name][number] for name, number in numbers})

    def named(self) -> FramePool:
        """Return the frames whose attributes all have names, so that they can be captioned."""
        keep = (self.labels >= 0).all(axis=1)
        return FramePool(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))

    def split(self, num_held_back: int) -> tuple[FramePool, FramePool]:
        """Return the pool without its last frames, and those."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        cut = len(self) - num_held_back
        return FramePool(*(field[:cut] for field in fields)), FramePool(*(field[cut:] for field in fields))


def load_frame_pool(file: Path, corpus: Path, media: MediaProcessor, num_drawn: int, num_clips: int) -> FramePool:
    """Read the pool from a file, or make and write it.

    One half is decoded from the training clips, as the model samples them; the other is drawn, with combinations of
    attributes that training may show, and compressed more or less. Half of the drawn ones have colours without a name,
    so that shapes are learnt by their outlines; none of these resembles the colour that is held out for the shape.

    Args:
        file: a `.npz`.
        corpus: what `make_clipworld.py` wrote.
        media: how frames are sampled and scaled.
        num_drawn: images to draw.
        num_clips: clips to decode, at most.
    """
    names = [field.name for field in dataclasses.fields(FramePool)]
    if not file.exists():
        settings = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        rows = [*_decode(corpus / "train", int(settings["seed"]), media, num_clips)]
        rows += _draw(int(settings["seed"]), media.image_size, num_drawn)
        order = np.random.default_rng(0).permutation(len(rows))
        columns = [np.stack([rows[index][number] for index in order]) for number in range(len(names))]
        save_arrays(file, dict(zip(names, columns, strict=True)))
    with np.load(file) as arrays:
        return FramePool(*(arrays[name] for name in names))


def save_arrays(file: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write a `.npz` whole."""

    def write(path: Path) -> None:
        # To an open file: `savez` would append a suffix to a path.
        with path.open("wb") as output:
            np.savez(output, allow_pickle=False, **arrays)

    write_whole(file, write)


_Row = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]


def _decode(split: Path, seed: int, media: MediaProcessor, num_clips: int) -> Iterator[_Row]:
    total = sum(record["kind"] == "clip" for record in read_jsonl(split / "ground_truth.jsonl", DatasetError))
    for index in tqdm(range(min(total, num_clips)), "decoding clips", unit="clip"):
        sample = random_sample(seed, "train", "clip", index)
        assert sample.scene is not None
        video, _ = media.process_video(split / media_file(sample), audio=False)
        for frame, number in zip(video.frames, video.indices, strict=True):
            yield _row(frame, sample.scene, number / max(1, sample.num_frames - 1))


def _draw(seed: int, size: int, count: int) -> Iterator[_Row]:
    for index in tqdm(range(count), "drawing images", unit="image"):
        rng = np.random.default_rng([seed, 77, index])
        scene, time = random_scene(rng, moving=rng.random() < 0.5, held_out=False), rng.random()
        if index % 2:
            scene = dataclasses.replace(scene, **_unnamed_colours(scene, rng))
        row = _row(_compressed(draw_frame(scene, _IMAGE_SIZE, time), size, rng), scene, time)
        if index % 2:
            row[1][[FRAME_ATTRIBUTES.index("colour"), FRAME_ATTRIBUTES.index("background")]] = IGNORE_INDEX
        yield row


def _unnamed_colours(scene: Scene, rng: Generator) -> dict[str, Any]:
    """Return random, distinct colours for a scene's objects and background, by the names of their fields."""
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


def _compressed(image: NDArray[np.uint8], size: int, rng: Generator) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=int(rng.integers(*_JPEG_QUALITIES)))
    with Image.open(buffer) as decoded:
        if rng.random() < 0.5:
            return resize_image(decoded, size)
        return np.asarray(decoded.resize((size, size), Image.Resampling.BILINEAR))


def _row(frame: NDArray[np.uint8], scene: Scene, time: float) -> _Row:
    still = dataclasses.replace(scene, look=scene.look_at(time), later=None, motion=None, centre=scene.centre_at(time))
    values = facts_of(still, None).values
    labels = np.array([ATTRIBUTES[name].index(values[name]) for name in FRAME_ATTRIBUTES])
    places = np.full((MAX_OBJECTS, 2), -1, dtype=np.float32)
    places[: len(scene.offsets)] = scene.places_at(time)
    return frame, labels, places, np.array(scene.radius, dtype=np.float32), np.array(still.centre, dtype=np.float32)
