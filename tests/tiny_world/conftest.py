"""A small corpus, written once for all tests of it, and its ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from examples.tiny_world.world.samples import SPLITS
from examples.tiny_world.world.scene import Scene, random_scene

SETTINGS = WorldSettings(num_clips=60, seed=3, image_size=64, splits=(4, 1, 1))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40, 10 and 10 clips."""
    folder = tmp_path_factory.mktemp("clipworld") / "corpus"
    make_corpus(folder, SETTINGS)
    return folder


@pytest.fixture(scope="session")
def truths(corpus: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each split's ground truth."""
    return {split: read_lines(corpus / split / "ground_truth.jsonl") for split in SPLITS}


def read_lines(path: Path) -> list[Any]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_kind(truths: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The clips, images or sounds of a ground truth."""
    return [truth for truth in truths if truth["kind"] == kind]


def random_scenes(number: int, *, moving: bool = True, held_out: bool = True) -> list[Scene]:
    """Scenes from seeds 0, 1, …"""
    return [random_scene(np.random.default_rng(seed), moving=moving, held_out=held_out) for seed in range(number)]
