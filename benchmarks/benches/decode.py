"""Frames of a long clip, against plain decord; with B-frames and without."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from benchmarks.benches.timing import Row, alternate, memory_of
from video_llama.inference.workers import read_ahead
from video_llama.media.decode import decode_video
from video_llama.media.sampling import sample_uniform_indices
from video_llama.processor.clips import ClipReader
from video_llama.processor.media_processor import MediaProcessor

FPS = 30
FRAME_COUNTS = (8, 32)
WORKER_LIMIT = 150.0  # MiB
MAX_DIFFERENCE = 4.0  # mean over pixels of 255; decord's own scaling moved by about one between its versions

OURS = """
import sys
from video_llama.media import pyav_reader
from video_llama.media.decode import decode_video
pyav_reader.num_decoder_threads = lambda: 2  # as beside torch, which is not loaded here for its memory's sake
decode_video(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[3]))
"""
DECORD = """
import sys
from decord import VideoReader
count, side = int(sys.argv[2]), int(sys.argv[3])
reader = VideoReader(sys.argv[1], height=side, width=side)
reader.get_batch([position * len(reader) // count for position in range(count)]).asnumpy()
"""


def make_clip(folder: Path, width: int, height: int, seconds: int, b_frames: int) -> Path:
    """A clip of moving gradients and noise, written once: H.264, a keyframe every 250 frames."""
    path = folder / f"clip_{width}x{height}_{seconds}s_{b_frames}b.mp4"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (height * 2, width * 2, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    options = {"preset": "veryfast", "bf": str(b_frames), "g": "250", "crf": "23"}
    scratch = path.with_suffix(".partial.mp4")
    with av.open(str(scratch), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            frame = noise[number % height : number % height + height, 2 * number % width : 2 * number % width + width]
            gradient = ((rows + columns + 3 * number) % 196).astype(np.uint8)
            picture = frame + gradient[..., None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    scratch.replace(path)
    return path


def run(size: str, repeats: int, folder: Path) -> list[Row]:
    """Compare; the large size is the one that was promised."""
    width, height, seconds, side = (1920, 1080, 60, 224) if size == "full" else (160, 96, 4, 56)
    rows = []
    for b_frames in (3, 0):
        path = make_clip(folder, width, height, seconds, b_frames)
        kind = "with B-frames" if b_frames else "without B-frames"
        for count in FRAME_COUNTS:
            what = f"{count} frames of {seconds} s, {width}x{height}, {kind}"
            rows.append(compare(what, path, count, side, repeats, 1.5 if b_frames else 1.0))
        peaks = [memory_of(code, path, FRAME_COUNTS[-1], side)[1] for code in (OURS, DECORD)]
        what = f"peak memory, {FRAME_COUNTS[-1]} frames, {kind}"
        rows.append(Row("decode", what, peaks[0], peaks[1], "MiB", "decord get_batch", 1.0))
    rows.append(worker_memory(path, side, f"{width}x{height}"))
    return rows


def compare(what: str, path: Path, count: int, side: int, repeats: int, target: float) -> Row:
    """Time ours and decord in turns; the same frames must come out."""
    try:
        from decord import VideoReader
    except ImportError as error:
        raise SystemExit(f"decode is compared with decord, which cannot be imported ({error})") from error
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = decode_video(path, count, side, side)

    def peer() -> None:
        reader = VideoReader(str(path), height=side, width=side)
        results["indices"] = sample_uniform_indices(len(reader), count)
        results["peer"] = reader.get_batch(results["indices"]).asnumpy()

    medians = alternate({"ours": ours, "peer": peer}, repeats)
    difference = np.abs(results["ours"].frames.astype(float) - results["peer"]).mean()
    agrees = bool(difference < MAX_DIFFERENCE) and results["ours"].indices == results["indices"]
    note = (
        f"same indices, frames differ by {difference:.2f} of 255 on average; {medians.processor_ratio('ours', 'peer')}"
    )
    return Row("decode", what, medians["ours"], medians["peer"], "s", "decord get_batch", target, agrees, note)


def worker_memory(path: Path, side: int, picture: str) -> Row:
    """The largest resident memory of a process that decodes ahead, over that of a bare interpreter."""
    bare = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = {child.pid for child in psutil.Process().children()}
    seen, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            workers = (child for child in psutil.Process().children() if child.pid not in before)
            seen.extend(resident_mib(worker) for worker in workers)

    watcher = threading.Thread(target=watch)
    watcher.start()
    num_read = len(list(read_ahead([(n, path) for n in range(4)], ClipReader(MediaProcessor(image_size=side)), 1)))
    done.set()
    watcher.join()
    own = resident_mib(psutil.Process(bare.pid))
    bare.communicate(b"\n")
    what = f"memory of a decoding process over bare Python, {num_read} clips of {picture}, 8 frames"
    return Row("decode", what, max(seen) - own, WORKER_LIMIT, "MiB", "limit", 1.0, None, f"bare Python {own:.0f} MiB")


def resident_mib(process: psutil.Process) -> float:
    """0 for one that has ended."""
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.Error:
        return 0.0
