"""The command `video-llama evaluate`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import video_llama
from video_llama.cli.command import CommandParser, numbered, run_command
from video_llama.cli.models import show_model
from video_llama.cli.options import add_base_option, positive, whole_number
from video_llama.errors import ConfigError

if TYPE_CHECKING:
    from video_llama.inference.engine import VideoLlama

__all__ = ["add_question_options", "evaluate", "main"]

DESCRIPTION = """\
Measure a model: right answers on a generated corpus, or captions and answers on a dataset of research.

    video-llama evaluate --model video-llama-tiny --data data/clipworld-test --json figures.json
    video-llama evaluate --model video-llama-tiny --data data/clipworld-test --ablate shuffle_frames
    video-llama evaluate --model FOLDER --dataset webvid --data annotations/ --media videos/
    video-llama evaluate --model FOLDER --dataset messages --data mine.jsonl --media videos/ --json answers.json

Of a generated corpus (examples/tiny_world/README.md), the model is given the files alone, encoded once more under new
names, and an answer is right if it names the right value and no other. With --dataset, in the layouts of docs/data.md,
captions (of dialogues: first answers) are compared with the annotated ones: BLEU, ROUGE-L and CIDEr, by pycocoevalcap
(pip install 'video_llama[metrics]'). Of datasets of messages, every question of every dialogue is asked, each after the
annotated answers to those before it, and answers are compared by exact match, F1 of words and ROUGE-L.
"""
ABLATIONS = ("frame_positions", "video_qformer", "audio_qformer", "audio", "shuffle_frames", "swap_audio")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="video-llama-tiny, a folder, a hub id or an adapter"
    )
    add_base_option(parser)
    add_question_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and all answers")
    parser.add_argument("--ablate", choices=ABLATIONS, help="take this away, to see what it contributes")
    return parser


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add what a model is asked, and how."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a corpus, a split of one, or annotations",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="most files (of a corpus: of each modality)")
    batch = "prompts at a time (default: 64; with --dataset 16)"
    parser.add_argument("--batch-size", type=positive, metavar="N", help=batch)
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    captions = parser.add_argument_group("captions and dialogues of a dataset")
    captions.add_argument("--dataset", metavar="NAME", help="webvid, cc_sbu_align, messages, … as in configurations")
    captions.add_argument("--media", type=Path, metavar="DIR", help="folder of the media files that --data names")
    captions.add_argument("--data-type", choices=["video", "images", "audio"], help="how files are read")
    captions.add_argument("--prompt", metavar="TEXT", help="asked where the annotations hold no question")
    longest = "most new tokens of an answer (default: 64)"
    captions.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help=longest)
    workers = "processes that read dialogues' media (default: 2)"
    captions.add_argument("--workers", type=whole_number(0), default=2, metavar="N", help=workers)


def evaluate_corpus(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return accuracies over a generated corpus, with what was evaluated, and all answers."""
    report = _tiny_world().evaluate_corpus(
        arguments.model,
        arguments.data,
        model_base=arguments.model_base,
        device=arguments.device,
        ablation=arguments.ablate,
        limit=arguments.limit,
        batch_size=arguments.batch_size or 64,
    )
    return what_is_evaluated(arguments) | report


def format_corpus(report: dict[str, Any]) -> str:
    """Return the accuracies as a table in Markdown."""
    text: str = _tiny_world().format_table(report)
    return text


def _tiny_world() -> Any:
    """Return the module that knows generated corpora; it is in the repository, and not in the installed package.

    Raises:
        ConfigError: it is not there.
    """
    root = Path(video_llama.__file__).parents[1]
    if not (root / "examples" / "tiny_world").is_dir():
        raise ConfigError("corpora of the generated world need the source tree of video_llama; or give --dataset NAME")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("examples.tiny_world.evaluation.command")


def _load(arguments: argparse.Namespace) -> VideoLlama:
    """Return the model without what --ablate takes away."""
    from video_llama.evaluation.ablation import apply_to_model
    from video_llama.inference.load import load_pretrained_model

    model = load_pretrained_model(
        arguments.model, arguments.model_base, device=arguments.device, half=False, verbose=False
    )
    show_model(model)
    apply_to_model(arguments.ablate, model)
    return model


def evaluate_captions(arguments: argparse.Namespace) -> dict[str, object]:
    """Return metrics over all readable files of a dataset, with what was evaluated, and all answers."""
    from tqdm import tqdm

    from video_llama.evaluation.captions import caption_files, caption_metrics, load_captions
    from video_llama.inference.captioning import DEFAULT_PROMPT

    files = load_captions(
        arguments.dataset, arguments.data, arguments.media, arguments.data_type, limit=arguments.limit
    )
    model = _load(arguments)
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


