"""What comes from a visitor, checked: settings, and requests as a whole."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_llama.demo.limits import Limits
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions

__all__ = ["RequestGuard", "answer_options", "num_frames"]

LEAST_TEMPERATURE = 0.01  # what lies below is greedy: dividing by it would overflow
_FORM_BYTES = 1_000_000  # of a request beside the file in it

# Of the framework's addresses: those that fetch from other servers, and those the page has no use for.
_CLOSED = (
    "file=http:",
    "file=https:",
    "proxy=",
    "component_server",
    "deep_link",
    "dev/",
    "monitoring",
    "process_recording",
    "run-history",
    "runs",
    "vibe-",
)

Message = MutableMapping[str, Any]


def answer_options(settings: Sequence[Any], limits: Limits, defaults: GenerationOptions) -> dict[str, Any]:
    """Settings of a visitor as fields of `GenerationOptions`.

    Args:
        settings: temperature, top_p, num_beams and max_new_tokens; None (or "", an emptied field) stands for the
            default.
        limits: what a visitor may ask for.
        defaults: where a setting is None.

    Raises:
        VideoLlamaError: a value that is no number, or makes no sense.
    """
    temperature, top_p, num_beams, max_new_tokens = (None if value == "" else value for value in settings)
    chosen: dict[str, Any] = {
        "temperature": _number("Temperature", temperature, 0, limits.temperature),
        "top_p": _number("Top-p", top_p, 0, 1),
        "num_beams": _whole("Beams", num_beams, limits.beams),
        "max_new_tokens": _whole("Longest answer", max_new_tokens, limits.answer_tokens),
    }
    if chosen["top_p"] == 0:
        raise VideoLlamaError("Top-p must lie above 0")
    if chosen["temperature"] is not None and chosen["temperature"] < LEAST_TEMPERATURE:
        chosen["temperature"] = 0.0
    return {name: getattr(defaults, name) if value is None else value for name, value in chosen.items()}


def num_frames(value: Any, limits: Limits) -> int | None:
    """How many frames to sample; None for as many as the model was trained with.

    Raises:
        VideoLlamaError: no whole number, or out of range.
    """
    return _whole("Frames to look at", None if value == "" else value, limits.frames)


def _number(name: str, value: Any, least: float, most: float) -> float | None:
    """A number that lies from `least` to `most`; None stays None."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise VideoLlamaError(f"{name} must be a number")
    if value < least:
        raise VideoLlamaError(f"{name} must be at least {least}")
    if value > most:
        raise VideoLlamaError(f"{name} may be at most {most}")
    return float(value)


def _whole(name: str, value: Any, most: int) -> int | None:
    """A whole number that lies from 1 to `most`; None stays None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0):
        raise VideoLlamaError(f"{name} must be a whole number")
    number = _number(name, value, 1, most)
    return None if number is None else int(number)


@dataclass(frozen=True)
class RequestGuard:
    """Refuses requests that are too large, before they are read, and parts of the server that the page does not need.

    Args:
        app: the web application (ASGI) behind it.
        upload_bytes: largest upload.
        room: how many bytes may be stored at the moment.
    """

    app: Callable[..., Awaitable[None]]
    upload_bytes: int
    room: Callable[[], int]

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].strip("/").removeprefix("gradio_api/").lstrip("/")
        is_upload = path == "upload"
        most = (self.upload_bytes if is_upload else 0) + _FORM_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        room = self.room() if is_upload else most
        if path.lower().startswith(_CLOSED):
            await _refuse(send, 403, b"Only uploaded files are served.")
        elif not length.isdigit() or int(length) > most:
            await _refuse(send, 413, b"The request is too large.")
        elif int(length) > room:
            await _refuse(send, 507, b"There is no room at the moment; try again in a few minutes.")
        else:
            await self.app(scope, *_counted(receive, send, min(most, room)))


def _counted(
    receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]], most: int
) -> tuple[Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]]:
    """`receive` and `send` that hang up on a body larger than it may be, whatever its headers say."""
    total = 0

    async def count() -> Message:
        nonlocal total
        message: Message = await receive() if total <= most else {}
        total += len(message.get("body", b""))
        return message if total <= most else {"type": "http.disconnect"}

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start" and (total > most or message["status"] == 413):
            # Otherwise the web server would read the rest of the body, to keep the connection.
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return count, answer


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
