"""What the model saw and heard, as HTML; every name and text in it is escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from video_llama.demo.session import MediaItem, Session
from video_llama.inference.chat import Upload

__all__ = [
    "NOTHING_YET",
    "conversation_json",
    "describe_item",
    "media_panel",
    "messages",
    "notice",
    "shown_text",
    "summary",
    "turn_of_message",
    "typed_text",
]

NOTHING_YET = (
    '<div class="vl-empty"><strong>Nothing seen or heard yet</strong>'
    "<span>Drop in a video, an image or a sound, or try an example.</span></div>"
)
_THUMBNAIL = 112
_PREVIEW = 224
_SPECTRUM = np.array([(10, 12, 40), (72, 28, 110), (190, 55, 85), (250, 150, 45), (252, 250, 190)], dtype=float)


def notice(text: str = "", kind: str = "info") -> str:
    """The line above the conversation: `kind` is "info", "busy" or "error"; nothing for an empty text."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="vl-notice vl-{kind}" role="{role}">{escape(text)}</div>'


def summary(upload: Upload) -> str:
    """In a few words what the model took from a file."""
    heard = upload.sound
    if upload.audio is not None:
        count = len(upload.audio.start_seconds)
        heard = f"{upload.audio.duration_seconds:.1f} s of sound heard, in {count} segment{'s' * (count > 1)}"
    if upload.frames is None:
        return heard
    if upload.frames.kind == "image":
        return "one image"
    count = len(upload.frames.times_seconds)
    return f"{count} frame{'s' * (count > 1)} seen, {heard}"


def messages(session: Session | None) -> list[dict[str, Any]]:
    """The conversation as messages of a chat window; what came of a file is said by the assistant."""
    return [message for _, message in _numbered_messages(session)]


def turn_of_message(session: Session, index: int) -> int:
    """The number of the turn whose question stands in a message; -1 if it is no question."""
    numbered = _numbered_messages(session)
    if not 0 <= index < len(numbered):
        return -1
    number, message = numbered[index]
    return number if message["role"] == "user" else -1


def _numbered_messages(session: Session | None) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, turn in enumerate(session.turns if session is not None else []):
        for upload in turn.uploads:
            item = session.item(upload) if session is not None else None
            title = f"{item.kind.capitalize()}: {escape(item.name)}" if item is not None else ""
            found.append((number, _message("assistant", summary(upload), {"title": title})))
        if turn.question is not None:
            found.append((number, _message("user", turn.question)))
        if turn.answer is not None:
            found.append((number, _message("assistant", turn.answer or "(no answer)")))
    return found


