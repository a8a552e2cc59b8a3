"""Serve the page: refuse what is too large, load the model meanwhile, and free everything at the end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from video_llama.demo.connections import SlowHeads, in_time
from video_llama.demo.events import build_blocks
from video_llama.demo.limits import Limits
from video_llama.demo.page import launch_look
from video_llama.demo.sessions import Defaults, Sessions, stored_bytes
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import VideoLlamaError
from video_llama.inference.engine import VideoLlama

__all__ = ["DemoServer", "RequestGuard", "ServerSettings", "check_address", "read_auth", "warn_public_address"]

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_SWEEP_SECONDS = 5.0
# For visitors to be shown that the device failed.
_LAST_ANSWER_SECONDS = 2.0
# Of a request beside the file in it.
_FORM_BYTES = 1_000_000
# Addresses of Gradio that have no switch: they fetch from other servers, write files, or wait for ever.
_CLOSED = ("file=http:", "file=https:", "component_server", "deep_link", "dev/", "process_recording")


@dataclass(frozen=True)
class ServerSettings:
    """Address of the page, and who may use it."""

    host: str = LOCAL_HOSTS[0]
    # None for the first free one from 7860 on.
    port: int | None = None
    # A public address through Gradio's tunnel.
    share: bool = False
    # User and password pairs; without any, everybody is let in who reaches the address.
    auth: tuple[tuple[str, str], ...] = ()
    # How many requests are processed at once.
    concurrency: int = 1
    # The name of the model.
    title: str = ""


class DemoServer:
    """The running page.

    Args:
        load: returns the model; called in a thread of its own while the page is already served.
        settings: where and for whom.
        limits: what visitors may do; raised where the defaults are beyond them.
        defaults: what visitors need not choose.
    """

    def __init__(
        self,
        load: Callable[[], VideoLlama],
        settings: ServerSettings | None = None,
        limits: Limits | None = None,
        defaults: Defaults | None = None,
    ) -> None:
        self.settings, defaults = settings or ServerSettings(), defaults or Defaults()
        self.limits = (limits or Limits()).raised(defaults.options, defaults.num_frames)
        self._cleanup = ExitStack()
        folder = tempfile.TemporaryDirectory(prefix="video-llama-demo-", ignore_cleanup_errors=True)
        self.folder = Path(self._cleanup.enter_context(folder))
        self.model: Future[SharedModel] = Future()
        self.sessions = Sessions(self.model, self.folder, self.limits, defaults)
        self._load = load
        self._blocks: Any = None
        self._closing = threading.Event()
        self._slow_heads = SlowHeads()

    def start(self) -> str:
        """Serve and return the address; the model goes on loading.

        Raises:
            VideoLlamaError: the address is not available.
        """
        settings, uploads = self.settings, self.sessions.uploads.folder
        guard = Middleware(RequestGuard, upload_bytes=self.limits.upload_bytes, room=self._room)
        check_address(settings.host, settings.port)
        self.sessions.folder.mkdir()
        # Gradio reads at every request where uploads are, and asks for newer versions of itself unless that is off.
        variables = _environment(GRADIO_TEMP_DIR=str(uploads), GRADIO_ANALYTICS_ENABLED="False")
        self._cleanup.enter_context(variables)
        self._blocks = build_blocks(self.sessions, settings.title, settings.concurrency)
        try:
            _, address, public_address = self._blocks.launch(
                server_name=settings.host,
                server_port=settings.port,
                share=settings.share,
                auth=list(settings.auth) or None,
                max_file_size=self.limits.upload_bytes,
                allowed_paths=[str(self.sessions.folder)],
                # How many pages Gradio remembers; by default 10 000, each with all that it shows.
                state_session_capacity=2 * self.limits.sessions,
                app_kwargs={"middleware": [guard]},
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                ssr_mode=False,
                show_error=False,
                quiet=True,
                prevent_thread_lock=True,
                **launch_look(self.limits),
            )
        except OSError as error:
            where = f"{settings.host}, port {settings.port or 'from 7860 on'}"
            raise VideoLlamaError(f"{where}: no port is free; choose one with --port") from error
        threading.Thread(target=self._load_model, name="video-llama-load", daemon=True).start()
        threading.Thread(target=self._sweep_on, name="video-llama-sweep", daemon=True).start()
        return str(public_address or address)

    def close(self) -> None:
        """Stop serving, free the model's sessions and remove all files."""
        self._closing.set()
        # Stops running answers, for which the server would wait.
        self.sessions.end_all()
        if self._blocks is not None:
            self._blocks.close(verbose=False)
        # A request that was still running may have opened a session in the meantime.
        self.sessions.end_all()
        self._cleanup.close()

    def sweep(self) -> None:
        """Free what is no longer needed and close what has stalled; the server does so by itself every few seconds."""
        self.sessions.end_idle()
        self.sessions.uploads.sweep()
        if self._blocks is not None:
            self._slow_heads.sweep(self._blocks.server)

    def _sweep_on(self) -> None:
        while not self._closing.wait(_SWEEP_SECONDS):
            self.sweep()

    def _load_model(self) -> None:
        kept_bytes = None
        if self.limits.kv_cache_gib is not None:
            kept_bytes = int(self.limits.kv_cache_gib * 2**30)
        try:
            self.model.set_result(SharedModel(self._load(), kept_bytes))
        except BaseException as error:
            # Raised again in every thread that waits for the model.
            self.model.set_exception(error)

    def _room(self) -> int:
        return self.limits.stored_bytes - stored_bytes(self.folder)


