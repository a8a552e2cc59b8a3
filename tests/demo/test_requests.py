"""What comes from outside is checked before it is used: settings, and requests as a whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from video_llama.demo.limits import Limits, answer_options, check_num_frames
from video_llama.demo.server import RequestGuard
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions


def test_settings_are_the_visitors_or_the_defaults() -> None:
    defaults = GenerationOptions(max_new_tokens=7, temperature=0.5)
    chosen = answer_options((None, 0.8, 2.0, ""), Limits(), defaults)
    assert chosen == {"temperature": 0.5, "top_p": 0.8, "num_beams": 2, "max_new_tokens": 7}
    assert isinstance(chosen["num_beams"], int)


@pytest.mark.parametrize("value", [0, 1e-45, 1e-5, 0.009])
def test_a_temperature_so_low_that_it_would_overflow_is_greedy(value: float) -> None:
    warm = GenerationOptions(temperature=0.5)
    assert answer_options((value, None, None, None), Limits(), warm)["temperature"] == 0
    assert answer_options((0.01, None, None, None), Limits(), warm)["temperature"] == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, None, None, None), "Temperature must be at least 0"),
        ((2.5, None, None, None), "Temperature must be at most 2"),
        ((float("nan"), None, None, None), "Temperature must be a number"),
        ((float("inf"), None, None, None), "Temperature must be a number"),
        (([1], None, None, None), "Temperature must be a number"),
        ((True, None, None, None), "Temperature must be a number"),
        ((None, "many", None, None), "Top-p must be a number"),
        ((None, 0, None, None), "Top-p must be above 0"),
        ((None, 1.1, None, None), "Top-p must be at most 1"),
        ((None, None, 50, None), "Beams must be at most 8"),
        ((None, None, "x", None), "Beams must be a whole number"),
        ((None, None, 1.5, None), "Beams must be a whole number"),
        ((None, None, True, None), "Beams must be a whole number"),
        ((None, None, None, 0), "Max new tokens must be at least 1"),
        ((None, None, None, 10**400), "Max new tokens must be at most 1024"),
        ((None, None, None, 10**6), "Max new tokens must be at most 1024"),
        ((None, None, None, float("inf")), "Max new tokens must be a whole number"),
        ((None, None, None, {}), "Max new tokens must be a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_their_names_on_the_page(
    settings: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(VideoLlamaError, match=f"^{message}$"):
        answer_options(settings, Limits(), GenerationOptions())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(0, "must be at least 1"), (33, "must be at most 32"), ("8", "must be a whole number")]
    + [(wrong, "must be a whole number") for wrong in (2.5, float("nan"), True, [8])],
)
def test_frames_lie_within_the_limits(wrong: Any, message: str) -> None:
    assert [check_num_frames(value, Limits()) for value in (None, "", 4.0)] == [None, None, 4]
    with pytest.raises(VideoLlamaError, match=f"^Frames to look at {message}$"):
        check_num_frames(wrong, Limits())


def ask_guard(
    path: str, headers: dict[bytes, bytes], chunks: list[bytes], room: int = 10**9
) -> tuple[list[int], bytes]:
    """What a guard of 1 kB uploads lets through to the app behind it, and the statuses it sends itself."""
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
    asyncio.run(RequestGuard(app, 1000, lambda: room)(scope, receive, send))
    return statuses, received


UPLOAD = "/gradio_api/upload"


def test_a_request_that_says_to_be_too_large_is_refused_unread() -> None:
    assert ask_guard(UPLOAD, {b"content-length": b"1000000000"}, [b"a"]) == ([413], b"")
    assert ask_guard(UPLOAD, {b"content-length": b"-5"}, [b"a"]) == ([413], b"")
    assert ask_guard(UPLOAD, {b"content-length": b"2"}, [b"a", b"b"]) == ([], b"ab")


def test_a_request_that_does_not_say_how_large_it_is_is_refused_unread() -> None:
    for path in (UPLOAD, "/gradio_api/queue/join"):
        assert ask_guard(path, {b"transfer-encoding": b"chunked"}, [b"a"]) == ([411], b"")


def test_only_an_upload_may_be_as_large_as_an_upload() -> None:
    assert ask_guard(UPLOAD, {b"content-length": b"1000900"}, [b"a"]) == ([], b"a")
    assert ask_guard("/gradio_api/queue/join", {b"content-length": b"1000900"}, [b"a"]) == ([413], b"")


def test_uploads_stop_where_there_is_no_more_room() -> None:
    assert ask_guard(UPLOAD, {b"content-length": b"900"}, [b"a"], room=800) == ([507], b"")
    assert ask_guard(UPLOAD, {b"content-length": b"800"}, [bytes(800)], room=800) == ([], bytes(800))
    assert ask_guard("/gradio_api/queue/join", {b"content-length": b"900"}, [b"a"], room=0) == ([], b"a")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.com/a",
        "/gradio_api/file=HTTP://127.0.0.1:22/",
        "/gradio_api//file=http://127.0.0.1/",
        "/gradio_api/deep_link",
        "/gradio_api/dev/reload",
        "/gradio_api/process_recording",
    ],
)
def test_the_server_fetches_nothing_for_others_and_offers_no_more_than_the_page_needs(path: str) -> None:
    assert ask_guard(path, {}, []) == ([403], b"")