def _message(role: str, content: str, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    return {"role": role, "content": shown_text(content), "metadata": metadata}


def shown_text(text: str) -> str:
    """Text for the chat window, which would take what looks like HTML for HTML."""
    return escape(text, quote=False)


def typed_text(shown: str) -> str:
    """What a person typed, from what the chat window shows of it."""
    return unescape(shown)


def conversation_json(session: Session | None) -> str:
    """The conversation with what was seen and heard, as indented JSON."""
    turns = []
    for turn in session.turns if session is not None else []:
        media = [describe_item(session.item(upload)) for upload in turn.uploads] if session is not None else []
        turns.append({"media": media, "question": turn.question, "answer": turn.answer})
    return json.dumps({"turns": turns}, indent=2, ensure_ascii=False)


def describe_item(item: MediaItem) -> dict[str, Any]:
    """What was seen and heard of one file, for programs."""
    upload = item.upload
    described: dict[str, Any] = {"name": item.name, "kind": item.kind, "sound": item.upload.sound}
    if upload.frames is not None:
        described["frame_seconds"] = [round(seconds, 3) for seconds in upload.frames.times_seconds]
        described["frame_shares"] = [round(share, 4) for share in item.frame_shares]
    if upload.audio is not None:
        described["segment_seconds"] = [round(seconds, 3) for seconds in upload.audio.start_seconds]
        described["segment_shares"] = [round(share, 4) for share in item.segment_shares]
    return described


def media_panel(session: Session | None) -> str:
    """A card for every file of the conversation, the latest first."""
    if session is None or not session.media:
        return NOTHING_YET
    return "".join(_card(item) for item in reversed(session.media))


def _card(item: MediaItem) -> str:
    upload, strips, seekable = item.upload, "", not _is_gif(item)
    if upload.frames is not None:
        strips += _frame_strip(upload.frames.frames, upload.frames.times_seconds, item.frame_shares, seekable)
    if upload.audio is not None:
        values = upload.audio.values[:, 0].float().numpy()
        strips += _sound_strip(values, upload.audio.start_seconds, item.segment_shares, seekable)
    name = escape(item.name)
    return (
        f'<section class="vl-card" aria-label="{name}"><header><strong>{name}</strong>'
        f"<span>{escape(summary(upload))}</span></header>{_player(item)}{strips}</section>"
    )


def _is_gif(item: MediaItem) -> bool:
    return item.kind != "audio" and Path(item.name).suffix.lower() == ".gif"


def _player(item: MediaItem) -> str:
    """The file itself; page.js puts a line, or what `data-seen` holds, in its place where a browser cannot show it."""
    source, name = f"gradio_api/file={quote(str(item.path))}", escape(item.name)
    if item.kind == "image" or _is_gif(item):
        frames = item.upload.frames
        seen = _picture(frames.frames[0], "JPEG", _PREVIEW) if frames is not None else ""
        return f'<img class="vl-player" src="{source}" alt="{name}" data-seen="{seen}">'
    tag = "video" if item.kind == "video" else "audio"
    return f'<{tag} class="vl-player" src="{source}" controls preload="metadata" aria-label="{name}"></{tag}>'


def _frame_strip(frames: NDArray[np.uint8], times: Sequence[float], shares: Sequence[float], seekable: bool) -> str:
    if not times:  # a still image has one frame, which got all the attention
        return ""
    cells = [
        _cell(_picture(frame, "JPEG"), seconds, share, max(shares), "Frame", seekable)
        for frame, seconds, share in zip(frames, times, shares, strict=True)
    ]
    return _strip("Frames the model saw", cells, seekable)


def _sound_strip(values: NDArray[np.float32], starts: Sequence[float], shares: Sequence[float], seekable: bool) -> str:
    low, high = float(values.min()), float(values.max())
    cells = [
        _cell(_picture(spectrum_picture(segment, low, high), "PNG"), seconds, share, max(shares), "Sound", seekable)
        for segment, seconds, share in zip(values, starts, shares, strict=True)
    ]
    return _strip("Sound the model heard", cells, seekable)


def _strip(title: str, cells: Sequence[str], seekable: bool) -> str:
    hint = 'bars: share of attention<span class="vl-seek">; click to go there</span>'
    return (
        f'<div class="vl-strip-title"><span>{title}</span><small>'
        f"{hint if seekable else 'bars: share of attention'}</small></div>"
        f'<div class="vl-strip">{"".join(cells)}</div>'
    )


def _cell(picture: str, seconds: float, share: float, highest: float, what: str, seekable: bool = True) -> str:
    label = f"{what} at {seconds:.1f} seconds, {share:.0%} of the attention"
    height = round(100 * share / highest) if highest > 0 else 0
    return (
        f'<button type="button" class="vl-cell" data-seconds="{seconds:.3f}" aria-label="{label}" title="{label}"'
        f"{'' if seekable else ' disabled'}>"
        f'<span class="vl-bar"><i style="height:{height}%"></i></span><img src="{picture}" alt="">'
        f"<span>{clock(seconds)}</span><small>{share:.0%}</small></button>"
    )


def clock(seconds: float) -> str:
    """A time as players write it: 0:07.5, 1:02:03.0."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def spectrum_picture(segment: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Log-mel values (mel_bins, mel_frames) from `low` to `high` as colours, deep notes at the bottom."""
    scaled = (segment[::-1] - low) / max(high - low, 1e-6) * (len(_SPECTRUM) - 1)
    steps = np.arange(len(_SPECTRUM))
    channels = [np.interp(scaled, steps, _SPECTRUM[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _picture(pixels: NDArray[np.uint8], format: str, size: int = _THUMBNAIL) -> str:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((size, size))
    image.save(buffer, format=format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
