"""Files at addresses: a server that answers with errors, hangs or breaks off, and a cache of limited size.

The judge is the file on the server's disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason='aiohttp is not installed: pip install "video_llama[remote]"')

from tests.captioning.test_corpus import make_shard
from tests.helpers.checkpoints import load_checkpoint
from tests.helpers.faulty_server import FaultyServer, serve
from video_llama.captioning import CaptionFile, CorpusSettings, caption_corpus, find_clips
from video_llama.data import remote
from video_llama.data.examples import read_media
from video_llama.data.remote import RemoteError, RemoteFile, is_remote
from video_llama.data.shards import find_shards, read_shard
from video_llama.errors import ConfigError, DatasetError
from video_llama.inference.generation import GenerationOptions

MB = 1 << 20


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv("VIDEO_LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDEO_LLAMA_TIMEOUT", "1")
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_FAILED", {})
    remote._find.cache_clear()
    with serve(folder) as started:
        yield started


def put(server: FaultyServer, name: str, size: int = 1000) -> RemoteFile:
    (server.folder / name).write_bytes(os.urandom(size))
    return RemoteFile(f"{server.address}/{name}")


def content(file: RemoteFile) -> bytes:
    with file.open() as path:
        return Path(path).read_bytes()


@pytest.mark.parametrize("faults", [[], ["500", "500"], ["hang"], ["cut"], ["500", "hang", "cut"]])
def test_what_fails_on_the_way_is_tried_again(
    server: FaultyServer, faults: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE_BYTES", 400)
    file = put(server, "a.mp4")
    server.faults["a.mp4"] = [*faults]
    assert content(file) == (server.folder / "a.mp4").read_bytes()
    assert server.requests["a.mp4"] == 3 + len(faults)
    # A second time it is read from the disk.
    assert content(file) == (server.folder / "a.mp4").read_bytes()
    assert server.requests["a.mp4"] == 3 + len(faults)


@pytest.mark.parametrize("fault", ["500", "hang", "cut"])
def test_what_always_fails_is_an_error_and_not_asked_for_again(
    server: FaultyServer, fault: Any, tmp_path: Path
) -> None:
    file = put(server, "a.mp4")
    server.always["a.mp4"] = fault
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"a\.mp4: cannot be fetched, in 4 attempts"):
            content(file)
    assert server.requests["a.mp4"] == 4
    assert [path.suffix for path in (tmp_path / "cache/files").iterdir()] == [".lock"], "no part is left"


def test_a_file_that_is_not_there_is_asked_for_once(server: FaultyServer) -> None:
    with pytest.raises(RemoteError, match="cannot be read"):
        content(RemoteFile(f"{server.address}/absent.mp4"))


def test_a_file_that_was_replaced_is_fetched_anew_by_the_next_process(server: FaultyServer) -> None:
    file = put(server, "a.mp4")
    before = content(file)
    put(server, "a.mp4")
    remote._find.cache_clear()
    assert content(file) == (server.folder / "a.mp4").read_bytes() != before


def test_the_copy_that_was_not_used_for_longest_makes_room(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIDEO_LLAMA_CACHE_GB", str(3.5 * MB / 1e9))
    first, second, third, fourth = [put(server, f"{number}.mp4", MB) for number in range(4)]
    contents = {file: content(file) for file in (first, second, third)}
    with first.open() as held, second.open() as used:
        os.utime(held, (1, 1))
    with first.open():
        os.utime(held, (1, 1))
        os.utime(used, (2, 2))
        content(fourth)
        assert Path(held).exists(), "it is read at this moment"
    assert not Path(used).exists()
    sizes = [path.stat().st_size for path in (tmp_path / "cache/files").iterdir() if path.suffix == ".mp4"]
    assert sizes == [MB] * 3
    assert content(second) == contents[second]


def test_several_readers_fetch_a_file_once(server: FaultyServer) -> None:
    file = put(server, "a.mp4", MB)
    got: list[bytes] = []
    readers = [threading.Thread(target=lambda: got.append(content(file))) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert got == [(server.folder / "a.mp4").read_bytes()] * 6
    assert server.requests["a.mp4"] == 1


def test_another_process_reads_the_copy(server: FaultyServer) -> None:
    file = put(server, "a.mp4")
    content(file)
    code = "import sys; from video_llama.data.remote import RemoteFile\n"
    code += "with RemoteFile(sys.argv[1]).open() as path: print(path)"
    ran = subprocess.run([sys.executable, "-c", code, file.address], capture_output=True, text=True, check=True)
    with file.open() as path:
        assert ran.stdout.strip() == path
    assert server.requests["a.mp4"] == 1


def test_only_addresses_of_stores_and_of_the_web_are_remote() -> None:
    remote_ones = ["s3://b/a", "gs://b/a", "gcs://b/a", "az://b/a", "hf://datasets/x/a", "https://h/a", "HTTP://h/a"]
    assert all(map(is_remote, remote_ones))
    others = [
        "a.mp4",
        "/s3://a",
        "file:///a",
        "pipe:cat a",
        "ftp://h/a",
        "memory://a",
        "s3:a",
        "s3://a::file:///b",
        None,
    ]
    assert not any(map(is_remote, others))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r'gcsfs is not installed: pip install "video_llama\[remote\]"'):
        content(RemoteFile("gs://bucket/a.mp4"))


# Shards


@pytest.fixture
def shards(server: FaultyServer, make_video: Callable[..., Path]) -> list[Path]:
    written = []
    for number in range(2):
        members: dict[str, Path | bytes] = {}
        for clip in range(2):
            members[f"{number}{clip}.mp4"] = make_video(f"{number}{clip}.mp4", num_frames=4 + clip)
            members[f"{number}{clip}.json"] = json.dumps({"caption": f"clip {number}{clip}"}).encode()
        written.append(make_shard(server.folder / f"{number}.tar", members))
    return written


def test_shards_at_addresses_hold_what_local_ones_do(server: FaultyServer, shards: list[Path]) -> None:
    found = find_shards(f"{server.address}/{{0..1}}.tar")
    assert [str(shard) for shard in found] == [f"{server.address}/{number}.tar" for number in range(2)]
    for shard, local in zip(found, shards, strict=True):
        for _ in range(2):
            ours, theirs = list(read_shard(shard, "video", "x")), list(read_shard(local, "video", "x"))
            assert [(example.id, example.text) for example in ours] == [(e.id, e.text) for e in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.source is not None
            assert other.source is not None
            assert one.source.path == str(shard)
            assert not one.source.is_absent
            assert b"".join(read_media(one.source)) == b"".join(read_media(other.source))
    assert server.requests["0.tar"] == 1


def test_commands_as_addresses_are_refused() -> None:
    for storage in ("pipe:cat a.tar", "file:///a.tar", "ftp://h/a.tar"):
        with pytest.raises(DatasetError, match="shards are files, or at addresses"):
            find_shards(storage)


# Captioning


@pytest.mark.slow
def test_captions_of_remote_shards_and_lists_are_those_of_local_files(
    server: FaultyServer, shards: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_checkpoint(tiny_checkpoint)
    settings = CorpusSettings(options=GenerationOptions(max_new_tokens=6), num_workers=1, batch_size=2)
    (server.folder / "list.txt").write_text(f"1.tar\n{server.address}/0.tar\n")
    (server.folder / "bad.tar").write_bytes(b"x")
    server.always["bad.tar"] = "500"
    server.faults["1.tar"] = ["500", "cut"]
    by_inputs = []
    local = [str(path) for path in shards]
    for number, inputs in enumerate([local, [f"{server.address}/list.txt", f"{server.address}/bad.tar"]]):
        output = tmp_path / f"{number}.jsonl"
        with CaptionFile(output) as file:
            assert caption_corpus(model, find_clips(inputs), file, settings) == number
        by_inputs.append({line["id"]: line for line in map(json.loads, output.read_text().splitlines())})
    bad = by_inputs[1].pop(f"{server.address}/bad.tar")
    assert "cannot be fetched, in 4 attempts" in bad["error"]
    here = {name: line["caption"] for name, line in by_inputs[0].items()}
    there = {name: line["caption"] for name, line in by_inputs[1].items()}
    assert {name.replace(server.address, str(server.folder)): text for name, text in there.items()} == here
    assert len(by_inputs[0]) == 4
