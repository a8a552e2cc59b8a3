"""Uploads in the server's folder: which are read, and when they go."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from video_llama.demo.sessions import Uploads, stored_bytes
from video_llama.errors import VideoLlamaError


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "uploads")


def store(uploads: Uploads, name: str = "ab/clip.mp4", age: float = 0) -> Path:
    path = uploads.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_bytes(b"content")
    path.with_suffix(".part").rename(path)  # as the server does: the same file sent twice is a new one
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_an_upload_is_found_with_its_owners_name(uploads: Uploads) -> None:
    path = store(uploads)
    data = {"path": str(path), "orig_name": "../../my clip.mp4"}
    assert uploads.find(data) == (path, "my clip.mp4")
    assert uploads.find([data])[1] == "my clip.mp4"
    assert uploads.find({"path": str(path)})[1] == "clip.mp4"


@pytest.mark.parametrize(
    "data",
    [
        {"path": "/etc/passwd"},
        {"path": "{folder}/../outside.mp4"},
        {"path": "{folder}/link"},
        {"path": "{folder}/circle"},
        {"path": "{folder}/absent.mp4"},
        {"path": "{folder}"},
        {"path": "{folder}/" + 5000 * "a"},
        {"path": "{folder}/\0"},
        {"path": ["a"]},
        {"url": "https://example.com/a.mp4"},
        "clip.mp4",
        None,
        [],
    ],
    ids=lambda data: str(data)[:40],
)
def test_nothing_but_uploads_is_read(data: Any, uploads: Uploads, tmp_path: Path) -> None:
    store(uploads)
    (tmp_path / "outside.mp4").write_bytes(b"secret")
    (uploads.folder / "link").symlink_to(tmp_path / "outside.mp4")
    (uploads.folder / "circle").symlink_to(uploads.folder / "circle")
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        data = {"path": data["path"].replace("{folder}", str(uploads.folder))}
    with pytest.raises(VideoLlamaError, match="upload"):
        uploads.find(data)


def test_what_was_taken_goes_soon_and_what_waits_for_its_turn_later(uploads: Uploads) -> None:
    taken, waiting = store(uploads), store(uploads, "cd/clip.mp4")
    uploads.find({"path": str(taken)})
    now = time.time()
    uploads.sweep(now + 50)
    assert taken.exists()
    uploads.sweep(now + 70)
    assert (taken.parent.exists(), waiting.exists()) == (False, True)
    uploads.sweep(now + 2000)
    assert list(uploads.folder.iterdir()) == []


def test_a_file_that_is_sent_again_waits_for_its_own_turn(uploads: Uploads) -> None:
    path = store(uploads)
    uploads.find({"path": str(path)})
    kept = path.with_name("session's copy")
    os.link(path, kept)  # so that the new file cannot get the old one's inode
    store(uploads)
    uploads.sweep(time.time() + 70)
    assert path.exists()


def test_a_file_under_two_names_takes_its_room_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "clip").write_bytes(bytes(1000))
    os.link(tmp_path / "a" / "clip", tmp_path / "same")
    (tmp_path / "other").write_bytes(bytes(10))
    assert stored_bytes(tmp_path) == 1010
