"""The running server: endpoints for scripts, visitors at the same time, and what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from video_llama.cli.demo_video import main
from video_llama.demo.limits import Limits, answer_options
from video_llama.demo.server import DemoServer, ServerSettings, check_address, read_auth, warn_public_address
from video_llama.demo.sessions import Defaults
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENDPOINTS = {"/upload", "/ask", "/retry", "/undo", "/clear", "/stop", "/export"}


@pytest.fixture
def client(server: SimpleNamespace) -> Iterator[Client]:
    client = Client(server.address, verbose=False)
    yield client
    server.sessions.end(client.session_hash)
    client.close()


def test_the_endpoints_are_named_and_explained(client: Client) -> None:
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(described) == ENDPOINTS
    assert all(endpoint["description"] for endpoint in described.values())


def test_a_script_uploads_asks_streams_retries_undoes_and_exports(
    client: Client, make_video: Callable[..., Path]
) -> None:
    clip = make_video("clip.mp4", audio=True)
    seen = client.predict(file=handle_file(clip), frames=3, api_name="/upload")
    assert (seen["name"], seen["kind"], len(seen["frame_seconds"])) == ("clip.mp4", "video", 3)
    job = client.submit("What is it?", api_name="/ask")
    answer = job.result()
    assert job.outputs()[-1] == answer
    assert client.predict(max_new_tokens=6, api_name="/retry") == answer
    (turn,) = json.loads(client.predict(api_name="/export"))["turns"]
    assert (turn["question"], turn["answer"], turn["media"]) == ("What is it?", answer, [seen])
    assert client.predict(api_name="/undo") == "What is it?"
    assert client.predict(api_name="/clear") is True
    assert json.loads(client.predict(api_name="/export"))["turns"] == []


def test_a_script_can_stop_an_answer(client: Client) -> None:
    job = client.submit("Go on for ever", temperature=1.5, max_new_tokens=1500, api_name="/ask")
    next(iter(job))
    assert client.predict(api_name="/stop") is True
    assert json.loads(client.predict(api_name="/export"))["turns"][0]["answer"] == job.result()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ",), "type a question first"),
        (("a" * 2001,), "has 2001 characters"),
        ((5,), "the question must be text"),
        ((None,), "the question must be text"),
        ((["a"],), "the question must be text"),
        (("What?", -1.0), "Temperature must be at least 0"),
        (("What?", [1]), "Temperature must be a number"),
        (("What?", None, None, "x"), "Beams must be a whole number"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(arguments: tuple[Any, ...], message: str, client: Client) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name="/ask")


def test_a_corrupt_file_is_refused_and_the_next_one_taken(client: Client, image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "<b>.mp4"
    broken.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(AppError, match="not a media file") as refused:
        client.predict(file=handle_file(broken), api_name="/upload")
    assert "<b>" not in str(refused.value)
    assert client.predict(file=handle_file(image), api_name="/upload")["kind"] == "image"


def test_visitors_at_the_same_time_get_the_answers_they_would_get_alone(
    server: SimpleNamespace, make_video: Callable[..., Path]
) -> None:
    clips = [make_video(f"{number}.mp4", num_frames=3 + 4 * number, size=(64 + 16 * number, 48)) for number in range(4)]

    def converse(number: int) -> list[dict[str, Any]]:
        client = Client(server.address, verbose=False)
        try:
            client.predict(file=handle_file(clips[number % 4]), api_name="/upload")
            client.predict(f"Who is number {number % 4}?", api_name="/ask")
            client.predict("Why?", api_name="/ask")
            return json.loads(client.predict(api_name="/export"))["turns"]
        finally:
            server.sessions.end(client.session_hash)
            client.close()

    alone = [converse(number) for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(converse, range(8)))
    assert together == alone + alone
    assert len({json.dumps(one) for one in alone}) == 4
    assert list(server.sessions.folder.iterdir()) == []


def test_a_session_serves_its_own_copy_until_it_ends(server: SimpleNamespace, client: Client, image: Path) -> None:
    client.predict(file=handle_file(image), api_name="/upload")
    (item,) = server.sessions.find(client.session_hash).media
    address = f"{server.address}gradio_api/file={item.path}"
    assert httpx.get(address).content == image.read_bytes()
    server.sessions.end(client.session_hash)
    assert httpx.get(address).status_code in (403, 404)


def test_the_page_needs_nothing_from_elsewhere(server: SimpleNamespace) -> None:
    page = httpx.get(server.address).text
    assert "fonts.googleapis" not in page
    assert json.loads(httpx.get(f"{server.address}config").text)["analytics_enabled"] is False


def test_the_page_has_an_icon(server: SimpleNamespace) -> None:
    icon = httpx.get(f"{server.address}favicon.ico")
    assert icon.status_code == 200
    assert Image.open(io.BytesIO(icon.content)).size == (64, 64)


# Starting and stopping


def test_the_page_is_there_while_the_model_loads_and_everything_is_gone_at_the_end(shared_model: Any) -> None:
    ready: Future[Any] = Future()
    before = os.environ.get("GRADIO_TEMP_DIR")
    demo = DemoServer(ready.result)
    try:
        address = demo.start()
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(address).status_code == 200
        assert not demo.model.done()
        ready.set_result(shared_model)
        assert demo.model.result(timeout=30).model is shared_model.model
    finally:
        demo.close()
    assert (demo.folder.exists(), os.environ.get("GRADIO_TEMP_DIR")) == (False, before)
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_the_settings_of_the_command_line_are_where_the_page_and_scripts_start(
    shared_model: Any, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[GenerationOptions] = []
    complete = SharedModel.stream
    monkeypatch.setattr(SharedModel, "stream", lambda *given: (used.append(given[2]), complete(*given))[1])
    options = GenerationOptions(max_new_tokens=2000, num_beams=9, repetition_penalty=1.5)
    demo = DemoServer(lambda: shared_model, defaults=Defaults(options, num_frames=40, listen=False))
    try:
        address = demo.start()
        found = {one["props"].get("label"): one["props"] for one in httpx.get(f"{address}config").json()["components"]}
        for label, value in (("Max new tokens", 2000), ("Beams", 9), ("Frames", 40)):
            assert (found[label]["value"], found[label]["maximum"]) == (value, value)
        assert found["Use the audio track"]["value"] is False
        client = Client(address, verbose=False)
        clip = make_video("clip.mp4", num_frames=60, audio=True)
        seen = client.predict(file=handle_file(clip), api_name="/upload")
        assert (len(seen["frame_seconds"]), seen["sound"]) == (40, "not listened to")
        assert shared_model.processor.media_processor.num_frames == 8
        client.predict("What is it?", None, None, 1, 3, api_name="/ask")
        assert used == [GenerationOptions(max_new_tokens=3, num_beams=1, repetition_penalty=1.5)]
        assert answer_options((None,) * 4, demo.limits, options)["max_new_tokens"] == 2000
    finally:
        demo.close()


def test_gradio_remembers_no_more_pages_than_twice_the_conversations(shared_model: Any) -> None:
    demo = DemoServer(lambda: shared_model, limits=Limits(sessions=2))
    try:
        address = demo.start()
        for _ in range(7):
            client = Client(address, verbose=False)
            assert client.predict(api_name="/clear") is True
            client.close()
        assert len(demo._blocks.app.state_holder.session_data) == 4
    finally:
        demo.close()


def test_a_password_is_asked_for(shared_model: Any) -> None:
    demo = DemoServer(lambda: shared_model, ServerSettings(auth=(("ada", "secret"),)))
    try:
        address = demo.start()
        assert httpx.get(f"{address}config").status_code == 401
        assert httpx.post(f"{address}login", data={"username": "ada", "password": "wrong"}).status_code == 400
        assert Client(address, auth=("ada", "secret"), verbose=False).predict(api_name="/clear") is True
    finally:
        demo.close()


def test_passwords_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("ada:a:b\n\nbob:c\n")
    assert read_auth(str(file)) == (("ada", "a:b"), ("bob", "c"))
    assert read_auth(None) == ()
    for content in ("", "ada\n", ":a\n"):
        file.write_text(content)
        with pytest.raises(VideoLlamaError, match="every line must be user:password"):
            read_auth(str(file))
    with pytest.raises(VideoLlamaError, match="No such file"):
        read_auth(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        (ServerSettings(), []),
        (ServerSettings(share=True), ["--share makes the page public", "without --auth-file no password"]),
        (ServerSettings(host="0.0.0.0", auth=(("a", "b"),)), ["everyone who can reach 0.0.0.0"]),
    ],
)
def test_opening_the_page_to_strangers_warns(
    settings: ServerSettings, warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    warn_public_address(settings)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warnings)
    assert all(text in line for text, line in zip(warnings, lines, strict=True))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("notahost.invalid", "--host notahost.invalid: no such host"),
        ("a..b", "--host a..b: no such host"),
        ("192.0.2.1", "--host 192.0.2.1: not an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(host: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", host, "--model", "absent"]) == 1
    assert capsys.readouterr().err == f"starting the page …\nerror: {message}\n"


def test_a_port_that_is_in_use_is_one_line_and_a_free_one_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--model", "absent"]) == 1
    message = f"error: --port {port}: already in use; choose another, or omit --port to use the next free one\n"
    assert capsys.readouterr().err == "starting the page …\n" + message
    check_address("localhost", free_port())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_demo_and_leaves_no_file_behind(name: str, tmp_path: Path, image: Path) -> None:
    code = (
        "import signal, sys, threading; from video_llama.cli import demo, demo_video;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore it
        "demo.load_model = lambda arguments: threading.Event().wait();"  # it loads for ever
        "sys.exit(demo_video.main(['--port', sys.argv[1]]))"
    )
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    settings = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings) as process:
        try:
            assert process.stdout is not None
            assert f":{port}/" in process.stdout.readline()
            form = {"files": image.open("rb")}
            assert httpx.post(f"http://127.0.0.1:{port}/gradio_api/upload", files=form, timeout=60).status_code == 200
            assert list(tmp_path.glob("video-llama-demo-*/uploads/*/*"))
            process.send_signal(getattr(signal, name))
            assert process.wait(120) == 128 + getattr(signal, name)
        finally:
            process.kill()
    assert list(tmp_path.glob("video-llama-demo-*")) == []


def test_a_device_that_failed_for_good_ends_the_demo_with_one_line(
    tmp_path: Path, tiny_checkpoint: Path, image: Path
) -> None:
    code = (
        "import sys; from video_llama.cli import demo_video; from video_llama.model.video_branch import VideoBranch\n"
        "def fail(*arguments): raise RuntimeError('CUDA error: device-side assert triggered')\n"
        "VideoBranch.forward = fail\n"
        "sys.exit(demo_video.main(['--port', sys.argv[1], '--model', sys.argv[2], '--device', 'cpu']))"
    )
    port = free_port()
    command = [sys.executable, "-c", code, str(port), str(tiny_checkpoint)]
    settings = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=settings, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert f":{port}/" in process.stdout.readline()
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            with pytest.raises(Exception, match="device-side assert"):
                client.predict(file=handle_file(image), api_name="/upload")
            assert process.wait(120) == 1
            told = [line for line in process.stderr.read().splitlines() if line.startswith("error: ")]
        finally:
            process.kill()
    assert len(told) == 1
    assert "cpu failed, and this process can compute nothing more there" in told[0]
    assert list(tmp_path.glob("video-llama-demo-*")) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
