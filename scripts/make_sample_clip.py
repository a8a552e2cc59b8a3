"""Draw the examples of the demo page, in the world of the small model; `scripts/demo.sh` asks about the clip, too.

python scripts/make_sample_clip.py video_llama/demo/samples
"""

from __future__ import annotations

import argparse
import sys
from itertools import count
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed

from examples.tiny_world.world.drawing import draw_clip, draw_frame
from examples.tiny_world.world.encoding import encode_jpeg, write_clip, write_sound
from examples.tiny_world.world.samples import Sample, random_sample
from examples.tiny_world.world.sounds import draw_sound, random_sound

# Not a seed of the corpus that the small model is trained on.
SEED = 2_000
IMAGE_SIZE = 256
STARS = {"shape": "star", "colour": "yellow", "count": "two", "motion": "left", "size": "large", "background": "black"}
CROSS = {"shape": "cross", "colour": "red", "count": "one", "size": "large", "background": "white"}


def find_sample(stream: str, wanted: dict[str, str]) -> Sample:
    """Return the first clip or image with these attributes, without a change halfway, a clip with beeps."""
    for index in count():
        sample = random_sample(SEED, "test", stream, index)
        truth = sample.truth("")
        is_wanted = all(truth[name] == value for name, value in wanted.items())
        if is_wanted and truth.get("sound", "beeps") == "beeps" and truth.get("changes") is None:
            return sample
    raise AssertionError("there is no end of numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder where to write stars.mp4, cross.jpg and tone.m4a")
    output = parser.parse_args().output
    clip, image = find_sample("clip", STARS), find_sample("image", CROSS)
    assert clip.scene is not None
    assert clip.sound is not None
    assert image.scene is not None
    frames = draw_clip(clip.scene, clip.num_frames, IMAGE_SIZE)
    write_clip(output / "stars.mp4", frames, clip.fps, draw_sound(clip.sound))
    (output / "cross.jpg").write_bytes(encode_jpeg(draw_frame(image.scene, IMAGE_SIZE)))
    tone = random_sound(np.random.default_rng(SEED), seconds=3.0, kind="rising tone")
    write_sound(output / "tone.m4a", draw_sound(tone))
    print(f"wrote to {output}: {clip.caption}; {image.caption}; {tone.kind}")


if __name__ == "__main__":
    main()
