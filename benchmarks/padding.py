#!/usr/bin/env python
"""What `run.group_by_length` saves: the same dialogues in batches as they are drawn, and in batches of like length.

    python benchmarks/padding.py --output benchmarks/results/padding.json

Two trainings of the packaged model, from cached features, take turns: a stretch of steps of the one, then of the other.
Each dialogue is about one image and has as many questions as were drawn for it, few more often than many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.harness import cpu_name
from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama.config import Config
from video_llama.inference.load import load_pretrained_model
from video_llama.schema import BuildInfo, DatasetConfig
from video_llama.training.trainer import Trainer
from video_llama.utils.files import write_whole

WAYS = {"padded": False, "grouped": True}
NUM_IMAGES = 40
MEAN_TURNS, MOST_TURNS = 6, 40


def write_dialogues(folder: Path, count: int, seed: int) -> Path:
    """Draw images, write dialogues about them, and return the file of messages."""
    make_corpus(folder, WorldSettings(NUM_IMAGES, seed, 64, (1, 0, 0)))
    images = sorted((folder / "train/cc_sbu_align/image").iterdir())
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        image = {"type": "image", "path": str(images[rng.integers(len(images))])}
        messages: list[dict[str, Any]] = []
        for turn in range(min(int(rng.geometric(1 / MEAN_TURNS)), MOST_TURNS)):
            text = {"type": "text", "text": f"What is shape number {turn}?"}
            messages.append({"role": "user", "content": [text] if turn else [image, text]})
            messages.append({"role": "assistant", "content": "It is a small red circle that moves to the left."})
        lines.append(json.dumps({"messages": messages}))
    file = folder / "dialogues.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_trainer(arguments: argparse.Namespace, dialogues: Path, work: Path, way: str) -> Trainer:
    """Return a training of the packaged model's vision branch on the dialogues."""
    config = Config()
    config.model.unfreeze = ["video_qformer", "video_projection"]
    config.model.frozen_video_Qformer = config.model.frozen_llama_proj = False
    config.model.max_txt_len = 4000
    config.model.equip_audio_branch = False
    config.datasets = {"messages": DatasetConfig(build_info=BuildInfo(anno_dir=str(dialogues)))}
    config.features.dir = str(work / "features")
    run = config.run
    run.output_dir, run.device, run.amp, run.num_workers = str(work / way), arguments.device, False, 0
    run.max_epoch, run.iters_per_epoch = 1, arguments.rounds * arguments.steps
    run.batch_size_train, run.group_by_length = arguments.batch_size, WAYS[way]
    model = load_pretrained_model("video-llama-tiny", device=arguments.device, half=False, verbose=False)
    trainer = Trainer(config, model=model)
    trainer.cache_features()
    return trainer


def measure_stretch(trainer: Trainer, numbers: Sequence[int]) -> dict[str, float]:
    """Make some steps, and return what they cost; the batches are read before."""
    reader = trainer.batches()
    batches = [reader[number] for number in numbers]
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        # It returns the loss as a number, so a GPU has done its work.
        trainer.step([batch])
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "samples": sum(len(batch.ids) for batch in batches),
        "tokens": sum(batch.num_text_tokens for batch in batches),
        "positions": sum(batch.num_positions for batch in batches),
    }


def summarise(stretches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the padding share of all stretches, and the median of their speeds."""
    total = {name: sum(stretch[name] for stretch in stretches) for name in stretches[0]}
    return {
        "padding_share": round(1 - total["tokens"] / total["positions"], 4),
        "samples_per_cpu_second": round(statistics.median(s["samples"] / s["cpu_seconds"] for s in stretches), 2),
        "samples_per_second": round(statistics.median(s["samples"] / s["seconds"] for s in stretches), 2),
        "samples": total["samples"],
        "tokens": total["tokens"],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both ways, with every stretch."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        dialogues = write_dialogues(work / "world", arguments.dialogues, arguments.seed)
        trainers = {way: make_trainer(arguments, dialogues, work, way) for way in WAYS}
        stretches: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            steps = range(number * arguments.steps, (number + 1) * arguments.steps)
            # Who comes first changes, since a machine may get slower or faster while it is measured.
            for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
                stretches[way].append(measure_stretch(trainers[way], steps))
    return {
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "machine": cpu_name() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "figures": {way: summarise(found) for way, found in stretches.items()},
        "stretches": stretches,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write everything where --output says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=2000, help="to draw from (2000)")
    parser.add_argument("--batch-size", type=int, default=8, help="dialogues (8)")
    parser.add_argument("--steps", type=int, default=10, help="of each stretch (10)")
    parser.add_argument("--rounds", type=int, default=10, help="stretches of each way (10)")
    parser.add_argument("--seed", type=int, default=1, help="of dialogues and order (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args(argv)
    report = measure(arguments)
    print("| batches | padding | samples per CPU second | samples per second |\n|---|---|---|---|")
    for way, row in report["figures"].items():
        speeds = f"{row['samples_per_cpu_second']:.2f} | {row['samples_per_second']:.2f}"
        print(f"| {way} | {row['padding_share']:.1%} | {speeds} |")
    if arguments.output is not None:
        text = json.dumps(report, indent=1) + "\n"
        write_whole(arguments.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
