#!/usr/bin/env python
"""Measure a model: right answers on a generated corpus, or captions and answers on a dataset of research.

    python scripts/evaluate.py --model video-llama-tiny --data data/clipworld-test --json figures.json
    python scripts/evaluate.py --model video-llama-tiny --data data/clipworld-test --ablate shuffle_frames
    python scripts/evaluate.py --model FOLDER --dataset webvid --data annotations/ --media videos/

Of a generated corpus (examples/tiny_world/README.md), the model is given the files alone, encoded once more under new
names, and an answer is right if it names the right value and no other. With --dataset, in the layouts of docs/data.md,
captions (of dialogues: first answers) are compared with the annotated ones: BLEU, ROUGE-L and CIDEr, by pycocoevalcap
(pip install 'video_llama[metrics]').
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed

ABLATIONS = ("frame_positions", "video_qformer", "audio_qformer", "audio", "shuffle_frames", "swap_audio")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME", help="video-llama-tiny, a folder or a hub id")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a corpus, a split of one, or annotations",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and all answers")
    parser.add_argument("--limit", type=int, metavar="N", help="most files (of a corpus: of each modality)")
    parser.add_argument("--ablate", choices=ABLATIONS, help="take this away, to see what it contributes")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts at a time (64; with --dataset 16)")
    parser.add_argument("--device", metavar="DEVICE", help="by default a GPU if there is one")
    captions = parser.add_argument_group("captions of a dataset")
    captions.add_argument("--dataset", metavar="NAME", help="webvid, cc_sbu_align, … as in configurations")
    captions.add_argument("--media", type=Path, metavar="DIR", help="folder of the media files that --data names")
    captions.add_argument("--data-type", choices=["video", "images", "audio"], help="how files are read")
    captions.add_argument("--prompt", metavar="TEXT", help="asked where the annotations hold no question")
    captions.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of a caption (64)")
    return parser


def evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the report of `accuracy_report` with what was evaluated, and all answers."""
    from tqdm import tqdm

    from examples.tiny_world.evaluation.questions import load_questions
    from examples.tiny_world.evaluation.reencoding import reencode
    from examples.tiny_world.evaluation.report import accuracy_report
    from video_llama.evaluation.ablation import apply_to_media, apply_to_model
    from video_llama.evaluation.asking import answer_dialogues, read_media
    from video_llama.inference.load import load_pretrained_model

    files = load_questions(arguments.data, arguments.limit)
    model = load_pretrained_model(arguments.model, device=arguments.device, half=False, verbose=False)
    apply_to_model(arguments.ablate, model)
    media = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(tqdm(files, "reading", unit="file")):
            path = reencode(file.path, file.modality, Path(scratch) / str(number))
            media.append(read_media(model, path, file.modality))
            path.unlink()
    media = apply_to_media(arguments.ablate, media)
    total = sum(len(turns) for file in files for turns in file.dialogues)
    with tqdm(total=total, desc="asking", unit="question") as bar:
        answered = answer_dialogues(model, files, media, arguments.batch_size or 64, bar.update)
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
    return what_is_evaluated(arguments) | accuracy_report(answered) | {"answers": answers}


def evaluate_captions(arguments: argparse.Namespace) -> dict[str, object]:
    """Return metrics over all readable files of a dataset, with what was evaluated, and all answers."""
    from tqdm import tqdm

    from video_llama.evaluation.ablation import apply_to_model
    from video_llama.evaluation.captions import caption_files, caption_metrics, load_captions
    from video_llama.inference.captioning import DEFAULT_PROMPT
    from video_llama.inference.load import load_pretrained_model

    files = load_captions(
        arguments.dataset, arguments.data, arguments.media, arguments.data_type, limit=arguments.limit
    )
    model = load_pretrained_model(arguments.model, device=arguments.device, half=False, verbose=False)
    apply_to_model(arguments.ablate, model)
    with tqdm(total=len(files), desc="captioning", unit="file") as bar:
        results = caption_files(
            model,
            files,
            arguments.prompt or DEFAULT_PROMPT,
            arguments.ablate,
            arguments.batch_size or 16,
            arguments.max_new_tokens,
            bar.update,
        )
    unreadable = {result.file.id: result.error for result in results if result.answer is None}
    answers = [
        {
            "id": result.file.id,
            "question": result.file.question,
            "answer": result.answer,
            "references": result.file.references,
        }
        for result in results
        if result.answer is not None
    ]
    figures = {"files": len(answers), "unreadable": unreadable, "metrics": caption_metrics(results)}
    return what_is_evaluated(arguments) | {"dataset": arguments.dataset} | figures | {"answers": answers}


def what_is_evaluated(arguments: argparse.Namespace) -> dict[str, object]:
    return {"model": arguments.model, "data": str(arguments.data), "ablated": arguments.ablate}


def format_metrics(report: dict[str, object]) -> str:
    """Return the metrics as a table in Markdown, and the files that are missing from them."""
    metrics, unreadable = report["metrics"], report["unreadable"]
    assert isinstance(metrics, dict)
    assert isinstance(unreadable, dict)
    lines = [f"{report['files']} files of {report['dataset']}, {len(unreadable)} could not be read"]
    lines += [f"  {id_}: {error}" for id_, error in unreadable.items()]
    lines += ["", "| metric | value |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in metrics.items())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    from examples.tiny_world.evaluation.report import format_table
    from video_llama.errors import VideoLlamaError

    try:
        report = evaluate(arguments) if arguments.dataset is None else evaluate_captions(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (VideoLlamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(report) if arguments.dataset is None else format_metrics(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
