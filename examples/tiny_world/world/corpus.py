"""Write the whole corpus: splits, media files, annotations, ground truth."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from examples.tiny_world.world.drawing import draw_clip, draw_frame
from examples.tiny_world.world.encoding import encode_jpeg, write_clip, write_sound
from examples.tiny_world.world.layouts import (
    FOLDERS,
    SHARD_SIZE,
    media_file,
    write_annotations,
    write_json,
    write_json_lines,
    write_shard,
)
from examples.tiny_world.world.samples import SPLITS, Sample, random_sample
from examples.tiny_world.world.sounds import draw_sound
from video_llama.errors import ConfigError, DatasetError

__all__ = ["WorldSettings", "make_corpus", "num_samples"]

FORMAT_VERSION = 1
Map = Callable[[Callable[[int], Any], range], Iterator[Any]]
# Number of samples of each stream, as a share of the number of clips.
_SHARES = {"clip": 1.0, "image": 1.0, "sound": 0.5, "cc_sbu": 0.25, "laion": 0.25}


@dataclass(frozen=True)
class WorldSettings:
    """What a corpus contains. Nothing else decides the content of its files.

    Attributes:
        num_clips: of all splits together.
        seed: of all randomness.
        image_size: height and width of clips and images, in pixels.
        splits: weights of train, validation and test; a split of weight 0 is left out.

    Raises:
        ConfigError: an invalid value.
    """

    num_clips: int
    seed: int
    image_size: int = 128
    splits: tuple[float, float, float] = (90, 5, 5)

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ConfigError(f"clips must be at least 1, not {self.num_clips}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, but is {self.seed}")
        if self.image_size % 2 or not 32 <= self.image_size <= 1024:
            raise ConfigError(f"image size must be an even number from 32 to 1024, not {self.image_size}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.splits) or not sum(self.splits):
            raise ConfigError(f"splits must be weights from 0 on, not all 0, but are {self.splits}")
        wanted = sum(weight > 0 for weight in self.splits)
        if self.num_clips < wanted:
            raise ConfigError(f"{self.num_clips} clips do not fill {wanted} splits; make more clips or fewer splits")

    @property
    def split_sizes(self) -> dict[str, int]:
        """Return the number of clips of each split, at least one."""
        parts = {name: weight / sum(self.splits) for name, weight in zip(SPLITS, self.splits, strict=True) if weight}
        sizes = {name: max(1, round(part * self.num_clips)) for name, part in parts.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        sizes[largest] += self.num_clips - sum(sizes.values())
        return sizes


def num_samples(stream: str, num_clips: int) -> int:
    """Return the number of samples of a stream that go with a number of clips."""
    return max(1, round(_SHARES[stream] * num_clips))


def make_corpus(
    out: Path, settings: WorldSettings, workers: int = 1, advance: Callable[[int], object] = lambda number: None
) -> None:
    """Write a corpus to a new or empty folder. `corpus.json` is written last: a folder with it is complete.

    Args:
        out: the folder.
        settings: what it contains.
        workers: processes; their number does not change the files.
        advance: called with the number of clips that were done.

    Raises:
        ConfigError: fewer than one worker.
        DatasetError: the folder is not empty, or is a file.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: exists and is not an empty folder; name another, or remove it")
    with _open_map(workers) as mapped:
        for split, num_clips in settings.split_sizes.items():
            _make_split(out / split, split, num_clips, settings, mapped, advance)
    content = {"format": FORMAT_VERSION, "seed": settings.seed, "image_size": settings.image_size}
    write_json(out / "corpus.json", {**content, "clips": settings.split_sizes})


def _make_split(
    folder: Path,
    split: str,
    num_clips: int,
    settings: WorldSettings,
    mapped: Map,
    advance: Callable[[int], object],
) -> None:
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    counts = {stream: num_samples(stream, num_clips) for stream in _SHARES}
    samples: dict[str, list[Sample]] = {}
    truths: list[dict[str, Any]] = []
    for stream in ("clip", "image", "sound"):
        samples[stream] = []
        make = partial(_make_file, folder, settings, split, stream)
        for sample in mapped(make, range(counts[stream])):
            samples[stream].append(sample)
            truths.append(sample.truth(media_file(sample)))
            if stream == "clip":
                advance(1)
    for stream in ("cc_sbu", "laion"):
        pack = partial(_make_shard, folder, settings, split, stream, counts[stream])
        for shard_truths in mapped(pack, range(math.ceil(counts[stream] / SHARD_SIZE))):
            truths += shard_truths
    write_annotations(folder, samples["clip"], samples["image"], samples["sound"], settings.seed)
    write_json_lines(folder / "ground_truth.jsonl", truths)


@contextmanager
def _open_map(workers: int) -> Iterator[Map]:
    """Yield a `map` over this many processes, with results in order."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def _make_file(folder: Path, settings: WorldSettings, split: str, stream: str, index: int) -> Sample:
    """Draw one sample and write its file."""
    sample = random_sample(settings.seed, split, stream, index)
    path = folder / media_file(sample)
    path.parent.mkdir(exist_ok=True)
    samples = None if sample.sound is None else draw_sound(sample.sound)
    if sample.scene is None:
        assert samples is not None
        write_sound(path, samples)
    elif sample.kind == "image":
        path.write_bytes(encode_jpeg(draw_frame(sample.scene, settings.image_size)))
    else:
        write_clip(path, draw_clip(sample.scene, sample.num_frames, settings.image_size), sample.fps, samples)
    return sample


def _make_shard(
    folder: Path, settings: WorldSettings, split: str, stream: str, num_images: int, shard: int
) -> list[dict[str, Any]]:
    """Draw the images of one tar file, write it, and return their ground truth."""
    file = f"{stream}/{shard:05d}.tar"
    numbers = range(shard * SHARD_SIZE, min(num_images, (shard + 1) * SHARD_SIZE))
    samples = [random_sample(settings.seed, split, stream, index) for index in numbers]
    images = [encode_jpeg(draw_frame(sample.scene, settings.image_size)) for sample in samples if sample.scene]
    write_shard(folder / file, zip(samples, images, strict=True))
    return [{**sample.truth(f"{file}#{sample.id}.jpg"), "kind": "image in shard"} for sample in samples]
