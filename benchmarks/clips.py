"""Make clips to caption: `python -m benchmarks.clips FOLDER FIRST STOP SECONDS WIDTH HEIGHT`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

FPS = 25


def make_clip(path: Path, number: int, seconds: int, size: tuple[int, int]) -> None:
    """An H.264 clip of coloured waves that move, other ones for each number; without sound."""
    import av

    width, height = size
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    speeds = np.random.default_rng(number).uniform(0.02, 0.2, (3, 3)).astype(np.float32)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(seconds * FPS):
            waves = []
            for down, right, later in speeds:
                row, column = rows * down + index * later, columns * right
                waves.append(128 + 120 * (np.sin(row) * np.cos(column) + np.cos(row) * np.sin(column)))
            frame = av.VideoFrame.from_ndarray(np.stack(waves, axis=-1).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_clips(folder: Path, number: int, seconds: int, size: tuple[int, int], num_processes: int) -> list[Path]:
    """That many clips, made by several processes.

    Raises:
        RuntimeError: one of them failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-number // num_processes)
    how = [str(seconds), *map(str, size)]
    commands = [
        [sys.executable, "-m", "benchmarks.clips", str(folder), str(first), str(min(first + each, number)), *how]
        for first in range(0, number, each)
    ]
    root = Path(__file__).parents[1]
    processes = [subprocess.Popen(command, cwd=root) for command in commands]
    try:
        if any(process.wait() != 0 for process in processes):
            raise RuntimeError("clips could not be made")
    finally:
        for process in processes:
            process.kill()
    return [folder / f"{index:03d}.mp4" for index in range(number)]


if __name__ == "__main__":
    target, first, stop, seconds, width, height = sys.argv[1:]
    for index in range(int(first), int(stop)):
        make_clip(Path(target) / f"{index:03d}.mp4", index, int(seconds), (int(width), int(height)))
