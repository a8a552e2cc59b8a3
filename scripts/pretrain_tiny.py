#!/usr/bin/env python
"""Pretrain the parts of the small model that are pretrained in the full model, and write them for the four stages.

    python scripts/pretrain_tiny.py --corpus data/clipworld --work output/tiny/parts --output output/tiny/pretrained

Each part continues where an earlier run stopped, and is skipped when it is done. The folder --work keeps states, logs
and what was read from the corpus.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="written by make_clipworld.py")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="states and logs of the parts")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the finished parts, in the original layout")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=["vision", "sound", "language", "qformer"],
        default=["vision", "sound", "language", "qformer"],
        help="in this order (all); none only trains the tokenizer",
    )
    parser.add_argument("--scale", choices=["full", "smoke"], default="full", help="smoke: only a few steps, as a test")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    from examples.tiny_world.pretraining.all_parts import SCALES, prepare, pretrain, write_parts
    from video_llama.errors import VideoLlamaError

    try:
        prepare(arguments.work)
        for part in arguments.parts:
            pretrain(part, arguments.corpus, arguments.work, SCALES[arguments.scale])
        if arguments.output is not None:
            write_parts(arguments.work, arguments.output)
            print(f"written to {arguments.output}")
    except (VideoLlamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
