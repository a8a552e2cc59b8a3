"""Draw the clip that `scripts/demo.sh` asks about when it is given no file: a ball crosses the picture and beeps.

python scripts/make_sample_clip.py video_llama/demo/samples/ball.mp4
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FPS, SECONDS, SAMPLE_RATE_HZ = 320, 240, 15, 6, 16_000


def draw_frame(number: int) -> Image.Image:
    """A red ball on grass, moving left to right over the clip."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (150, 200, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 170, WIDTH, HEIGHT), fill=(80, 150, 70))
    x = 20 + (WIDTH - 40) * number / (FPS * SECONDS)
    y = 150 - abs(np.sin(number / 6)) * 60
    draw.ellipse((x - 20, y - 20, x + 20, y + 20), fill=(210, 40, 40))
    return image


def beeps() -> np.ndarray:
    """A short 880 Hz tone every second: (1, samples), int16."""
    time = np.arange(SECONDS * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tone = 0.4 * np.sin(2 * np.pi * 880 * time) * (time % 1.0 < 0.25)
    return (tone * 32767).astype(np.int16)[None]


def write_clip(path: Path) -> None:
    """Encode pictures and beeps as H.264 and AAC in an mp4 file."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "28"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono", bit_rate=32_000)
        for number in range(FPS * SECONDS):
            container.mux(video.encode(av.VideoFrame.from_image(draw_frame(number))))
        container.mux(video.encode())
        sound = beeps()
        for start in range(0, sound.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(sound[:, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE_HZ, start, Fraction(1, SAMPLE_RATE_HZ)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where to write the mp4 file")
    arguments = parser.parse_args()
    write_clip(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
