"""What comes from outside is checked before it is used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from video_llama.demo.limits import Limits
from video_llama.demo.requests import RequestGuard, answer_options, num_frames, uploaded_file
from video_llama.errors import VideoLlamaError
from video_llama.model.generation import GenerationOptions


def test_an_upload_is_found_with_its_owners_name(tmp_path: Path) -> None:
    data = {"path": str(tmp_path / "ab" / "clip.mp4"), "orig_name": "../../my clip.mp4"}
    assert uploaded_file(data, tmp_path) == (tmp_path / "ab" / "clip.mp4", "my clip.mp4")
    assert uploaded_file([data], tmp_path)[1] == "my clip.mp4"


@pytest.mark.parametrize(
    "data",
    [
        {"path": "/etc/passwd"},
        {"path": "{folder}/../outside.mp4"},
        {"path": "{folder}/link"},
        {"path": ["a"]},
        {"url": "https://example.com/a.mp4"},
        "clip.mp4",
        None,
        [],
    ],
    ids=str,
)
def test_nothing_but_uploads_is_read(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (tmp_path / "outside.mp4").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "outside.mp4")
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        data = {"path": data["path"].format(folder=folder)}
    with pytest.raises(VideoLlamaError, match="uploaded"):
        uploaded_file(data, folder)


def test_settings_are_the_visitors_or_the_defaults() -> None:
    defaults = GenerationOptions(max_new_tokens=7, temperature=0.5)
    chosen = answer_options((None, 0.8, "2", None), Limits(), defaults)
    assert chosen == {"temperature": 0.5, "top_p": 0.8, "num_beams": 2, "max_new_tokens": 7}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, None, None, None), "temperature must not be negative"),
        ((None, None, None, 10**6), "max_new_tokens may be at most 1024"),
        ((None, None, 50, None), "num_beams may be at most 8"),
        ((None, "many", None, None), "could not convert"),
        (([], None, None, None), "must be a string or a real number"),
        ((None, None, None, float("inf")), "infinity"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(VideoLlamaError, match=message):
        answer_options(settings, Limits(), GenerationOptions())


def test_frames_lie_within_the_limits() -> None:
    assert (num_frames(None, Limits()), num_frames(4.0, Limits())) == (None, 4)
    for wrong in (0, 33, "8", float("nan"), True):
        with pytest.raises(VideoLlamaError, match="frames must lie from 1 to 32"):
            num_frames(wrong, Limits())


def ask_guard(path: str, headers: dict[bytes, bytes], chunks: list[bytes]) -> tuple[list[int], bytes]:
    """What a guard of 1 kB lets through to the app behind it, and the statuses it sends itself."""
    statuses: list[int] = []
    received = b""
    messages = iter([{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal received
        while (message := await receive())["type"] == "http.request":
            received += message["body"]

    scope = {"type": "http", "path": path, "headers": list(headers.items())}
    asyncio.run(RequestGuard(app, 1000)(scope, receive, send))
    return statuses, received


def test_a_request_that_says_to_be_too_large_is_refused_unread() -> None:
    assert ask_guard("/upload", {b"content-length": b"1000000000"}, [b"a"]) == ([413], b"")
    assert ask_guard("/upload", {b"content-length": b"-5"}, [b"a"]) == ([413], b"")
    assert ask_guard("/upload", {b"content-length": b"2"}, [b"a", b"b"]) == ([], b"ab")


def test_a_request_that_does_not_say_how_large_it_is_is_cut_off() -> None:
    _, received = ask_guard("/upload", {}, [bytes(400_000)] * 9)
    assert len(received) == 800_000


@pytest.mark.parametrize("address", ["https://example.com/a", "HTTP://127.0.0.1:22/"])
def test_the_server_fetches_nothing_for_others(address: str) -> None:
    assert ask_guard(f"/gradio_api/file={address}", {}, []) == ([403], b"")
