"""Draw the clip that `scripts/demo.sh` asks about when it is given no file: of the world that the small model knows.

python scripts/make_sample_clip.py video_llama/demo/samples/stars.mp4
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from video_llama.clipworld.drawing import draw_clip
from video_llama.clipworld.encoding import write_clip
from video_llama.clipworld.samples import Sample, random_sample
from video_llama.clipworld.sounds import draw_sound

SEED = 2_000  # no corpus that the small model learns from has it
IMAGE_SIZE = 256
WANTED = {"shape": "star", "colour": "yellow", "count": "two", "motion": "left", "size": "large", "background": "black"}


def find_sample() -> Sample:
    """The first clip in which two large yellow stars move to the left, and something beeps."""
    for index in count():
        sample = random_sample(SEED, "test", "clip", index)
        truth = sample.truth("")
        is_wanted = all(truth[name] == value for name, value in WANTED.items())
        if is_wanted and truth["sound"] == "beeps" and truth["changes"] is None:
            return sample
    raise AssertionError("there is no end of numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where to write the mp4 file")
    arguments = parser.parse_args()
    sample = find_sample()
    assert sample.scene is not None
    assert sample.sound is not None
    write_clip(
        arguments.output, draw_clip(sample.scene, sample.num_frames, IMAGE_SIZE), sample.fps, draw_sound(sample.sound)
    )
    print(f"wrote {arguments.output}: {sample.caption}")


if __name__ == "__main__":
    main()
