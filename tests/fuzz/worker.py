"""A process that reads broken inputs, one after the other: `python -m tests.fuzz.worker`.

It takes a case in JSON on each line of its input, and answers with a line for each: what came of it. Whoever started
it sees crashes, hangs and memory from outside.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from tests.fuzz.campaign import MEMORY_BYTES
from tests.fuzz.cases import Case
from video_llama.checkpoints.weight_files import open_weights
from video_llama.config import load_config
from video_llama.data.datasets import build_examples
from video_llama.demo.limits import Limits
from video_llama.errors import ConfigError, VideoLlamaError
from video_llama.inference.load import load_pretrained_model
from video_llama.processor.builders import load_processor
from video_llama.processor.clips import ClipReader, Window
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.schema import BuildInfo, DatasetConfig

# Beyond what the process has when it begins: more than a failure needs, less than would hurt the machine.
LIMIT_BYTES = 2 * MEMORY_BYTES
_MAX_MESSAGE = 2000
_YEAR_SECONDS = 366 * 86_400

Read = Callable[[], Any]


def media_ways(path: Path, media: MediaProcessor) -> dict[str, Read]:
    """Return the ways in which the package reads a file."""
    return {
        "check_file": lambda: Limits().check_file(path),
        "process_video": lambda: media.process_video(path, num_frames=4),
        "process_audio": lambda: media.process_audio(path),
        "process_image": lambda: media.process_image(path),
        "clip": lambda: ClipReader(media)(path),
        "windows": lambda: ClipReader(media, window_seconds=0.5)(path),
    }


def annotation_ways(path: Path) -> dict[str, Read]:
    """Return the datasets that could have such a file, each read to its end."""
    names = ["messages", "table", "webvid_instruct", "llava_instruct"]
    if path.suffix in (".csv", ".tsv"):
        names = ["table", "webvid"]
    ways: dict[str, Read] = {}
    for name in names:
        info = BuildInfo(anno_dir=str(path), videos_dir=str(path.parent))
        config = DatasetConfig(data_type="video", build_info=info)
        ways[name] = lambda name=name, config=config: [row.id for row in build_examples(name, config)]
    return ways


def misbehave(how: str) -> None:
    """Fail as files might make the process fail, so that the campaign can be tested."""
    if how == "raise":
        raise KeyError(how)
    if how == "wait":
        time.sleep(3600)
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "grow":
        torch.ones(MEMORY_BYTES // 3)


def other_ways(case: Case) -> dict[str, Read]:
    """Return the ways of reading what is no media file."""
    path = Path(case.path)
    if case.kind == "self-test":
        return {"misbehave": lambda: misbehave(case.damage)}
    if case.kind == "config":
        return {"load_config": lambda: load_config(path)}
    if case.kind == "annotations":
        return annotation_ways(path)
    if path.is_dir():
        return {"load": lambda: load_pretrained_model(path, device="cpu", half=False, verbose=False) and None}
    return {"open_weights": lambda: [values.shape for values in open_weights(path).values()]}


def check_answer(answer: Any) -> None:
    """Refuse numbers that are not finite, times that no recording has, and errors of others among the answers."""
    if isinstance(answer, (list, tuple)):
        for part in answer:
            check_answer(part)
    elif isinstance(answer, BaseException):
        assert isinstance(answer, VideoLlamaError), f"{type(answer).__name__} among the answers"
    elif isinstance(answer, Window):
        check_answer([answer.frames, answer.audio])
    elif isinstance(answer, VideoFrames):
        times = answer.times_seconds or [0.0]
        assert 0 <= min(times) <= max(times) < _YEAR_SECONDS, f"times {times[:4]}"
        check_answer(answer.pixel_values)
    elif isinstance(answer, AudioSegments):
        check_answer(answer.values)
    elif isinstance(answer, torch.Tensor):
        assert bool(answer.isfinite().all()), "values that are not finite"


def run(name: str, read: Read) -> dict[str, str]:
    """Read in one way; the outcome is "answer", "refusal" or "foreign"."""
    try:
        check_answer(read())
    except VideoLlamaError as error:
        message = str(error)
        # All mistakes of a configuration are listed at once.
        is_long = len(message) > _MAX_MESSAGE or "\n" in message
        if "Traceback" in message or (is_long and not isinstance(error, ConfigError)):
            return {"way": name, "outcome": "foreign", "detail": f"not a message of one line: {message[:500]}"}
        return {"way": name, "outcome": "refusal", "detail": message}
    except BaseException:
        return {"way": name, "outcome": "foreign", "detail": traceback.format_exc()}
    return {"way": name, "outcome": "answer", "detail": ""}


def peak_bytes() -> int:
    # Not ru_maxrss: Linux counts into it what the parent had, here all that the tests before this one took.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def send(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def main() -> None:
    """Answer until there are no more cases."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What decoders print must not get among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    media = load_processor(image_size=32)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    send(answers, {"peak": peak_bytes()})
    for line in sys.stdin:
        case = Case(**json.loads(line))
        ways = other_ways(case)
        if case.kind == "media":
            ways = media_ways(Path(case.path), media)
        results = [run(name, read) for name, read in ways.items()]
        if (Path(case.path).parent / "RAN").exists() or (Path(case.path) / "RAN").exists():
            results.append({"way": "all", "outcome": "foreign", "detail": "code in the file was run"})
        send(answers, {"results": results, "peak": peak_bytes()})


if __name__ == "__main__":
    main()
