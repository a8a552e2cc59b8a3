"""Run the command line of the demo with a tiny model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from video_llama.chat import Chat
from video_llama.demo import terminal
from video_llama.demo.limits import Limits
from video_llama.demo.server import DemoServer
from video_llama.demo.session import Session
from video_llama.demo.sessions import Sessions
from video_llama.demo.shared_model import SharedModel
from video_llama.model.builder import load_pretrained_model
from video_llama.model.generation import GenerationOptions

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
        code = terminal.main([*source, "--device", "cpu", "--max-new-tokens", "6", *map(str, arguments)])
        output = capfd.readouterr()
        messages = [line for line in output.err.splitlines() if line and "Loading weights" not in line]
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
    return Sessions(model, tmp_path / "sessions", limits=Limits(sessions=2, media=2))


@pytest.fixture
def session(sessions: Sessions) -> Session:
    return sessions.get("visitor")


@pytest.fixture(scope="session")
def server(shared_model: SharedModel) -> Iterator[SimpleNamespace]:
    """The running page of a model with random weights: its address and its parts."""
    running = DemoServer(
        lambda: shared_model,
        limits=Limits(upload_mb=2, seconds=60, answer_tokens=4000),
        options=GenerationOptions(max_new_tokens=6),
    )
    address = running.start()
    yield SimpleNamespace(address=address, sessions=running.sessions, folder=running.folder, demo=running)
    running.close()
