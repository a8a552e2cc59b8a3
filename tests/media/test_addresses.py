"""Downloads: only of the public internet, only where the user allowed them, within limits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakeVideo
from video_llama.captioning import find_clips
from video_llama.errors import MediaError
from video_llama.inference.workers import read_ahead
from video_llama.media import addresses
from video_llama.media.addresses import DownloadLimits, download, is_public, resolve
from video_llama.processor import load_processor
from video_llama.processor.clips import ClipReader, Window
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

CLOSED = load_processor(image_size=32, n_frms=4)
OPEN = load_processor(image_size=32, n_frms=4, allow_urls=True)

Answer = Callable[[BaseHTTPRequestHandler], object]


@dataclass
class Server:
    """A server of this machine, and the names under which the tests let it be found."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    def __getitem__(self, path: str) -> str:
        return f"http://media.example:{self.port}{path}"


def send(content: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(content)

    return answer


def redirect(target: str) -> Answer:
    return send(b"", 302, Location=target)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Stands in for the public internet: `media.example` is this machine, and 127.0.0.1 counts as public."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            made.answers.get(self.path, send(b"no such thing", 404))(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        made = Server(listening.server_port)

        def found(host: str, port: int) -> list[str]:
            made.resolved.append(host)
            return ["127.0.0.1"] if host == "media.example" else resolve(host, port)

        monkeypatch.setattr(addresses, "resolve", found)
        monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield made
        listening.shutdown()


def fetch(address: str, path: Path, **limits: Any) -> bytes:
    with path.open("wb") as file:
        download(address, file, DownloadLimits(**limits))
    return path.read_bytes()


def test_addresses_are_read_only_where_that_was_allowed(server: Server, make_video: MakeVideo) -> None:
    path = make_video()
    server.answers["/clip.mp4?token=a%2Fb"] = send(path.read_bytes())
    address = server["/clip.mp4?token=a%2Fb"]
    for process in (CLOSED.process_video, CLOSED.process_image, CLOSED.process_audio):
        with pytest.raises(MediaError, match=r"an address, not a file \(add --allow-urls, in Python allow_urls=True"):
            process(address)
    assert not server.asked
    frames, _ = OPEN.process_video(address)
    np.testing.assert_array_equal(frames.frames, CLOSED.process_video(path)[0].frames)
    assert frames.source == address
    assert server.asked == ["/clip.mp4?token=a%2Fb"]


def test_what_is_downloaded_must_be_media_by_its_content(server: Server) -> None:
    server.answers["/clip.mp4"] = send(b"<html>Please log in</html>", Content_Type="video/mp4")
    with pytest.raises(MediaError, match=r"^http://media.example:\d+/clip.mp4: a text"):
        OPEN.process_video(server["/clip.mp4"])


def test_redirections_are_followed_and_checked_like_the_first_address(server: Server, tmp_path: Path) -> None:
    server.answers |= {"/end": send(b"content"), "/1": redirect("2"), "/2": redirect(server["/end"])}
    assert fetch(server["/1"], tmp_path / "x") == b"content"
    assert server.resolved == ["media.example"] * 3
    hostile = {
        "http://10.0.0.1/": "not on the public internet",
        "http://169.254.169.254/latest/meta-data": "not on the public internet",
        "http://[::ffff:127.0.0.1]/": "not on the public internet",
        "//localhost6/": "not (known|on the public)",
        "file:///etc/passwd": "not an address of http or https",
        "ftp://media.example/": "not an address of http or https",
        "http://user:secret@media.example/": "a user's name",
    }
    for target, reason in hostile.items():
        server.answers["/1"] = redirect(target)
        with pytest.raises(MediaError, match=reason) as caught:
            fetch(server["/1"], tmp_path / "x")
        assert "secret" not in str(caught.value)


def test_redirections_come_to_an_end(server: Server, tmp_path: Path) -> None:
    server.answers["/round"] = redirect("/round")
    with pytest.raises(MediaError, match="redirected more than 3 times"):
        fetch(server["/round"], tmp_path / "x", max_redirections=3)
    assert len(server.asked) == 4


# fmt: off
PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fec0::1",
    "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
    "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "localhost",
]
# fmt: on


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_of_the_public_internet_are_told(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::64"])
def test_addresses_of_the_public_internet_are_told(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:7f00:1]"])
def test_no_way_of_writing_this_machine_reaches_it(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        with pytest.raises(MediaError, match=r"not on the public internet|is not known"):
            OPEN.process_video(f"http://{host}:{listening.getsockname()[1]}/clip.mp4")
        with pytest.raises(TimeoutError):
            listening.accept()


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked, and private a moment later."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    connected = []

    def connect(target: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(target)
        raise TimeoutError("timed out")

    monkeypatch.setattr(addresses, "resolve", lambda host, port: next(answers))
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(MediaError, match="cannot be downloaded: timed out"):
        OPEN.process_video("http://rebinding.example:81/clip.mp4")
    assert connected == [("93.184.216.34", 81)]


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "resolve", lambda host, port: ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(MediaError, match=r"the host two.example is not on the public internet"):
        OPEN.process_video("https://two.example/clip.mp4")


def drip(seconds: float, headers: bytes) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" + headers)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                request.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            return

    return answer


@pytest.mark.parametrize("headers", [b"X-Long: ", b"\r\n", b"Content-Length: 1000000\r\n\r\n"])
def test_a_server_that_sends_byte_after_byte_is_given_up(headers: bytes, server: Server, tmp_path: Path) -> None:
    server.answers["/slow"] = drip(5, headers)
    began = time.monotonic()
    with pytest.raises(MediaError, match="the download took longer than 0 seconds"):
        fetch(server["/slow"], tmp_path / "x", total_seconds=0.3)
    assert time.monotonic() - began < 3


def test_a_server_that_says_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers["/silent"] = lambda request: time.sleep(1)
    with pytest.raises(MediaError, match="cannot be downloaded: timed out"):
        fetch(server["/silent"], tmp_path / "x", connect_seconds=0.2)


def test_too_much_is_refused_before_and_while_it_comes(server: Server, tmp_path: Path) -> None:
    server.answers["/large"] = send(b"x" * 5000)
    with pytest.raises(MediaError, match="larger than 0 MB"):
        fetch(server["/large"], tmp_path / "x", max_bytes=1000)
    assert (tmp_path / "x").stat().st_size == 0
    server.answers["/endless"] = drip(5, b"\r\n")
    with pytest.raises(MediaError, match="larger than 0 MB"):
        fetch(server["/endless"], tmp_path / "x", max_bytes=10)
    assert (tmp_path / "x").stat().st_size <= 10


def test_answers_that_are_no_file_are_told(server: Server, tmp_path: Path) -> None:
    expected = {
        "/absent": (send(b"", 404), "the server answers 404 Not Found"),
        "/short": (send(b"half", Content_Length="8"), "the download broke off: 4 of 8 bytes came"),
        "/packed": (send(b"x", Content_Encoding="gzip"), "the server sends it compressed"),
        "/garbage": (lambda request: request.wfile.write(b"\x00\xff" * 40), "cannot be downloaded"),
    }
    for path, (answer, reason) in expected.items():
        server.answers[path] = answer
        with pytest.raises(MediaError, match=reason):
            fetch(server[path], tmp_path / "x")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://", "not an address of http"),
        ("http://media.example:99999/", "not a valid address"),
        ("http://[::1/", "not a valid address"),
        ("http://user:secret@media.example/", "a user's name in it"),
        ("http://media.example/a b.mp4", "white space"),
        ("http://media.example/\r\nX-Injected: 1", "white space|text, not a path"),
        (f"http://{'a' * 70}.example/", "is not known"),
        ("https://nothing.invalid/a.mp4", "is not known"),
    ],
)
def test_addresses_that_make_no_sense_are_told(address: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        OPEN.process_video(address)


def test_a_server_of_https_must_prove_its_name(server: Server) -> None:
    with pytest.raises(MediaError, match=r"cannot be downloaded: .*SSL"):
        OPEN.process_video(server["/clip.mp4"].replace("http:", "https:"))
    assert not server.asked


def test_no_proxy_of_the_environment_is_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.answers["/x"] = send(b"content")
    assert fetch(server["/x"], tmp_path / "x") == b"content"


def test_a_list_may_hold_addresses(server: Server, make_video: MakeVideo, tmp_path: Path) -> None:
    server.answers["/a.mp4?size=1"] = send(make_video().read_bytes())
    listed = tmp_path / "list.txt"
    listed.write_text(f"{server['/a.mp4?size=1']}\n{server['/absent']}\n", encoding="utf-8")
    clips = find_clips([str(listed)])
    assert [clip.id for clip in clips] == [server["/a.mp4?size=1"], server["/absent"]]
    assert find_clips([clips[0].id]) == clips[:1]
    for clip in clips:
        _, [error] = ClipReader(CLOSED)(clip.source)
        assert isinstance(error, MediaError)
        assert "--allow-urls" in str(error)
    assert not server.asked
    reads = list(read_ahead(((number, clip.source) for number, clip in enumerate(clips)), ClipReader(OPEN), 0))
    assert isinstance(reads[0].window, Window)
    assert isinstance(reads[1].window, MediaError)
    assert reads[1].window.path == server["/absent"]


def test_a_checkpoint_cannot_allow_addresses(tiny_checkpoint: Path) -> None:
    saved = VideoLlamaProcessor.from_pretrained(tiny_checkpoint)
    saved.media_processor = replace(saved.media_processor, allow_urls=True)
    assert "allow_urls" not in json.dumps(saved.to_dict(), default=str)
    settings = {**saved.media_processor.to_dict(), "allow_urls": True}
    ids = saved.image_token_id, saved.audio_token_id
    assert not VideoLlamaProcessor(saved.tokenizer, *ids, media_processor=settings).media_processor.allow_urls
