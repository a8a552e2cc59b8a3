"""The questions of a generated corpus, file by file, and the answers that are right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from video_llama.constants import Modality
from video_llama.errors import DatasetError
from video_llama.evaluation.asking import AskedFile, Question
from video_llama.utils.jsonl import read_jsonl

__all__ = ["load_questions"]

# The words of the ground truth.
_MODALITIES: dict[str, Modality] = {"clip": "video", "image": "image", "sound": "audio"}
_GROUND_TRUTH = "ground_truth.jsonl"


def load_questions(folder: Path, limit: int | None = None) -> list[AskedFile]:
    """Read the ground truth of a split; images in shards, which are like the others, are left out.

    Args:
        folder: a split of a corpus, or a corpus with a test split.
        limit: most files of each modality.

    Raises:
        DatasetError: no ground truth there, or it is damaged.
    """
    split = next((place for place in (folder, folder / "test") if (place / _GROUND_TRUTH).exists()), None)
    if split is None:
        wanted = "give a split of what scripts/make_clipworld.py wrote, or --dataset for annotations of another form"
        raise DatasetError(f"{folder}: no {_GROUND_TRUTH} in this folder; {wanted}")
    path = split / _GROUND_TRUTH
    files: dict[str, list[AskedFile]] = {kind: [] for kind in _MODALITIES}
    for number, truth in enumerate(read_jsonl(path, DatasetError), start=1):
        try:
            if truth["kind"] in files:
                files[truth["kind"]].append(_asked_file(split, truth))
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{path}, line {number}: damaged ({error!r})") from error
    return [file for of_kind in files.values() for file in of_kind[:limit]]


def _asked_file(split: Path, truth: Mapping[str, Any]) -> AskedFile:
    dialogues: dict[int, list[Question]] = {}
    for entry in truth["questions"]:
        question = Question(entry["dialogue"], entry["turn"], entry["attribute"], entry["value"], entry["question"])
        dialogues.setdefault(question.dialogue, []).append(question)
    is_seen = truth.get("combination", "seen") == "seen"
    return AskedFile(split / truth["file"], _MODALITIES[truth["kind"]], is_seen, list(dialogues.values()))
