#!/usr/bin/env python
"""Let many clients talk to the demo at once: are all answers right, how long do they take, does memory come back?

    python benchmarks/bench_demo.py                          # 16 clients, 3 rounds, the small model of the package
    python benchmarks/bench_demo.py --clients 4 --rounds 1

Each client has a clip of its own, of the generated world that the small model knows, and asks two questions about it,
whose right answers no other client's clip shares. The server is `demo_video.py` in a process of its own, with default
settings; its resident memory is read before the first round and after each, 40 seconds after all clients have left.
The exit status is 1 if an answer is wrong, a call fails, or files are left
behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.tiny_world.known_clips import QUESTIONS, Clip, make_clips  # noqa: E402

_SETTLING_SECONDS = 40.0
_PATIENCE_SECONDS = 120.0  # until the model is loaded, and until what clients left is freed


@dataclass
class Talk:
    """The answers that one client got, and how long its calls took; `error` if one failed."""

    clip: Clip
    answers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Return whether every answer names the correct value, and no other."""
        from examples.tiny_world.evaluation.answers import parse_answer

        return not self.error and all(
            parse_answer(attribute, self.answers[attribute]) == getattr(self.clip, attribute) for attribute in QUESTIONS
        )


def talk(address: str, clip: Clip) -> Talk:
    """Upload a clip and ask both questions, as a client of its own."""
    from gradio_client import Client, handle_file

    result = Talk(clip)

    def timed(name: str, call: Callable[[], str]) -> str:
        start = time.perf_counter()
        answer = call()
        result.seconds[name] = time.perf_counter() - start
        return answer

    client = Client(address, verbose=False, httpx_kwargs={"timeout": _PATIENCE_SECONDS})
    try:
        timed("upload", lambda: client.predict(file=handle_file(clip.path), api_name="/upload"))
        for name, question in QUESTIONS.items():
            result.answers[name] = timed(name, lambda asked=question: client.predict(asked, api_name="/ask"))
    except Exception as error:  # counted and shown, whatever it is
        result.error = f"{type(error).__name__}: {error}"
    finally:
        client.close()
    return result


def talk_at_once(address: str, clips: Sequence[Clip]) -> list[Talk]:
    """Run all clients at the same time, one for each clip."""
    with ThreadPoolExecutor(len(clips)) as pool:
        return list(pool.map(lambda clip: talk(address, clip), clips))


@contextmanager
def run_server(model: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run `demo_video.py` with its files in a folder; yield its address, once the model is loaded, and process id."""
    command = [sys.executable, str(ROOT / "demo_video.py"), "--model", model]
    settings = {"TMPDIR": str(folder), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}) as process:
        try:
            assert process.stdout is not None
            address = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            assert "ready" in process.stdout.readline()
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(_PATIENCE_SECONDS)


@contextmanager
def watched_memory(pid: int) -> Iterator[list[float]]:
    """Record the resident megabytes of a process, ten times a second."""
    import psutil

    found, over, process = [], Event(), psutil.Process(pid)

    def watch() -> None:
        while not over.wait(0.1):
            found.append(process.memory_info().rss / 1e6)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def wait_until_left(folder: Path) -> int:
    """Wait until the server has removed the sessions' folders; return how many are left in the end."""
    patience = time.monotonic() + _PATIENCE_SECONDS
    while (left := len(list(folder.glob("*/sessions/*")))) and time.monotonic() < patience:
        time.sleep(0.2)
    return left


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="at the same time, up to 28 (16)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each with new clients (3)")
    parser.add_argument("--model", default="video-llama-tiny", help="which model answers (video-llama-tiny)")
    arguments = parser.parse_args(argv)
    import psutil

    is_fine = True
    with tempfile.TemporaryDirectory() as work:
        files = Path(work) / "server"
        files.mkdir()
        clips = make_clips(Path(work), arguments.clients)
        with run_server(arguments.model, files) as (address, pid):
            print(f"memory before: {psutil.Process(pid).memory_info().rss / 1e6:.0f} MB")
            for number in range(1, arguments.rounds + 1):
                start = time.perf_counter()
                with watched_memory(pid) as memory:
                    talks = talk_at_once(address, clips)
                    seconds = time.perf_counter() - start
                    left = wait_until_left(files)
                    time.sleep(_SETTLING_SECONDS)
                is_fine &= report(number, talks, seconds, memory, left)
        left_files = [path for path in files.rglob("*") if "video-llama-demo" in str(path)]
        print(f"files left after the end: {len(left_files)}")
    return 0 if is_fine and not left_files else 1


def report(number: int, talks: Sequence[Talk], seconds: float, memory: Sequence[float], left: int) -> bool:
    """Print the figures of one round; return whether all answers are correct and no session is left."""
    failed = [one for one in talks if one.error]
    wrong = [one for one in talks if not one.is_right and not one.error]
    waits = [one.seconds[name] for one in talks for name in QUESTIONS if name in one.seconds]
    print(
        f"round {number}: {len(talks)} clients, {len(talks) - len(failed) - len(wrong)} all right, {len(wrong)} wrong, "
        f"{len(failed)} failed; {seconds:.1f} s, {len(waits) / seconds:.1f} answers/s, "
        f"an answer after {statistics.median(waits or [0]):.2f} s (median) to {max(waits or [0]):.2f} s; "
        f"memory up to {max(memory):.0f} MB, then {memory[-1]:.0f} MB; {left} sessions left"
    )
    for one in [*failed, *wrong]:
        print(f"  {one.clip.path.name} ({one.clip.colour}, {one.clip.sound}): {one.error or one.answers}")
    return not failed and not wrong and not left


if __name__ == "__main__":
    sys.exit(main())
