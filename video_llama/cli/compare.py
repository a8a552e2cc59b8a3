"""The command `video-llama compare`."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_llama.cli.command import CommandParser, run_command
from video_llama.errors import ConfigError

if TYPE_CHECKING:
    from video_llama.cli.comparison import ComparedRun

__all__ = ["main"]

DESCRIPTION = """\
Train the same small budget for each of several configurations and seeds, ask each model the same held-out questions,
and print a table: right answers, parameters, seconds, memory, bytes of cached features.

    video-llama compare configs/compare/*.yaml --data data/clipworld-test --output output/compare --seeds 1 2
    video-llama compare a.yaml b.yaml --dataset messages --data held_out.jsonl --media videos/ --output output/mine

Each configuration is one of `video-llama train`; its run.seed, run.output_dir and features.dir are set here. Questions
are those of `video-llama evaluate`. Each run is a process of its own. What is finished is not done again, and what was
interrupted goes on: give the same command once more. Every run is a line of OUTPUT/results.jsonl.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    from video_llama.cli.evaluate import add_question_options

    parser = CommandParser(prog=prog, description=DESCRIPTION)
    add = parser.add_argument
    add("configurations", nargs="+", type=Path, metavar="YAML", help="of trainings; their file names are shown")
    add("--output", type=Path, required=True, metavar="DIR", help="runs, features and results.jsonl")
    add("--seeds", nargs="+", type=int, default=[1, 2], metavar="N", help="of each configuration (default: 1 2)")
    add("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of all YAMLs")
    add("--figure", metavar="NAME", help="which figure the table shows (default: that of all questions)")
    add("--plot", type=Path, metavar="FILE", help="draw it over the time of a step (.png, .svg)")
    add_question_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train, ask and print what is missing, then the table of all."""
    from video_llama.cli.comparison import draw_plot, format_results
    from video_llama.utils.files import make_folder
    from video_llama.utils.locks import OutputLock

    runs = _planned(arguments)
    make_folder(arguments.output, "--output")
    lock = OutputLock(arguments.output / "compare.lock", arguments.output)
    try:
        results = _complete(runs, arguments.output / "results.jsonl")
    finally:
        lock.release()
    figure = _chosen_figure(results[0]["figures"], arguments.figure)
    print(format_results(results, figure))
    if arguments.plot is not None:
        draw_plot(results, figure, arguments.plot)
    return 0


def _planned(arguments: argparse.Namespace) -> list[ComparedRun]:
    """Return every run, seed by seed, so that an early stop leaves all configurations with the first seeds.

    Raises:
        ConfigError: a configuration cannot be read, or two have the same name.
    """
    from video_llama.cli.comparison import ComparedRun
    from video_llama.config import load_config

    names = [path.stem for path in arguments.configurations]
    if len(set(names)) < len(names):
        raise ConfigError("two configurations have the same file name, which names their rows in the table")
    own = ("configurations", "output", "seeds", "options", "figure", "plot")
    questions = {name: value for name, value in vars(arguments).items() if name not in own}
    asked = argparse.Namespace(**questions, model_base=None, ablate=None)
    runs = []
    for seed in dict.fromkeys(arguments.seeds):
        for path in arguments.configurations:
            folder = arguments.output / path.stem
            options = [f"run.seed={seed}", f"run.output_dir={folder / f'seed_{seed}'}", "run.resume_ckpt_path=auto"]
            config = load_config(path, [*arguments.options, *options])
            if config.features.dir is not None:
                # Each configuration has a cache of its own, whose size is a figure; its seeds share it.
                config.features.dir = str(folder / "features")
            runs.append(ComparedRun(path.stem, config, asked))
    return runs


def _complete(runs: Sequence[ComparedRun], file: Path) -> list[dict[str, Any]]:
    """Return the results of all runs: from the file, and of the others made now and appended to it.

    Raises:
        ConfigError: a run of the file had other settings, or a process ended without a result.
    """
    from video_llama.cli.comparison import measure_run
    from video_llama.utils.jsonl import append_jsonl, drop_cut_line

    if file.exists():
        drop_cut_line(file)
    done = _finished(file)
    results = []
    for number, planned in enumerate(runs, start=1):
        identity = planned.identity
        name, seed = identity["name"], identity["seed"]
        result = done.get((name, seed))
        if result is None:
            print(f"{number} of {len(runs)}: {name}, seed {seed}", flush=True)
            # A process for each: its peak of memory is that of this run, and a crash is no other run's.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    result = pool.submit(measure_run, planned).result()
                except BrokenProcessPool as error:
                    raise ConfigError(
                        f"{name}, seed {seed}: the process ended (out of memory?); the same command goes on from its "
                        "newest checkpoint"
                    ) from error
            append_jsonl(file, result)
        elif result["settings"] != identity["settings"]:
            raise ConfigError(
                f"{file}: {name}, seed {seed} was made with other settings; choose another --output, or remove its "
                "line and its folder"
            )
        results.append(result)
    return results


def _finished(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    from video_llama.utils.jsonl import read_jsonl

    if not file.exists():
        return {}
    return {(line["name"], line["seed"]): line for line in read_jsonl(file, ConfigError, "result of a comparison")}


def _chosen_figure(figures: dict[str, float], asked: str | None) -> str:
    """Return the name of the figure to show: what was asked for, else that of all questions, else the first."""
    if asked is None:
        return "all first questions" if "all first questions" in figures else next(iter(figures))
    if asked not in figures:
        raise ConfigError(f"--figure {asked!r}: there is no such figure; known: {', '.join(figures)}")
    return asked


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    interrupted = "interrupted; the same command goes on"
    return run_command(run, build_parser(prog).parse_args(argv), interrupted)
