#!/usr/bin/env python
"""Ask a model the questions of a generated corpus and count its right answers.

    python scripts/evaluate.py --model video-llama-tiny --data data/clipworld-test --json figures.json
    python scripts/evaluate.py --model video-llama-tiny --data data/clipworld-test --ablate shuffle_frames

The model is given the files alone, encoded once more under new names. An answer is right if it names the right value
and no other. docs/clipworld.md describes the corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ABLATIONS = ("frame_positions", "video_qformer", "audio_qformer", "audio", "shuffle_frames", "swap_sound")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME", help="video-llama-tiny, a folder or a hub id")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a corpus, or a split of one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and all answers")
    parser.add_argument("--limit", type=int, metavar="N", help="most files of each kind")
    parser.add_argument("--ablate", choices=ABLATIONS, help="take this away, to see what it is good for")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="prompts at a time (64)")
    parser.add_argument("--device", metavar="DEVICE", help="by default a GPU if there is one")
    return parser


def evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    """The report of `accuracy_report` with what was evaluated, and all answers."""
    from tqdm import tqdm

    from video_llama.evaluation.ablation import apply_to_media, apply_to_model
    from video_llama.evaluation.asking import answer_dialogues, read_media
    from video_llama.evaluation.questions import load_questions
    from video_llama.evaluation.reencoding import reencode
    from video_llama.evaluation.report import accuracy_report
    from video_llama.model.builder import load_pretrained_model

    files = load_questions(arguments.data, arguments.limit)
    model = load_pretrained_model(arguments.model, device=arguments.device, half=False, verbose=False)
    apply_to_model(arguments.ablate, model)
    media = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(tqdm(files, "reading", unit="file")):
            path = reencode(file.path, file.kind, Path(scratch) / str(number))
            media.append(read_media(model, path, file.kind))
            path.unlink()
    media = apply_to_media(arguments.ablate, media)
    total = sum(len(turns) for file in files for turns in file.dialogues)
    with tqdm(total=total, desc="asking", unit="question") as bar:
        answered = answer_dialogues(model, files, media, arguments.batch_size, bar.update)
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
    what = {"model": arguments.model, "data": str(arguments.data), "ablated": arguments.ablate}
    return what | accuracy_report(answered) | {"answers": answers}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    from video_llama.errors import VideoLlamaError
    from video_llama.evaluation.report import format_table

    try:
        report = evaluate(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (VideoLlamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
