"""Serve the page: safe settings, the model loaded meanwhile, everything freed at the end."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from video_llama.conversation import Conversation
from video_llama.demo.addresses import check_address
from video_llama.demo.closed_pages import ClosedPages, return_memory
from video_llama.demo.limits import Limits
from video_llama.demo.requests import RequestGuard
from video_llama.demo.sessions import Sessions
from video_llama.demo.shared_model import SharedModel
from video_llama.demo.uploads import stored_bytes
from video_llama.errors import VideoLlamaError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions

__all__ = ["DemoServer", "serve"]

logger = logging.getLogger(__name__)

LOCAL_HOST = "127.0.0.1"
_SWEEP_SECONDS = 30.0
_LAST_WORDS_SECONDS = 2.0  # for visitors to be told what happened
_ENVIRONMENT = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ServerSettings:
    """Where and for whom the page is served.

    Attributes:
        host, port: the address; port None takes the first free one from 7860 on.
        share: a public address through Gradio's tunnel.
        auth: user and password pairs; empty lets everybody in who reaches the address.
        concurrency: how many requests may be worked on at once.
        title: which model answers.
    """

    host: str = LOCAL_HOST
    port: int | None = None
    share: bool = False
    auth: tuple[tuple[str, str], ...] = ()
    concurrency: int = 1
    title: str = ""


class DemoServer:
    """The running page.

    Args:
        load: makes the model, in a thread of its own while the page is already there.
        settings: where and for whom.
        limits: what visitors may do.
        options: how answers are drawn unless visitors choose otherwise.
        template: of the conversations; by default the one that belongs to the weights.
        num_frames: frames to look at in a video unless visitors choose otherwise; by default as many as the model was
            trained with.
        listen: whether videos are listened to unless visitors choose otherwise.
    """

    def __init__(
        self,
        load: Callable[[], VideoLlama],
        settings: ServerSettings | None = None,
        *,
        limits: Limits | None = None,
        options: GenerationOptions | None = None,
        template: Conversation | None = None,
        num_frames: int | None = None,
        listen: bool = True,
    ) -> None:
        self.settings, self.options = settings or ServerSettings(), options or GenerationOptions()
        self.limits = (limits or Limits()).raised(self.options, num_frames)
        self.folder = Path(tempfile.mkdtemp(prefix="video-llama-demo-"))
        self.model: Future[SharedModel] = Future()
        self.sessions = Sessions(
            self.model,
            self.folder,
            limits=self.limits,
            template=template,
            options=self.options,
            num_frames=num_frames,
            listen=listen,
        )
        self._load = load
        self._app: Any = None
        self._environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
        self._closing = threading.Event()
        self._swept = 0

    def start(self) -> str:
        """Serve and return the address; the model goes on loading.

        Raises:
            VideoLlamaError: the address cannot be had.
        """
        check_address(self.settings.host, self.settings.port)
        self.sessions.folder.mkdir()
        # The second also keeps it from asking after newer versions.
        _set_environment(dict(zip(_ENVIRONMENT, (str(self.sessions.uploads.folder), "False"), strict=True)))
        from video_llama.demo.app import build_app

        self._app = build_app(self.sessions, self.options, escape(self.settings.title), self.settings.concurrency)
        script = (_HERE / "page.js").read_text(encoding="utf-8")
        middleware = _middleware(self.limits.upload_bytes, self._room)
        _, address, shared = self._launch(
            server_name=self.settings.host,
            server_port=self.settings.port,
            share=self.settings.share,
            auth=list(self.settings.auth) or None,
            max_file_size=self.limits.upload_bytes,
            allowed_paths=[str(self.sessions.folder)],
            css_paths=[_HERE / "page.css"],
            head=f"<script>window.uploadBytes = {self.limits.upload_bytes};\n{script}</script>",
            theme=_theme(),
            app_kwargs={"middleware": middleware},
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        self._closed_pages = ClosedPages(self._app.app.state_holder)
        threading.Thread(target=self._load_model, name="video-llama-load", daemon=True).start()
        threading.Thread(target=self._sweep_on, name="video-llama-sweep", daemon=True).start()
        return shared or address

    def _launch(self, **settings: Any) -> tuple[Any, str, str | None]:
        try:
            launched: tuple[Any, str, str | None] = self._app.launch(**settings)
        except OSError as error:
            where = f"{self.settings.host}, port {self.settings.port or 'from 7860 on'}"
            raise VideoLlamaError(f"{where}: no port is free; choose one with --port") from error
        return launched

    def close(self) -> None:
        """Stop serving, free the model's sessions and remove all files."""
        self._closing.set()
        self.sessions.end_all()  # answers that are being given stop, so that the server need not wait for them
        if self._app is not None:
            self._app.close(verbose=False)
        self.sessions.end_all()
        shutil.rmtree(self.folder, ignore_errors=True)
        _set_environment(self._environment)

    def _room(self) -> int:
        return self.limits.stored_bytes - stored_bytes(self.folder)

    def _load_model(self) -> None:
        try:
            model = SharedModel(self._load(), self.limits.kv_cache_bytes)
            if self.sessions.num_frames is not None:
                model.processor = copy.copy(model.processor)  # whose model it was keeps its own setting
                media_processor = model.processor.media_processor
                model.processor.media_processor = replace(media_processor, num_frames=self.sessions.num_frames)
            self.model.set_result(model)
        except BaseException as error:  # carried to whoever waits for the model
            self.model.set_exception(error)

    def sweep(self) -> None:
        """Free what is no longer needed; the server does so by itself, twice a minute."""
        self.sessions.end_idle()
        self.sessions.uploads.sweep()
        if self._closed_pages.forget() or self.sessions.num_ended > self._swept:
            self._swept = self.sessions.num_ended
            return_memory()

    def _sweep_on(self) -> None:
        while not self._closing.wait(_SWEEP_SECONDS):
            self.sweep()


