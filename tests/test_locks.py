"""Two processes and one output; an output that vanishes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from video_llama.captioning import CaptionFile
from video_llama.errors import ConfigError
from video_llama.utils.locks import OutputLock

HOLDER = """
import sys
from pathlib import Path
from video_llama.utils.locks import OutputLock
lock = OutputLock(Path(sys.argv[1]), Path("captions"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds `tmp_path/.c.jsonl.lock`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".c.jsonl.lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_first_ones_name(other: subprocess.Popen[bytes], tmp_path: Path) -> None:
    for resume in (True, False):
        with pytest.raises(ConfigError, match=f"process {other.pid} on {socket.gethostname()}, since .*writes to it"):
            CaptionFile(tmp_path / "c.jsonl", resume=resume)
    assert not (tmp_path / "c.jsonl").exists()


def test_the_lock_of_a_killed_process_binds_nobody(other: subprocess.Popen[bytes], tmp_path: Path) -> None:
    other.kill()
    other.wait()
    assert (tmp_path / ".c.jsonl.lock").exists()
    with CaptionFile(tmp_path / "c.jsonl") as file:
        file.write({"id": "a", "caption": "b"})
    assert not (tmp_path / ".c.jsonl.lock").exists()


def test_parts_of_one_run_do_not_lock_each_other(other: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with CaptionFile(tmp_path / "c.jsonl", num_shards=2, shard_id=1) as file:
        file.write({"id": "a", "caption": "b"})


@pytest.mark.parametrize("loss", ["file", "cut", "folder"])
def test_captions_that_vanish_are_an_error(tmp_path: Path, loss: str) -> None:
    folder = tmp_path / "out"
    file = CaptionFile(folder / "c.jsonl")
    file.write({"id": "a", "caption": "b"})
    if loss == "folder":
        shutil.rmtree(folder)
    elif loss == "cut":
        (folder / "c.jsonl").write_text("")
    else:
        (folder / "c.jsonl").unlink()
    with pytest.raises(ConfigError, match="removed"):
        file.write({"id": "c", "caption": "d"})
    with pytest.raises(ConfigError, match="removed"):
        file.close()


def test_an_error_within_is_not_hidden(tmp_path: Path) -> None:
    def fail() -> None:
        with CaptionFile(tmp_path / "c.jsonl"):
            (tmp_path / "c.jsonl").unlink()
            raise KeyError("its own")

    with pytest.raises(KeyError):
        fail()


def test_releasing_leaves_the_lock_of_another_alone(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "lock", tmp_path)
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("another's")
    lock.release()
    lock.release()
    assert (tmp_path / "lock").read_text() == "another's"
