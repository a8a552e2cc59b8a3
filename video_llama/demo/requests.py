"""What comes from a visitor, checked: uploaded files, settings, and requests as a whole."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.demo.limits import Limits
from video_llama.errors import VideoLlamaError
from video_llama.model.generation import GenerationOptions

__all__ = ["RequestGuard", "answer_options", "num_frames", "uploaded_file"]

MAX_BEAMS = 8
_FORM_BYTES = 1_000_000  # of a request beside the file in it

Message = MutableMapping[str, Any]


def uploaded_file(data: Any, folder: str | os.PathLike[str]) -> tuple[Path, str]:
    """The place of an uploaded file and the name its owner gave it.

    Args:
        data: what the browser or the client says about the file.
        folder: where the server puts uploads; nothing else is read.

    Raises:
        VideoLlamaError: there is no file, or it is not one that was uploaded.
    """
    if isinstance(data, (list, tuple)) and len(data) == 1:
        data = data[0]
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        raise VideoLlamaError("no file was uploaded")
    path = Path(data["path"]).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise VideoLlamaError("only files that were uploaded can be read")
    name = data.get("orig_name") or path.name
    return path, Path(str(name)).name[:200] or path.name


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
    """Refuses requests that are too large, before they are read, and the server's proxy for other addresses.

    Args:
        app: the web application (ASGI) behind it.
        upload_bytes: largest upload.
    """

    app: Callable[..., Awaitable[None]]
    upload_bytes: int

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length, most = headers.get(b"content-length", b"0"), self.upload_bytes + _FORM_BYTES
        if not length.isdigit() or int(length) > most:
            await _refuse(send, 413, b"The upload is too large.")
        elif "/file=http:" in scope["path"].lower() or "/file=https:" in scope["path"].lower():
            await _refuse(send, 403, b"Only uploaded files are served.")
        else:
            await self.app(scope, _counted(receive, most), send)


def _counted(receive: Callable[[], Awaitable[Message]], most: int) -> Callable[[], Awaitable[Message]]:
    """`receive` that hangs up on a body larger than it may be, whatever its headers say."""
    total = 0

    async def count() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        return message if total <= most else {"type": "http.disconnect"}

    return count


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
