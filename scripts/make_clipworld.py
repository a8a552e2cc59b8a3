#!/usr/bin/env python
"""Write a generated corpus to train and test on: clips of moving shapes with sounds, images, audio, and dialogues.

    python scripts/make_clipworld.py --out data/clipworld --clips 2000 --seed 1

Each split has the layouts of the datasets in the training configurations, and a ground truth of each file. The same
arguments give the same files. examples/tiny_world/README.md describes the corpus.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama.errors import VideoLlamaError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="number of clips, all splits together")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="of all randomness")
    parser.add_argument("--image-size", type=int, default=128, metavar="PIXELS", help="height and width (128)")
    parser.add_argument(
        "--splits",
        type=float,
        nargs=3,
        default=(90, 5, 5),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="weights of the splits; 0 leaves one out (90 5 5)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        settings = WorldSettings(arguments.clips, arguments.seed, arguments.image_size, tuple(arguments.splits))
        with tqdm(total=settings.num_clips, unit="clip", desc="drawing") as bar:
            make_corpus(arguments.out, settings, arguments.workers, bar.update)
    except VideoLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sizes = ", ".join(f"{name} {size}" for name, size in settings.split_sizes.items())
    print(f"written to {arguments.out}: {sizes} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
