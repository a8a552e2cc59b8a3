"""One cost at one size, in a process of its own: `python -m benchmarks.benches.growth_tasks TASK SIZE …`.

A task prepares, then its work is timed and the memory that it adds is read from the kernel's high-water mark.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.benches.long_clips import make_long_clip, shows_what_it_should

MIB = 2**20
SECONDS_PER_SIZE = 20.0  # no more rounds after so long
CAPTION_TOKENS, CAPTION_FRAMES, TURN_TOKENS = 8, 2, 16
WINDOW_SECONDS = 60.0


@dataclass
class Task:
    """What is measured.

    Args:
        work: is timed; the memory is that of its first run.
        check: whether the result of the last run was right; None if nothing tells.
        size: the real size, where it is not quite the one asked for.
        note: for people.
    """

    work: Callable[[], Any]
    check: Callable[[Any], bool] | None = None
    size: int | None = None
    note: str = ""


class PeakMemory:
    """The memory this process adds from here on, in mebibytes."""

    def __init__(self) -> None:
        self._status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")  # the high-water mark starts again from what is resident now
        self._before = psutil.Process().memory_info().rss

    def added(self) -> float:
        peak = psutil.Process().memory_info().rss
        if self._status.exists():
            line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmHWM"))
            peak = int(line.split()[1]) * 1024
        return max(peak - self._before, 0) / MIB


def frames(size: int, model_size: str, folder: Path) -> Task:
    """Frames in memory through the whole video branch, in the precision of the machine."""
    from benchmarks.benches.encoders import build
    from benchmarks.benches.timing import relative_difference
    from video_llama.utils.devices import resolve_dtype

    model = build(model_size).to(resolve_dtype("auto", "cpu"))
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, size, 3, side, side, generator=torch.Generator().manual_seed(0))
    model.get_video_features(pixels[:, :2])  # whatever the libraries allocate once

    def check(features: torch.Tensor) -> bool:
        if size != 64:  # once is enough
            return True
        model.set_chunk_size(None)
        return relative_difference(features, model.get_video_features(pixels)) < 2e-2

    return Task(lambda: model.get_video_features(pixels), check)


def clips(size: int, model_size: str, folder: Path) -> Task:
    """Captions, as `model.caption` makes them; of a dozen files, again and again."""
    from benchmarks.benches.decode import make_clip
    from benchmarks.benches.language import load

    model = load(model_size, folder, "auto")
    files = [make_clip(folder, 320 + 16 * (number % 4), 180, 2 + number % 3, 3) for number in range(12)]
    paths = [files[number % len(files)] for number in range(size)]
    options: dict[str, Any] = {"num_frames": CAPTION_FRAMES, "max_new_tokens": CAPTION_TOKENS, "batch_size": 8}
    model.caption(paths[:1], **options)
    note = f"{CAPTION_FRAMES} frames, {CAPTION_TOKENS} tokens, batches of 8"
    return Task(lambda: model.caption(paths, **options), lambda texts: len(texts) == size, note=note)


def context(size: int, model_size: str, folder: Path) -> Task:
    """A prompt of random tokens through the language model, with the keys and values that stay."""
    from transformers import DynamicCache

    from benchmarks.benches.language import load

    model = load(model_size, folder, "auto").model
    width = model.config.get_text_config().hidden_size
    embeds = torch.randn(1, size, width, generator=torch.Generator().manual_seed(0)).to(model.dtype) * 0.02

    def read() -> Any:
        return model(inputs_embeds=embeds, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    model(inputs_embeds=embeds[:, :8], logits_to_keep=1)
    return Task(read, lambda output: output.past_key_values.get_seq_length() == size)


def file(size: int, model_size: str, folder: Path) -> Task:
    """Eight frames and eight segments of sound of a file of any length."""
    from video_llama.processor.media_processor import MediaProcessor

    path, seconds = make_long_clip(folder, size)
    processor = MediaProcessor(image_size=224 if model_size == "full" else 56)
    return Task(lambda: processor.process_video(path), lambda read: shows_what_it_should(read[0]), round(seconds))


def windows(size: int, model_size: str, folder: Path) -> Task:
    """All of a long file, window by window, as the captioner reads it; a window is dropped before the next."""
    from video_llama.inference.workers import read_ahead
    from video_llama.processor.clips import ClipReader, Window
    from video_llama.processor.media_processor import MediaProcessor

    path, seconds = make_long_clip(folder, size)
    processor = MediaProcessor(image_size=224 if model_size == "full" else 56)
    reader = ClipReader(processor, window_seconds=WINDOW_SECONDS if model_size == "full" else 2.0)

    def read() -> list[bool]:
        seen = []
        for item in read_ahead([(0, path)], reader, 0):
            window = item.window
            seen.append(isinstance(window, Window) and window.sound == "heard")
        return seen

    return Task(read, lambda seen: len(seen) >= seconds / reader.window_seconds - 1 and all(seen), round(seconds))


def measure_turns(turns: int, model_size: str, folder: Path) -> dict[str, Any]:
    """Time and memory of each turn of one conversation, and whether the last answer is that of a fresh start."""
    from benchmarks.benches.decode import make_clip
    from benchmarks.benches.language import load
    from video_llama.inference.chat import Chat
    from video_llama.inference.generation import GenerationOptions

    model = load(model_size, folder, "float32")  # an answer in less precision may differ when it is recomputed
    options = GenerationOptions(max_new_tokens=TURN_TOKENS, min_new_tokens=TURN_TOKENS)
    chat = Chat(model, options=options)
    chat.upload_video(make_clip(folder, 160, 96, 4, 0))
    seconds, mebibytes = [], []
    for turn in range(turns):
        memory, start = PeakMemory(), time.perf_counter()
        chat.ask(f"What is happening in part {turn}?")
        chat.answer()
        seconds.append(time.perf_counter() - start)
        mebibytes.append(memory.added())
    media = [item for turn in chat.turns for upload in turn.uploads for item in upload.encoded]
    last = chat.turns[-1].answer
    chat.turns[-1].answer = None
    anew = model.complete(model.prepare(chat.conversation(), media), options)
    note = f"a question and an answer of {TURN_TOKENS} tokens each time; the first turn also reads the media"
    return {"seconds": seconds, "mebibytes": mebibytes, "agrees": anew == last, "note": note}


TASKS: dict[str, Callable[[int, str, Path], Task]] = {
    "frames": frames,
    "clips": clips,
    "context": context,
    "file": file,
    "windows": windows,
}


def measure(task: Task, repeats: int) -> dict[str, Any]:
    """Run it: memory of the first run, median time of all."""
    memory, seconds, result = PeakMemory(), [], None
    mebibytes = 0.0
    while len(seconds) < repeats and sum(seconds) < SECONDS_PER_SIZE:
        start = time.perf_counter()
        result = task.work()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            mebibytes = memory.added()
    found: dict[str, Any] = {"seconds": statistics.median(seconds), "mebibytes": mebibytes, "note": task.note}
    found["agrees"] = None if task.check is None else task.check(result)
    return found if task.size is None else {**found, "size": task.size}


@torch.inference_mode()
def measure_cost(name: str, size: int, model_size: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds, mebibytes and whether the results were right, of one task or of all turns of a conversation."""
    if name == "turns":
        return measure_turns(size, model_size, folder)
    return measure(TASKS[name](size, model_size, folder), repeats)


def main(arguments: list[str]) -> int:
    name, size, model_size, repeats, folder, threads = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(measure_cost(name, int(size), model_size, int(repeats), Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
