"""The questions of a generated corpus, file by file, and the answers that are right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from video_llama.errors import DatasetError
from video_llama.evaluation.asking import AskedFile, Question

__all__ = ["load_questions"]

_KINDS = ("clip", "image", "sound")
_GROUND_TRUTH = "ground_truth.jsonl"


def load_questions(folder: Path, limit: int | None = None) -> list[AskedFile]:
    """Read the ground truth of a split; pictures in shards, which are like the others, are left out.

    Args:
        folder: a split of a corpus, or a corpus with a test split.
        limit: most files of each kind.

    Raises:
        DatasetError: no ground truth there, or it is damaged.
    """
    split = next((place for place in (folder, folder / "test") if (place / _GROUND_TRUTH).exists()), None)
    if split is None:
        raise DatasetError(f"{folder}: no {_GROUND_TRUTH} here; give a split of what scripts/make_clipworld.py wrote")
    files: dict[str, list[AskedFile]] = {kind: [] for kind in _KINDS}
    for number, line in enumerate((split / _GROUND_TRUTH).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            truth = json.loads(line)
            if truth["kind"] in files:
                files[truth["kind"]].append(_asked_file(split, truth))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{split / _GROUND_TRUTH}, line {number}: damaged ({error!r})") from error
    return [file for kind in _KINDS for file in files[kind][:limit]]


def _asked_file(split: Path, truth: Mapping[str, Any]) -> AskedFile:
    dialogues: dict[int, list[Question]] = {}
    for entry in truth["questions"]:
        question = Question(entry["dialogue"], entry["turn"], entry["attribute"], entry["value"], entry["question"])
        dialogues.setdefault(question.dialogue, []).append(question)
    is_seen = truth.get("combination", "seen") == "seen"
    return AskedFile(split / truth["file"], truth["kind"], is_seen, list(dialogues.values()))