def serve(arguments: argparse.Namespace) -> None:
    """Run the page until Ctrl-C or another signal ends the process.

    Raises:
        VideoLlamaError: the model cannot be loaded, or the address not be had.
        DeviceError: the device failed for good: the page would have nothing else to say to anybody.
    """
    from video_llama.demo.opening import choose_options, choose_template, load_model

    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        auth=read_auth(arguments.auth_file),
        concurrency=arguments.concurrency,
        title=Path(arguments.model or arguments.cfg_path).name,
    )
    check_address(settings.host, settings.port)  # before the model, which takes a while to load
    warn_public_address(settings)
    _install_signal_handlers()
    server = DemoServer(
        lambda: load_model(arguments),
        settings,
        limits=Limits(
            upload_mb=arguments.max_upload_mb,
            seconds=60 * arguments.max_minutes,
            kv_cache_gib=arguments.kv_cache_gib,
        ),
        options=choose_options(arguments),
        template=choose_template(arguments),
        num_frames=arguments.num_frames,
        listen=not arguments.no_audio,
    )
    try:
        address = server.start()
        print(f"The page is at {address} (Ctrl-C ends it); loading the model …", flush=True)
        model = server.model.result()
        print("The model is ready.", flush=True)
        model.failure.exception()  # waits for as long as there is none
        time.sleep(_LAST_WORDS_SECONDS)
        model.failure.result()
    finally:
        server.close()


def _install_signal_handlers() -> None:
    """Signals that would end the process at once, and leave the visitors' files behind, end it like `sys.exit`."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise SystemExit(128 + number)


def warn_public_address(settings: ServerSettings) -> None:
    """Say so on stderr if people beyond this machine can reach the page."""
    if settings.share:
        print("warning: --share puts the page on the internet, through a server of Gradio's", file=sys.stderr)
    elif settings.host not in (LOCAL_HOST, "localhost", "::1"):
        print(f"warning: whoever can reach {settings.host} can use the page", file=sys.stderr)
    if (settings.share or settings.host not in (LOCAL_HOST, "localhost", "::1")) and not settings.auth:
        print("warning: without --auth-file nobody is asked for a password", file=sys.stderr)


def read_auth(path: str | None) -> tuple[tuple[str, str], ...]:
    """User and password of every line `user:password` of a file; a command line would show them to everybody.

    Raises:
        VideoLlamaError: no such file, or a line of another form.
    """
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VideoLlamaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    pairs = [tuple(line.split(":", 1)) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise VideoLlamaError(f"{path}: every line must be user:password")
    return tuple((user, password) for user, password in pairs)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _middleware(upload_bytes: int, room: Callable[[], int]) -> list[object]:
    from starlette.middleware import Middleware

    return [Middleware(RequestGuard, upload_bytes=upload_bytes, room=room)]


def _theme() -> Any:
    import gradio as gr

    # Fonts that every system has: the others would be fetched from elsewhere.
    return gr.themes.Soft(
        primary_hue="indigo",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(block_border_width="1px", input_border_width="1px")
