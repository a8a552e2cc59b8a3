"""Pretraining of the audio encoder: which sound a segment of two seconds is, and what its pitch does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from examples.tiny_world.pretraining.frames import save_arrays
from examples.tiny_world.pretraining.steps import StepSchedule, run_steps
from examples.tiny_world.world.facts import facts_of
from examples.tiny_world.world.layouts import media_file
from examples.tiny_world.world.samples import random_sample
from examples.tiny_world.world.vocabulary import SOUNDS
from video_llama.errors import DatasetError
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.processor.media_processor import MediaProcessor
from video_llama.utils.jsonl import read_jsonl

__all__ = ["SegmentPool", "load_segment_pool", "train_audio_encoder"]

PITCHES = ("rises", "falls", "stays the same", "")
"""Movements of a pitch; silence has none."""

_MEASURED_SEGMENTS = 400


@dataclass(frozen=True)
class SegmentPool:
    """Audio segments in memory.

    Attributes:
        values: (segments, mel_bins, mel_frames), float16, normalised log-mel.
        sounds, pitches: (segments,), int64: which of `SOUNDS` and of `PITCHES`.
    """

    values: NDArray[np.float16]
    sounds: NDArray[np.int64]
    pitches: NDArray[np.int64]

    def inputs(self, chosen: NDArray[np.int64]) -> Tensor:
        """Return segments, (len(chosen), 1, mel_bins, mel_frames), float32."""
        return torch.from_numpy(self.values[chosen].astype(np.float32)).unsqueeze(1)


def load_segment_pool(file: Path, corpus: Path, media: MediaProcessor, num_files: int) -> SegmentPool:
    """Read the pool from a file, or make and write it from the training split's clips and audio files.

    Args:
        file: a `.npz`.
        corpus: what `make_clipworld.py` wrote.
        media: how audio is read; the first and the last segment of each file are taken.
        num_files: at most.
    """
    if not file.exists():
        save_arrays(file, _read_segments(corpus, media, num_files))
    with np.load(file) as arrays:
        return SegmentPool(arrays["values"], arrays["sounds"], arrays["pitches"])


def _read_segments(corpus: Path, media: MediaProcessor, num_files: int) -> dict[str, NDArray]:
    seed = int(json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))["seed"])
    counts = {"clip": 0, "sound": 0}
    for record in read_jsonl(corpus / "train/ground_truth.jsonl", DatasetError):
        counts[record["kind"]] = counts.get(record["kind"], 0) + 1
    samples = [random_sample(seed, "train", stream, i) for stream in ("sound", "clip") for i in range(counts[stream])]
    samples = [sample for sample in samples if sample.sound is not None][:num_files]
    values, sounds, pitches = [], [], []
    for sample in tqdm(samples, "reading sounds", unit="file"):
        assert sample.sound is not None
        segments = media.process_audio(corpus / "train" / media_file(sample)).values
        values += [segments[0, 0].half().numpy(), segments[-1, 0].half().numpy()]
        sounds += [SOUNDS.index(sample.sound.kind)] * 2
        pitches += [PITCHES.index(facts_of(None, sample.sound).values.get("pitch", ""))] * 2
    return {"values": np.stack(values), "sounds": np.array(sounds), "pitches": np.array(pitches)}


def train_audio_encoder(
    encoder: ImageBindTrunk, pool: SegmentPool, schedule: StepSchedule, folder: Path, batch_size: int = 32
) -> None:
    """Train the trunk in place."""
    num_held_back = min(_MEASURED_SEGMENTS, len(pool.values) // 10)
    last = len(pool.values) - num_held_back
    width = encoder.config.output_size
    modules = nn.ModuleDict(
        {"encoder": encoder, "sound": nn.Linear(width, len(SOUNDS)), "pitch": nn.Linear(width, len(PITCHES))}
    )
    targets = {"sound": torch.from_numpy(pool.sounds), "pitch": torch.from_numpy(pool.pitches)}

    def step(rng: Generator) -> Mapping[str, Tensor]:
        chosen = rng.integers(last, size=batch_size)
        values = pool.inputs(chosen)
        # Louder or softer: a sound keeps its name.
        values = values + torch.from_numpy(rng.normal(0, 0.2, size=(batch_size, 1, 1, 1)).astype(np.float32))
        vectors = encoder(values)
        return {name: F.cross_entropy(modules[name](vectors), target[chosen]) for name, target in targets.items()}

    def measure() -> Mapping[str, float]:
        chosen = np.arange(last, last + num_held_back)
        vectors = encoder(pool.inputs(chosen))
        return {
            name: float((modules[name](vectors).argmax(-1) == target[chosen]).float().mean())
            for name, target in targets.items()
        }

    run_steps("sound", modules, step, schedule, folder, seed=2, measure=measure)
