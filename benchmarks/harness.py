"""Measure on one device: sections with a time limit each, whose figures are written down as soon as they are there."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

__all__ = ["FULL", "REHEARSAL", "Bench", "Figures", "OutOfTime", "Sizes"]

Figures = dict[str, Any]
"""What a section found: numbers and words by name, or rows of a table, {row: {column: value}}."""

_PACKAGES = ("torch", "transformers", "accelerate", "timm", "torchaudio", "av", "peft", "numpy")
_ALARM_AGAIN_SECONDS = 5.0


class OutOfTime(BaseException):
    """A section's time is up. No `Exception`, so that nothing on the way takes it for a failure of its own."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        model: one of `scripts.make_random_checkpoint.SIZES`.
        frames: numbers of frames to encode.
        batches: prompts to continue at a time.
        caption_batches: clips to caption at a time.
        num_clips: in memory; half as many files.
        file_seconds: of each file.
        prompt_tokens, new_tokens, few_tokens: of a generation; the step is taken from the difference of the last two.
        workers: processes that decode ahead.
        stages: (batch size, tokens of a sample, of which are learned from) of each stage of training.
        threads, thread_tokens: visitors at the same time, and what each asks for.
        matmul_side: of the square product that stands for what the device can do.
        copy_bytes: of the copy that stands for its memory.
    """

    model: str = "7b"
    frames: tuple[int, ...] = (1, 8, 64, 256)
    batches: tuple[int, ...] = (1, 32, 64)
    caption_batches: tuple[int, ...] = (128,)
    peer_batches: tuple[int, ...] = (32, 64)
    num_clips: int = 128
    file_seconds: int = 10
    file_size: tuple[int, int] = (640, 360)
    prompt_tokens: int = 150
    new_tokens: int = 64
    few_tokens: int = 8
    workers: tuple[int, ...] = (14,)
    stages: tuple[tuple[str, int, int, int], ...] = (("stage 1", 32, 66, 20), ("stage 2", 4, 330, 130))
    threads: int = 8
    thread_tokens: int = 32
    matmul_side: int = 8192
    copy_bytes: int = 4 * 2**30


FULL = Sizes()
REHEARSAL = Sizes(
    model="tiny",
    frames=(1, 2),
    batches=(1, 2),
    caption_batches=(2,),
    peer_batches=(2,),
    num_clips=4,
    file_seconds=1,
    file_size=(64, 48),
    prompt_tokens=12,
    new_tokens=6,
    few_tokens=2,
    workers=(1,),
    stages=(("stage 1", 2, 40, 5), ("stage 2", 1, 60, 20)),
    threads=2,
    thread_tokens=3,
    matmul_side=64,
    copy_bytes=2**20,
)


@dataclass
class Bench:
    """One device, what is measured on it, and where the figures go.

    Args:
        device: cuda, or cpu for a rehearsal.
        sizes: how much is measured.
        output: folder of `gpu.jsonl`.
        is_rehearsal: the figures mean nothing.
    """

    device: torch.device
    sizes: Sizes
    output: Path
    is_rehearsal: bool = False
    lines: list[Figures] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def card(self) -> str:
        """The device by its name."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU ({platform.machine()})"

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of Python and of what computes."""
        found = {"python": platform.python_version()}
        for name in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy on the device."""
        source = torch.randn(self.sizes.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source), repeats=10)

    @cached_property
    def matmul_rate(self) -> float:
        """Operations per second of a large square bfloat16 product of random numbers."""
        side = self.sizes.matmul_side
        left, right = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        return 2.0 * side**3 / self.seconds(lambda: left @ right, repeats=10)

    @cached_property
    def model(self) -> Any:
        """A Video-LLaMA with random weights on the device."""
        from benchmarks.making import make_model

        return make_model(self.sizes.model, self.device)

    @cached_property
    def peer(self) -> Any:
        """transformers' InstructBLIP for videos with the same sizes and the same language model."""
        from benchmarks.making import make_peer

        return make_peer(self.model, self.device)

    def forget(self) -> None:
        """Let go of the peer, and of what the wrapper of the model keeps for the next answer."""
        from video_llama.inference.engine import VideoLlama

        self.__dict__.pop("peer", None)
        self.__dict__["model"] = VideoLlama(self.model.model, self.model.processor)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def once(self, task: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.synchronize()
        start = time.perf_counter()
        task()
        self.synchronize()
        return time.perf_counter() - start

    def seconds(self, task: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> float:
        """Median seconds of some calls, after some that are not counted; a rehearsal makes one call."""
        if self.is_rehearsal:
            return self.once(task)
        for _ in range(warmup):
            task()
        return statistics.median(self.once(task) for _ in range(repeats))

    def allocated(self) -> int:
        """Bytes of tensors on the device, after what nobody uses any more was let go of."""
        gc.collect()
        if not self.on_gpu:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def peak(self, task: Callable[[], Any]) -> int:
        """The most bytes that tensors took on the device during a call; 0 on a CPU."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        task()
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0

    def kernels(self, task: Callable[[], Any], top: int = 12) -> Figures:
        """Where the time of one call goes: the kernels (on a CPU the operators) that take most of it."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.on_gpu else [])
        task()
        with profile(activities=activities) as profiler:
            wall = self.once(task)
        wanted = torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU
        name = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events = [event for event in profiler.key_averages() if event.device_type == wanted]
        events = [event for event in events if not event.is_user_annotation]  # spans over what is counted already
        events.sort(key=lambda event: getattr(event, name), reverse=True)
        total = sum(getattr(event, name) for event in events)
        rows = {
            event.key[:100]: {
                "ms": round(getattr(event, name) / 1e3, 3),
                "calls": event.count,
                "share": round(getattr(event, name) / max(total, 1e-9), 3),
            }
            for event in events[:top]
        }
        launched = sum(event.count for event in events)
        return {"wall_ms": wall * 1e3, "device_ms": total / 1e3, "launched": launched, "top": rows}

    def run(self, name: str, section: Callable[[Bench, Figures], None], budget: float) -> Figures:
        """Run a section and write down what it found, also if it fails or its time is up.

        Args:
            name: of the section.
            section: puts its figures into the given dict as they come.
            budget: seconds.
        """
        figures: Figures = {}
        line: Figures = {"section": name, "status": "ok", "rehearsal": self.is_rehearsal, "figures": figures}
        line |= {"card": self.card, "versions": self.versions}
        start = time.perf_counter()
        try:
            with _time_limit(budget):
                section(self, figures)
        except OutOfTime:
            line["status"] = f"out of time after {budget:.0f} s; what is there was measured before"
        except Exception as error:
            line["status"] = f"failed: {type(error).__name__}: {str(error)[:500]}"
            line["traceback"] = traceback.format_exc()[-4000:]
        line["seconds"] = round(time.perf_counter() - start, 2)
        with contextlib.suppress(RuntimeError):  # of a device that a section left unusable
            self.allocated()
        self.lines.append(line)
        with (self.output / "gpu.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, default=str) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        print(f"[{line['seconds']:7.1f} s] {name}: {line['status']}", flush=True)
        return line


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread when the time is up, and again should something have swallowed it."""

    def end(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def nvidia_smi() -> str:
    """Name and driver as nvidia-smi tells them; why not, if it does not."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer: {error}"


def cpu_name() -> str:
    """The processor as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
