"""What people with bad intentions send to the server: refused, and the next visitor is served as before."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.conftest import join_videos
from tests.demo.conftest import join_queue
from video_llama.demo import connections

pytestmark = pytest.mark.slow

GIGABYTE = 10**9
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture
def client(server: SimpleNamespace) -> Iterator[Client]:
    client = Client(server.address, verbose=False, httpx_kwargs={"timeout": 120})
    yield client
    server.sessions.end(client.session_hash)
    client.close()


@pytest.fixture(scope="module")
def neighbour(server: SimpleNamespace) -> Iterator[Client]:
    """Somebody who uses the server as it is meant."""
    client = Client(server.address, verbose=False, httpx_kwargs={"timeout": 120})
    yield client
    server.sessions.end(client.session_hash)
    client.close()


@pytest.fixture(autouse=True)
def _still_usable(neighbour: Client, image: Path) -> Iterator[None]:
    """After each attack others are served as before."""
    yield
    assert neighbour.predict(file=handle_file(image), api_name="/upload")["kind"] == "image"
    assert isinstance(neighbour.predict("What is it?", api_name="/ask"), str)
    assert neighbour.predict(api_name="/clear") is True


def parts(*bodies: bytes, name: str = "a.mp4") -> Iterator[bytes]:
    """A form with one file, its content in pieces."""
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % name.encode()
    yield from bodies
    yield b"\r\n--x--\r\n"


def stored(server: SimpleNamespace) -> set[Path]:
    return {path for path in server.sessions.uploads.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/uploads/../secret.mp4", "https://example.com/a.mp4"])
def test_a_path_that_was_not_uploaded_is_never_opened(path: str, server: SimpleNamespace) -> None:
    (server.folder / "secret.mp4").write_bytes(b"#!secret")
    file = {"path": path.format(folder=server.folder), "meta": {"_type": "gradio.FileData"}}
    events = join_queue(server, "upload", [file, None, True], f"stranger at {path}")
    assert '"success":false' in events.replace(" ", "")
    assert "text file" not in events
    assert "secret" not in events.replace(file["path"], "")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{folder}/sessions/../../../etc/passwd",
        "{folder}/sessions/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "{folder}/sessions/link",
        "{here}",
        "demo_video.py",
        "https://example.com/",
        "//etc/passwd",
        "file:///etc/passwd",
    ],
)
def test_only_files_of_sessions_are_served(path: str, server: SimpleNamespace) -> None:
    link = server.sessions.folder / "link"
    link.symlink_to("/etc/passwd")
    try:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            address = server.address + route + path.format(folder=server.folder, here=__file__)
            answer = httpx.get(address, follow_redirects=True)
            assert answer.status_code >= 400
            assert "root:" not in answer.text
    finally:
        link.unlink()


@pytest.mark.parametrize("name", ["../../../../escaped.mp4", "/tmp/escaped.mp4", "..", "a\\..\\..\\escaped.mp4"])
def test_an_upload_cannot_choose_where_it_is_stored(name: str, server: SimpleNamespace) -> None:
    answer = httpx.post(f"{server.address}gradio_api/upload", content=b"".join(parts(b"abc", name=name)), headers=FORM)
    places = [Path(path) for path in answer.json()] if answer.status_code == 200 else []
    assert all(place.resolve().is_relative_to(server.sessions.uploads.folder.resolve()) for place in places)
    assert not list(Path("/tmp").glob("escaped*"))
    assert not list(server.folder.parent.glob("escaped*"))


def test_an_upload_of_a_gigabyte_is_refused_before_it_is_sent(server: SimpleNamespace) -> None:
    address, before = httpx.URL(server.address), stored(server)
    with contextlib.closing(HTTPConnection(address.host, address.port, timeout=60)) as sender:
        sender.putrequest("POST", "/gradio_api/upload")
        for name, value in {**FORM, "content-length": str(GIGABYTE)}.items():
            sender.putheader(name, value)
        sender.endheaders(b"a")
        assert sender.getresponse().status == 413
    assert stored(server) == before


def test_a_gigabyte_that_does_not_say_so_is_cut_off_early(server: SimpleNamespace) -> None:
    sent = 0

    def stream() -> Iterator[bytes]:
        nonlocal sent
        for part in parts(*([bytes(100_000)] * (GIGABYTE // 100_000))):
            sent += len(part)
            yield part

    with contextlib.suppress(httpx.TransportError):  # hung up upon
        answer = httpx.post(f"{server.address}gradio_api/upload", content=stream(), headers=FORM, timeout=120)
        assert answer.status_code == 411
    assert sent < GIGABYTE / 2
    assert all(path.stat().st_size <= server.demo.limits.upload_bytes for path in stored(server))


def test_many_uploads_cannot_fill_the_disk(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = server.sessions.uploads.folder / "filler"
    filler.parent.mkdir(exist_ok=True)
    with filler.open("wb") as file:
        file.truncate(server.demo.limits.stored_bytes)  # takes no room, but says so
    try:
        body = b"".join(parts(bytes(1000)))
        assert httpx.post(f"{server.address}gradio_api/upload", content=body, headers=FORM).status_code == 507
    finally:
        filler.unlink()


def test_a_form_without_an_end_and_one_with_endless_headers_are_refused(server: SimpleNamespace) -> None:
    before = {path.parent for path in stored(server)}
    for body in (b"--x\r\n" + b"A" * 500_000, b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"):
        answer = httpx.post(f"{server.address}gradio_api/upload", content=body, headers=FORM, timeout=60)
        assert answer.status_code >= 400 or answer.json() == []
    assert {path.parent for path in stored(server)} <= before | {server.sessions.uploads.folder}


def test_a_request_beside_uploads_is_small(server: SimpleNamespace) -> None:
    body = {"data": ["a" * 1_500_000], "fn_index": 0, "session_hash": "large"}
    assert httpx.post(f"{server.address}gradio_api/queue/join", json=body).status_code == 413


def test_bombs_are_refused_before_they_are_unpacked(
    server: SimpleNamespace, client: Client, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("1", (20_000, 20_000)).save(picture)
    wide = make_video("wide.mp4", num_frames=2, size=(1024, 768), options={"preset": "ultrafast"})
    later = [make_video("a.h264"), make_video("b.h264", size=(1024, 768), options={"preset": "ultrafast"})]
    bombs = {
        picture: "too many|cannot be read",
        make_video("hours.mp4", num_frames=300, fps=Fraction(1, 60)): "300 minutes are too long",
        wide: "1024x768 pixels are too many",
        join_videos(tmp_path / "grows.mkv", *later): "damaged near frame 12",  # where it grows beyond the limit
    }
    for bomb, message in bombs.items():
        with pytest.raises(AppError, match=message) as refused:
            client.predict(file=handle_file(bomb), api_name="/upload")
        assert bomb.name in str(refused.value)
        assert str(server.folder) not in str(refused.value)
    assert json.loads(client.predict(api_name="/export"))["turns"] == []
    assert list(server.sessions.find(client.session_hash).folder.iterdir()) == []


def test_a_picture_that_calls_itself_a_page_is_never_served_as_one(
    server: SimpleNamespace, client: Client, image: Path, tmp_path: Path
) -> None:
    for suffix in (".html", ".svg", ".js"):
        page = tmp_path / f"page{suffix}"
        page.write_bytes(image.read_bytes())
        client.predict(file=handle_file(page), api_name="/upload")
    for item in server.sessions.find(client.session_hash).media:
        answer = httpx.get(f"{server.address}gradio_api/file={item.path}")
        assert (answer.status_code, answer.content) == (200, image.read_bytes())
        assert not any(word in answer.headers["content-type"] for word in ("html", "svg", "script"))


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("gradio_api/deep_link?session_hash=a", "GET"),
        ("gradio_api/dev/reload", "GET"),
        ("gradio_api/proxy=https://a.b/", "GET"),
        ("gradio_api/proxy=https://a.hf.space/", "GET"),
        ("gradio_api/runs", "GET"),
        ("gradio_api/run-history/buckets", "GET"),
        ("gradio_api/vibe-code", "GET"),
        ("gradio_api/process_recording", "POST"),
        ("gradio_api/component_server", "POST"),
        ("monitoring", "GET"),
        ("monitoring/summary", "GET"),
    ],
)
def test_what_the_page_does_not_need_is_closed(path: str, method: str, server: SimpleNamespace) -> None:
    call = {"data": "/", "component_id": 1, "session_hash": "a", "fn_name": "ls"}
    answer = httpx.request(method, server.address + path, json=call if method == "POST" else None)
    assert answer.status_code in (400, 403, 404)


def test_a_session_that_has_ended_is_not_revived(server: SimpleNamespace) -> None:
    key = "visitor who left"
    server.sessions.get(key)
    server.sessions.end(key)
    events = join_queue(server, "ask", ["Am I here?", None, None, None, None], key)
    assert "has ended" in events
    assert server.sessions.find(key) is None


def open_sockets(server: SimpleNamespace, sent: bytes, number: int) -> list[socket.socket]:
    address = httpx.URL(server.address)
    opened = [socket.create_connection((address.host, address.port), timeout=20) for _ in range(number)]
    for connection in opened:
        connection.sendall(sent)
    return opened


def is_closed(connection: socket.socket) -> bool:
    """Read to the end of what the server says; a connection that stays open times out."""
    with connection:
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\n"])
def test_connections_on_which_no_request_comes_are_closed(
    sent: bytes, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    opened = open_sockets(server, sent, 50)
    # Others are served meanwhile.
    assert httpx.get(server.address).status_code == 200
    until = time.monotonic() + 15
    while not select.select(opened, [], [], 0.2)[0]:
        assert time.monotonic() < until
        server.demo.sweep()
    assert all(map(is_closed, opened))


def test_a_body_that_does_not_come_is_not_waited_for(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_SECONDS", 1.0)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n"
    head += b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    assert all(map(is_closed, open_sockets(server, head, 20)))


BODIES = [
    {},
    [],
    {"data": None},
    {"data": []},
    {"data": ["x"]},
    {"data": [{}, [], {}, [], {}]},
    {"data": [], "fn_index": -1},
    {"data": [], "fn_index": 99},
    {"data": [], "session_hash": "\0"},
    {"data": [], "event_data": [1], "trigger_id": "x"},
]


@pytest.mark.parametrize("route", ["run/ask", "run/nothing", "api/upload", "call/nothing", "reset", "cancel"])
def test_a_call_that_makes_no_sense_is_told_why(route: str, server: SimpleNamespace) -> None:
    for body in [*map(json.dumps, BODIES), "{bad", '{"data": [NaN, 1e999]}', "\0"]:
        answer = httpx.post(
            f"{server.address}gradio_api/{route}", content=body, headers={"content-type": "application/json"}
        )
        assert "null" not in answer.text[:20], (body, answer.text)
        assert "Internal Server Error" not in answer.text, body


def test_a_call_says_how_many_values_it_takes(server: SimpleNamespace) -> None:
    answer = httpx.post(f"{server.address}gradio_api/run/ask", json={"data": ["What?"]})
    assert answer.json()["error"] == "ask takes 5 values, but 1 were sent"
