"""Ask all questions about a generated corpus: what `video-llama evaluate` does without --dataset."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.tiny_world.evaluation.questions import load_questions
from examples.tiny_world.evaluation.reencoding import reencode
from examples.tiny_world.evaluation.report import accuracy_report, format_table
from video_llama.cli.models import show_model
from video_llama.evaluation.ablation import apply_to_media, apply_to_model
from video_llama.evaluation.asking import answer_dialogues, read_media
from video_llama.inference.load import load_pretrained_model

__all__ = ["evaluate_corpus", "format_table"]


def evaluate_corpus(
    model_path: str,
    data: Path,
    *,
    model_base: str | None = None,
    device: str | None,
    ablation: str | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Return the report of `accuracy_report` with all answers.

    Args:
        model_path, model_base: as for `load_pretrained_model`.
        data: a corpus, or a split of one.
        device: by default a GPU if there is one.
        ablation: what is taken away, to see what it contributes.
        limit: most files of each modality.
        batch_size: prompts at a time.
    """
    files = load_questions(data, limit)
    model = load_pretrained_model(model_path, model_base, device=device, half=False, verbose=False)
    show_model(model)
    apply_to_model(ablation, model)
    media = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(tqdm(files, "reading", unit="file")):
            path = reencode(file.path, file.modality, Path(scratch) / str(number))
            media.append(read_media(model, path, file.modality))
            path.unlink()
    media = apply_to_media(ablation, media)
    total = sum(len(turns) for file in files for turns in file.dialogues)
    with tqdm(total=total, desc="asking", unit="question") as bar:
        answered = answer_dialogues(model, files, media, batch_size, bar.update)
    answers = [
        {
            "file": item.file.path.name,
            "turn": item.question.turn,
            "attribute": item.question.attribute,
            "value": item.question.value,
            "question": item.question.text,
            "answer": item.answer,
        }
        for item in answered
    ]
    return accuracy_report(answered) | {"answers": answers}