def evaluate_dialogues(arguments: argparse.Namespace) -> dict[str, object]:
    """Return metrics over all questions of a dataset of messages, overall and by turn, and all answers."""
    from tqdm import tqdm

    from video_llama.evaluation.dialogues import answer_examples, dialogue_metrics, load_dialogues

    if arguments.ablate in ("audio", "shuffle_frames", "swap_audio"):
        raise ConfigError(f"--ablate {arguments.ablate} changes the media, which dialogues do not allow")
    if arguments.prompt is not None:
        raise ConfigError("--prompt is for captions: dialogues have questions of their own")
    places = (arguments.dataset, arguments.data, arguments.media, arguments.data_type)
    examples = load_dialogues(*places, limit=arguments.limit)
    model = _load(arguments)
    with tqdm(total=len(examples), desc="asking", unit="dialogue") as bar:
        settings = (arguments.batch_size or 16, arguments.max_new_tokens, arguments.workers)
        results = answer_examples(model, examples, *settings, advance=bar.update)
    answers = results.answers
    if not answers:
        raise ConfigError(f"no dialogue could be asked: {next(iter(results.unusable.items()), arguments.data)}")
    by_turn = {
        str(turn): {
            "questions": sum(answer.turn == turn for answer in answers),
            **dialogue_metrics([answer for answer in answers if answer.turn == turn]),
        }
        for turn in sorted({answer.turn for answer in answers})
    }
    return (
        what_is_evaluated(arguments)
        | {"dataset": arguments.dataset, "dialogues": len({answer.id for answer in answers})}
        | {"questions": len(answers), "unusable": results.unusable, "metrics": dialogue_metrics(answers)}
        | {"by_turn": by_turn, "answers": [answer.as_json() for answer in answers]}
    )


def format_dialogues(report: dict[str, Any]) -> str:
    """Return the metrics as a table in Markdown, with a row for each turn, and what could not be asked."""
    unusable = report["unusable"]
    asked = f"{numbered(report['questions'], 'question')} of {numbered(report['dialogues'], 'dialogue')}"
    head = f"{asked}; {len(unusable)} could not be asked"
    lines = [head, *(f"  {id_}: {error}" for id_, error in unusable.items())]
    names = list(report["metrics"])
    lines += ["", f"| turn | questions | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    rows = {**report["by_turn"], "all": {"questions": report["questions"], **report["metrics"]}}
    for turn, row in rows.items():
        lines.append(f"| {turn} | {row['questions']} | {' | '.join(f'{row[name]:.4f}' for name in names)} |")
    return "\n".join(lines)


def what_is_evaluated(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what the report begins with."""
    base: dict[str, object] = {}
    if arguments.model_base is not None:
        base["model_base"] = arguments.model_base
    return {"model": arguments.model, **base, "data": str(arguments.data), "ablated": arguments.ablate}


def format_metrics(report: dict[str, Any]) -> str:
    """Return the metrics as a table in Markdown, and the files that are missing from them."""
    metrics, unreadable = report["metrics"], report["unreadable"]
    lines = [f"{numbered(report['files'], 'file')} of {report['dataset']}, {len(unreadable)} could not be read"]
    lines += [f"  {id_}: {error}" for id_, error in unreadable.items()]
    lines += ["", "| metric | value |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in metrics.items())]
    return "\n".join(lines)


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options ask for: figures, and all answers."""
    measure, _ = _way(arguments)
    return measure(arguments)


def _way(
    arguments: argparse.Namespace,
) -> tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]:
    """Return how to measure what the options name, and how to show it."""
    from video_llama.evaluation.captions import DATA_TYPES

    if arguments.dataset is None:
        return evaluate_corpus, format_corpus
    if arguments.dataset in DATA_TYPES:
        return evaluate_captions, format_metrics
    return evaluate_dialogues, format_dialogues


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the figures, and write them with all answers where --json says."""
    from video_llama.utils.files import check_output_file, write_whole

    if arguments.json is not None:
        check_output_file(arguments.json, "--json")
    _, show = _way(arguments)
    report = evaluate(arguments)
    if arguments.json is not None:
        text = json.dumps(report, indent=1) + "\n"
        write_whole(arguments.json, partial(Path.write_text, data=text, encoding="utf-8"))
    sys.stdout.write(f"{show(report)}\n")
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(run, build_parser(prog).parse_args(argv))
