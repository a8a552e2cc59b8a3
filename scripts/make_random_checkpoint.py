#!/usr/bin/env python
"""Write a checkpoint with random weights, to try things out before the real one is there.

    python scripts/make_random_checkpoint.py --size tiny --layout hf --output output/random-tiny

The same size and seed give the same weights in both layouts. Files are written piece by piece: even `7b` never
needs more memory than its largest file. Its answers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed

from examples.random_checkpoint import SIZES, make_checkpoint
from video_llama.errors import VideoLlamaError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="tiny: 2 MB, small: 1 GB, 7b: 16 GB (tiny)")
    parser.add_argument("--layout", choices=["hf", "original"], default="hf")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="instead of a small one")
    parser.add_argument(
        "--imagebind-vision", action="store_true", help="add the part that trains the audio branch on images"
    )
    arguments = parser.parse_args(argv)
    try:
        make_checkpoint(**vars(arguments))
    except (VideoLlamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
