"""Run the command line of the demo with a tiny model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from examples.tiny_world.known_clips import Clip, make_clips
from scripts.screenshot_demo import launch, open_page
from video_llama.cli import demo_video
from video_llama.demo.limits import Limits
from video_llama.demo.page import EXAMPLES
from video_llama.demo.server import DemoServer, ServerSettings
from video_llama.demo.session import Session
from video_llama.demo.sessions import Defaults, Sessions
from video_llama.demo.shared_model import SharedModel
from video_llama.inference.cache import PrefixCache
from video_llama.inference.chat import Chat
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.load import load_pretrained_model

Run = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture
def run(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with the tiny checkpoint: its exit code, output and messages."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path, model: str | Path | None = tiny_checkpoint) -> SimpleNamespace:
        source = [] if model is None else ["--model", str(model)]
        capfd.readouterr()
        device = [] if "--gpu-id" in arguments else ["--device", "cpu"]
        code = demo_video.main([*source, *device, "--max-new-tokens", "6", *map(str, arguments)])
        output = capfd.readouterr()
        messages = [
            line for line in output.err.splitlines() if line and not line.startswith(("Loading weights", "model: "))
        ]
        return SimpleNamespace(code=code, lines=output.out.splitlines(), messages=messages)

    return run


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[Chat]:
    """Every chat that the command opens."""
    opened: list[Chat] = []
    initialise = Chat.__init__

    def remember(self: Chat, *arguments: object, **settings: object) -> None:
        initialise(self, *arguments, **settings)
        opened.append(self)

    monkeypatch.setattr(Chat, "__init__", remember)
    return opened


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "still.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def shared_model(tiny_checkpoint: Path) -> SharedModel:
    return SharedModel(load_pretrained_model(tiny_checkpoint, device="cpu", half=False))


@pytest.fixture
def sessions(shared_model: SharedModel, tmp_path: Path) -> Sessions:
    """At most two visitors, each with at most two files."""
    model: Future[SharedModel] = Future()
    model.set_result(shared_model)
    return Sessions(model, tmp_path / "demo", limits=Limits(sessions=2, media=2))


@pytest.fixture
def session(sessions: Sessions) -> Session:
    return sessions.get("visitor")


class HeldModel(SharedModel):
    """A model whose answers can be held up and replaced.

    Attributes:
        gate: while it is closed (clear), answers stop after each piece.
        says: every answer, if it is not None.
    """

    def __init__(self, model: VideoLlama) -> None:
        super().__init__(model)
        self.gate = threading.Event()
        self.gate.set()
        self.says: str | None = None

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cache: PrefixCache | None = None,
        stop: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        for piece in super().stream(prompt, options, cache, stop) if self.says is None else [self.says]:
            yield piece
            assert self.gate.wait(120)


@pytest.fixture(scope="module")
def world() -> Iterator[SimpleNamespace]:
    """The running page of the small model of the package, which knows the generated world."""
    model = HeldModel(load_pretrained_model("video-llama-tiny", device="cpu", half=False))
    running = DemoServer(
        lambda: model,
        ServerSettings(title="small model"),
        limits=Limits(upload_mb=2, seconds=60),
        defaults=Defaults(GenerationOptions(max_new_tokens=40)),
    )
    address = running.start()
    running.model.result()
    held: Future[SharedModel] = Future()
    held.set_result(model)
    running.sessions.model = held
    yield SimpleNamespace(address=address, sessions=running.sessions, folder=running.folder, model=model, demo=running)
    running.close()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """16 clips, no two alike in colour and sound."""
    return make_clips(tmp_path_factory.mktemp("clips"), 16)


@pytest.fixture(scope="session")
def server(shared_model: SharedModel) -> Iterator[SimpleNamespace]:
    """The running page of a model with random weights: its address and its parts."""
    running = DemoServer(
        lambda: shared_model,
        limits=Limits(upload_mb=2, seconds=60, pixels=640 * 480, answer_tokens=4000),
        defaults=Defaults(GenerationOptions(max_new_tokens=6)),
    )
    address = running.start()
    yield SimpleNamespace(address=address, sessions=running.sessions, folder=running.folder, demo=running)
    running.close()


def join_queue(server: SimpleNamespace, name: str, data: list[Any], session: str) -> str:
    """Call an endpoint as a browser does, without a client that checks anything; returns all events."""
    with httpx.Client(base_url=server.address, timeout=60) as browser:
        config = browser.get("config").json()
        number = next(one["id"] for one in config["dependencies"] if one["api_name"] == name)
        body = {"data": data, "fn_index": number, "session_hash": session}
        assert browser.post("gradio_api/queue/join", json=body).status_code == 200
        events = ""
        with browser.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                events += line
                if "process_completed" in line:
                    break
        server.sessions.end(session)
        return events


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, world: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    """Open the page as a new visitor; nobody may need anything from other servers."""
    pages, asked, problems = [], [], []

    def visit(**settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        context.on("request", lambda request: asked.append(request.url))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        pages.append(open_page(context, world.address))
        return pages[-1]

    yield visit
    world.model.gate.set()
    world.model.says = None
    for page in pages:
        page.context.close()
    assert asked
    assert [url for url in asked if not url.startswith((world.address, "data:", "blob:"))] == []
    assert problems == []


@pytest.fixture
def red_cross() -> Path:
    """The image of the examples."""
    return next(path for path, _ in EXAMPLES if path.suffix == ".jpg")
