"""What comes from a visitor, checked: settings, and requests as a whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_llama.demo.limits import Limits
from video_llama.errors import VideoLlamaError
from video_llama.model.generation import GenerationOptions

__all__ = ["RequestGuard", "answer_options", "num_frames"]

MAX_BEAMS = 8
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
        settings: temperature, top_p, num_beams and max_new_tokens; None stands for the default.
        limits: what a visitor may ask for.
        defaults: where a setting is None.

    Raises:
        VideoLlamaError: a value that is no number, or makes no sense.
    """
    given = dict(zip(("temperature", "top_p", "num_beams", "max_new_tokens"), settings, strict=True))
    try:
        chosen = {
            name: type(getattr(defaults, name))(getattr(defaults, name) if value is None else value)
            for name, value in given.items()
        }
        GenerationOptions(**chosen)
    except (TypeError, ValueError, OverflowError) as error:
        raise VideoLlamaError(str(error)) from error
    for name, most in (("num_beams", MAX_BEAMS), ("max_new_tokens", limits.answer_tokens)):
        if chosen[name] > most:
            raise VideoLlamaError(f"{name} may be at most {most} here")
    return chosen


def num_frames(value: Any, limits: Limits) -> int | None:
    """How many frames to sample; None for as many as the model was trained with.

    Raises:
        VideoLlamaError: no whole number, or out of range.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= limits.frames:
        raise VideoLlamaError(f"frames must lie from 1 to {limits.frames}")
    return int(value)


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
