"""Long files cheaply: a few seconds are encoded once and their packets repeated."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from video_llama.processor.media_processor import VideoFrames

FPS, RATE_HZ, WIDTH, HEIGHT = 25, 16_000, 160, 96
BLOCK_FRAMES, BLOCK_PACKETS, AAC_SAMPLES = 88, 55, 1024  # 3.52 seconds of either
BLOCK_SECONDS = BLOCK_FRAMES / FPS
PICTURE_FRAMES = 8  # each picture stays so long


def pictures() -> NDArray[np.uint8]:
    """What the block shows, one after another: (pictures, height, width, 3)."""
    coarse = np.random.default_rng(0).integers(0, 255, (BLOCK_FRAMES // PICTURE_FRAMES, 3, 5, 3), dtype=np.uint8)
    return coarse.repeat(HEIGHT // 3, axis=1).repeat(WIDTH // 5, axis=2)


def make_long_clip(folder: Path, seconds: float) -> tuple[Path, float]:
    """A video with sound of about that length, written once; its path and real length in seconds."""
    blocks = max(1, round(seconds / BLOCK_SECONDS))
    path = folder / f"long_{blocks}.mp4"
    if not path.exists():
        block = folder / "long_block.mp4"
        _encode_block(block)
        scratch = path.with_suffix(".partial.mp4")
        _repeat(block, scratch, blocks)
        scratch.replace(path)
        block.unlink()
    return path, blocks * BLOCK_SECONDS


def shows_what_it_should(frames: VideoFrames) -> bool:
    """Whether each frame is the one its index says."""
    known = pictures()[:, HEIGHT // 6 :: HEIGHT // 3, WIDTH // 10 :: WIDTH // 5].astype(int)  # centres of the squares
    height, width = frames.frames.shape[1:3]
    seen = frames.frames[:, height // 6 :: height // 3, width // 10 :: width // 5][:, :3, :5].astype(int)
    distances = np.abs(seen[:, None] - known[None]).mean(axis=(2, 3, 4))  # (frames, pictures)
    expected = [index % BLOCK_FRAMES // PICTURE_FRAMES for index in frames.indices]
    return distances.argmin(axis=1).tolist() == expected


def _encode_block(path: Path) -> None:
    """A second more than a block, for the sound encoder to get going."""
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": str(BLOCK_FRAMES // 2), "bf": "0", "crf": "30"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        for picture in pictures().repeat(PICTURE_FRAMES, axis=0):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        times = np.arange((BLOCK_PACKETS + 4) * AAC_SAMPLES) / RATE_HZ
        tone = (0.3 * np.sin(2 * np.pi * (200 + 100 * times) * times)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux(sound.encode(frame))
        container.mux([*video.encode(), *sound.encode()])


def _repeat(block: Path, path: Path, blocks: int) -> None:
    packets: dict[str, list[tuple[bytes, bool]]] = {"video": [], "audio": []}
    with av.open(str(block)) as source, av.open(str(path), "w") as target:
        for packet in source.demux():
            if packet.size:
                packets[packet.stream.type].append((bytes(packet), packet.is_keyframe))
        packets["audio"] = packets["audio"][2 : 2 + BLOCK_PACKETS]
        streams = {
            "video": target.add_stream_from_template(source.streams.video[0]),
            "audio": target.add_stream_from_template(source.streams.audio[0]),
        }
        clocks = {"video": Fraction(1, FPS), "audio": Fraction(1, RATE_HZ)}
        steps = {"video": 1, "audio": AAC_SAMPLES}
        counts = {"video": 0, "audio": 0}
        for _ in range(blocks):
            for kind, pieces in packets.items():
                for content, is_keyframe in pieces:
                    packet = av.Packet(content)
                    packet.stream, packet.time_base = streams[kind], clocks[kind]
                    packet.pts = packet.dts = counts[kind] * steps[kind]
                    packet.duration, packet.is_keyframe = steps[kind], is_keyframe
                    counts[kind] += 1
                    target.mux(packet)
