#!/usr/bin/env python
"""Caption clips, some of them broken, while the process is killed again and again; compare with an unbroken run.

    python -m benchmarks.kills --kills 20 --clips 120 --seed 1      # a line of JSON; status 1 if they differ

Each attempt is a fork of this process, so that the imports are paid once. The kills of training are in
tests/training/test_resume.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.clips import make_clip
from tests.fuzz.damages import cut_end, flip_header, zero_run
from video_llama.cli import caption

# For one more line, on a busy machine.
_SECONDS = 60.0

Records = dict[str, tuple[str | None, str | None]]


def make_input(folder: Path, number: int, seed: int) -> None:
    """Write short clips; every third one is broken."""
    folder.mkdir()
    rng = random.Random(seed)
    for index in range(number):
        path = folder / f"{index:04d}.mp4"
        make_clip(path, index, 1, (64, 48))
        if index % 3 == 0:
            path.write_bytes(rng.choice((cut_end, flip_header, zero_run))(path.read_bytes(), rng) or b"x")


def start(folder: Path, output: Path) -> int:
    """Caption what is missing in a child process; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            common = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6", "--batch-size", "2"]
            options = [*common, "--workers", "1", "--resume", "--model", "video-llama-tiny"]
            status = caption.main([str(folder), "--output", str(output), *options])
    finally:
        os._exit(status)


def read(output: Path) -> tuple[Records, int]:
    """Return captions and errors by clip, and how many lines there are."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {line["id"]: (line.get("caption"), line.get("error")) for line in lines}, len(lines)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rng, begun = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        clips, unbroken, killed = Path(name) / "clips", Path(name) / "unbroken.jsonl", Path(name) / "killed.jsonl"
        make_input(clips, options.clips, options.seed)
        os.waitpid(start(clips, unbroken), 0)
        kills, early = 0, False
        while kills < options.kills and not early:
            before, child = size(killed), start(clips, killed)
            # Now and then before the first line, else somewhere behind it.
            until = time.monotonic() + _SECONDS * (rng.random() < 0.7)
            while size(killed) == before and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            early = killed.exists() and killed.read_bytes().count(b"\n") >= options.clips
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        os.waitpid(start(clips, killed), 0)
        (expected, _), (found, num_lines) = read(unbroken), read(killed)
    result = {
        "kills": kills,
        "clips": options.clips,
        "lines": num_lines,
        "errors": sum(error is not None for _, error in expected.values()),
        "missing": len(expected.keys() - found.keys()),
        "doubled": num_lines - len(found),
        "different": sum(found.get(id_) != record for id_, record in expected.items()),
        "seed": options.seed,
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }
    print(json.dumps(result))
    return int(any(result[key] for key in ("missing", "doubled", "different")) or num_lines != options.clips)


if __name__ == "__main__":
    sys.exit(main())
