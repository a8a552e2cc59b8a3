#!/usr/bin/env python
"""Compare the speed of this checkout with that of another commit: decoding, captioning, a second turn, cached training.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before --json against.json

Each checkout works in a process of its own. The two take turns, so that a busy machine slows both alike, and the
ratio is the median of the rounds' ratios: above 1, this checkout is the faster one. The small model of the package
and clips that are drawn on the spot are all it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("decode", "caption", "second turn", "cached training")
NUM_CLIPS = 32
TRAINING = """
model:
  arch: video_llama
  llama_model: {weights}/language_model
  vit_ckpt: {weights}/eva_vit_g.pth
  q_former_model: {weights}/blip2_pretrained_flant5xxl.pth
  equip_audio_branch: False
  frozen_llama_proj: False
  frozen_video_Qformer: False
  dtype: float32
datasets:
  webvid:
    data_type: video
    build_info: {{anno_dir: {corpus}/train/webvid/annotations, videos_dir: {corpus}/train/webvid/videos}}
    vis_processor:
      train: {{name: alpro_video_eval, n_frms: 8, image_size: 56}}
    text_processor:
      train: {{name: blip_caption}}
run:
  task: video_text_pretrain
  max_epoch: 1
  iters_per_epoch: 150
  batch_size_train: 8
  num_workers: 0
  log_freq: 25
  warmup_steps: 5
  output_dir: {output}
  amp: False
  device: cpu
features:
  dir: {features}
"""


class Worker:
    """A process that does tasks with the code of one checkout.

    Args:
        checkout: whose code it runs.
        corpus: folder of the clips.
    """

    def __init__(self, checkout: Path, corpus: Path) -> None:
        command = [sys.executable, __file__, str(checkout), "--serve", str(corpus)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, task: str) -> float:
        """Do a task and return how long it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(task, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{task}: the process ended with status {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(corpus: Path) -> None:
    """Do the tasks that are named on standard input, and write the seconds that each took to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tasks = build_tasks(sorted((corpus / "train" / "webvid" / "videos").rglob("*.mp4"))[:NUM_CLIPS])
    for line in sys.stdin:
        print(tasks[line.strip()](), file=answers, flush=True)


def build_tasks(clips: Sequence[Path]) -> dict[str, Callable[[], float]]:
    """The tasks by name, each a function that returns the seconds that count."""
    from video_llama import Chat, load_pretrained_model
    from video_llama.processor import MediaProcessor

    processor = MediaProcessor()
    model = load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)

    def decode() -> float:
        began = time.perf_counter()
        for clip in clips:
            processor.process_video(clip)
        return time.perf_counter() - began

    def caption() -> float:
        began = time.perf_counter()
        list(model.caption([str(clip) for clip in clips], "What is in the video?"))
        return time.perf_counter() - began

    def second_turn() -> float:
        seconds = 0.0
        for clip in clips[:4]:
            chat = Chat(model)
            chat.upload_video(str(clip))
            chat.ask("What is in the video?")
            chat.answer()
            began = time.perf_counter()
            chat.ask("And what moves?")
            chat.answer()
            seconds += time.perf_counter() - began
        return seconds

    return {"decode": decode, "caption": caption, "second turn": second_turn}


def train(checkout: Path, folder: Path, weights: Path, corpus: Path) -> float:
    """Seconds of a sample in training on cached features; the first run of a checkout fills its cache."""
    output = Path(tempfile.mkdtemp(dir=folder))
    config = folder / "training.yaml"
    config.write_text(TRAINING.format(weights=weights, corpus=corpus, output=output, features=folder / "features"))
    command = [sys.executable, "train.py", "--cfg-path", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"training with {checkout} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["event"] == "train"]
    return 1 / statistics.median(speeds)


def compare(other: Path, rounds: int, tasks: Sequence[str], folder: Path) -> dict[str, Any]:
    """Seconds of both checkouts in every round, and their ratio, by task."""
    corpus, weights = folder / "corpus", folder / "weights"
    for script in (
        ["make_clipworld.py", "--out", str(corpus), "--seed", "5", "--clips", "64", "--splits", "100", "0", "0"],
        ["make_random_checkpoint.py", "--layout", "original", "--output", str(weights)],
    ):
        command = [sys.executable, str(ROOT / "scripts" / script[0]), *script[1:]]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    checkouts = {"this": ROOT, "other": other.resolve()}
    workers = {name: Worker(checkout, corpus) for name, checkout in checkouts.items()}

    def seconds(name: str, task: str) -> float:
        if task != "cached training":
            return workers[name].seconds(task)
        scratch = folder / name
        scratch.mkdir(exist_ok=True)
        return train(checkouts[name], scratch, weights, corpus)

    results = {}
    for task in tasks:
        # The first round warms caches up and does not count; who begins alternates.
        measured: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(rounds + 1):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                measured[name].append(seconds(name, task))
        ratios = [before / now for now, before in zip(measured["this"][1:], measured["other"][1:], strict=True)]
        results[task] = {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
            **{name: round(statistics.median(values[1:]), 4) for name, values in measured.items()},
        }
        print(
            f"| {task} | {results[task]['ratio']} | {results[task]['lowest']} to {results[task]['highest']} |",
            flush=True,
        )
    for worker in workers.values():
        worker.close()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="a worktree of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds of each task (9)")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="only these (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    print("| task | times as fast | lowest to highest |\n|---|---|---|")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        results = compare(arguments.other, arguments.rounds, arguments.tasks, Path(folder))
    if arguments.json is not None:
        from benchmarks.harness import cpu_name

        report = {"cpu": cpu_name(), "cores": os.cpu_count(), "tasks": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