@dataclass(frozen=True)
class RequestGuard:
    """Refuse requests that are too large, before they are read, and addresses that the page does not need.

    A request must give its length: the web server then reads no more than that.

    Args:
        app: the web application (ASGI) behind it.
        upload_bytes: largest upload.
        room: how many bytes may be stored at the moment.
    """

    app: Callable[..., Awaitable[None]]
    upload_bytes: int
    room: Callable[[], int]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        refusal = None
        if scope["type"] == "http":
            refusal = self._check(scope["path"], dict(scope["headers"]))
        if refusal is None:
            refusal = await self._pass_on(scope, receive, send)
        if refusal is None:
            return
        # Without closing, the server would read the body all the same, to keep the connection.
        answer = PlainTextResponse(refusal[1], refusal[0], {"connection": "close"})
        await answer(scope, receive, send)

    async def _pass_on(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> tuple[int, str] | None:
        """Let the web application answer; return a refusal where it stumbles over a request, as Gradio does."""
        has_begun = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, in_time(receive), watched)
        except asyncio.TimeoutError:
            return 408, "The request did not arrive in time."
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            logger.warning("a request for %r failed: %s", scope["path"][:200], type(error).__name__, exc_info=True)
            return 400, "The server can make nothing of this request."
        return None

    def _check(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Return the status and the text of a refusal; None for a request that is fine."""
        # An address may come with this prefix or without it, so both are checked as one.
        path = path.strip("/").removeprefix("gradio_api/").lstrip("/").lower()
        is_upload = path == "upload"
        most = _FORM_BYTES + self.upload_bytes * is_upload
        length = headers.get(b"content-length", b"0")
        if path.startswith(_CLOSED):
            return 403, "Only uploaded files are served."
        # A request in chunks does not give its length, so it could be of any size.
        if b"transfer-encoding" in headers:
            return 411, "Send the length of the request (Content-Length)."
        if not length.isdigit() or int(length) > most:
            return 413, "The request is too large."
        if is_upload and int(length) > self.room():
            return 507, "There is no room at the moment; try again in a few minutes."
        return None


def check_address(host: str, port: int | None) -> None:
    """Check that the page can be served at an address; port None stands for any that is free.

    Raises:
        VideoLlamaError: no such host, not one of this machine, or the port is in use or reserved.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise VideoLlamaError(f"--host {host}: no such host") from error
    try:
        with socket.socket(family, kind, protocol) as probe:
            # Elsewhere this would share a port that is in use.
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"--port {port}: already in use; choose another, or omit --port to use the next free one",
            errno.EACCES: f"--port {port}: needs administrator rights; choose one above 1023",
            errno.EADDRNOTAVAIL: f"--host {host}: not an address of this machine",
        }
        other = f"--host {host}: the page cannot be served there: {error.strerror}"
        raise VideoLlamaError(reasons.get(error.errno or 0, other)) from error


def warn_public_address(settings: ServerSettings) -> None:
    """Print warnings if people beyond this machine can reach the page."""
    if settings.share:
        print("warning: --share makes the page public through a Gradio tunnel", file=sys.stderr)
    elif settings.host not in LOCAL_HOSTS:
        print(f"warning: everyone who can reach {settings.host} can use the page", file=sys.stderr)
    else:
        return
    if not settings.auth:
        print("warning: without --auth-file no password is needed", file=sys.stderr)


def read_auth(path: str | None) -> tuple[tuple[str, str], ...]:
    """Return user and password of every line `user:password` of a file; on the command line others could see them.

    Raises:
        VideoLlamaError: no such file, or a line of another form.
    """
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VideoLlamaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    pairs = [line.partition(":") for line in lines if line.strip()]
    if not pairs or not all(user and password for user, _, password in pairs):
        raise VideoLlamaError(f"{path}: every line must be user:password")
    return tuple((user, password) for user, _, password in pairs)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
