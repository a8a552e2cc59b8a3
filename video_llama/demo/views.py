"""The conversation and its files as messages, HTML and JSON; every name and text in the HTML is escaped."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from video_llama.demo.session import Session, SessionFile
from video_llama.inference.chat import Upload

__all__ = [
    "NOTHING_YET",
    "conversation_json",
    "describe_file",
    "is_last_question",
    "media_panel",
    "messages",
    "notice",
    "shown_text",
    "summary",
]

NOTHING_YET = (
    '<div class="vl-empty"><strong>No files yet</strong>'
    "<span>Drop in a video, an image or a sound, or try an example.</span></div>"
)
_THUMBNAIL_SIZE, _PREVIEW_SIZE = 112, 224
_SPECTRUM = np.array([(10, 12, 40), (72, 28, 110), (190, 55, 85), (250, 150, 45), (252, 250, 190)], dtype=float)


def notice(text: str = "", kind: str = "info") -> str:
    """Return the line above the conversation: `kind` is "info", "busy" or "error"; nothing for an empty text."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="vl-notice vl-{kind}" role="{role}">{escape(text)}</div>'


def summary(upload: Upload) -> str:
    """Return in a few words what the model gets of a file."""
    audio = upload.sound
    if upload.audio is not None:
        segments = _counted(len(upload.audio.start_seconds), "segment")
        audio = f"{upload.audio.duration_seconds:.1f} s of audio, in {segments}"
    if upload.frames is None:
        return audio
    if upload.frames.kind == "image":
        return "one image"
    return f"{_counted(len(upload.frames.times_seconds), 'frame')} seen, {audio}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def messages(session: Session | None) -> list[dict[str, Any]]:
    """Return the conversation as messages of a chat window; files are messages of the assistant."""
    if session is None:
        return []
    found: list[dict[str, Any]] = []
    for turn in session.turns:
        for upload in turn.uploads:
            file = session.file(upload)
            title = {"title": f"{file.kind.capitalize()}: {escape(file.name)}"}
            found.append({"role": "assistant", "content": shown_text(summary(upload)), "metadata": title})
        if turn.question is not None:
            found.append({"role": "user", "content": shown_text(turn.question)})
        if turn.answer is not None:
            found.append({"role": "assistant", "content": shown_text(turn.answer or "(no answer)")})
    return found


def is_last_question(session: Session, index: Any) -> bool:
    """Return whether a message is the last one of the user's, by its number."""
    users = [number for number, message in enumerate(messages(session)) if message["role"] == "user"]
    return users[-1:] == [index]


def shown_text(text: str) -> str:
    """Return a text for the chat window, which would take what looks like HTML for HTML."""
    return escape(text, quote=False)


def conversation_json(session: Session | None) -> str:
    """Return the conversation with what the model got of its files, as indented JSON."""
    turns = []
    if session is not None:
        for turn in session.turns:
            media = [describe_file(session.file(upload)) for upload in turn.uploads]
            turns.append({"media": media, "question": turn.question, "answer": turn.answer})
    return json.dumps({"turns": turns}, indent=2, ensure_ascii=False)


def describe_file(file: SessionFile) -> dict[str, Any]:
    """Return what the model got of one file, for programs."""
    upload = file.upload
    described: dict[str, Any] = {"name": file.name, "kind": file.kind, "sound": upload.sound}
    if upload.frames is not None:
        described["frame_seconds"] = [round(seconds, 3) for seconds in upload.frames.times_seconds]
        described["frame_shares"] = [round(share, 4) for share in file.frame_shares]
    if upload.audio is not None:
        described["segment_seconds"] = [round(seconds, 3) for seconds in upload.audio.start_seconds]
        described["segment_shares"] = [round(share, 4) for share in file.segment_shares]
    return described


def media_panel(session: Session | None) -> str:
    """Return a card for every file of the conversation, the latest first."""
    if session is None or not session.media:
        return NOTHING_YET
    return "".join(_card(file) for file in reversed(session.media))


def _card(file: SessionFile) -> str:
    frames, audio, name = file.upload.frames, file.upload.audio, escape(file.name)
    strips = ""
    # A still image has no times: its one frame got all the attention.
    if frames is not None and frames.times_seconds:
        images = [_data_url(frame, "JPEG") for frame in frames.frames]
        cells = zip(images, frames.times_seconds, file.frame_shares, strict=True)
        strips += _strip("Frame", "Frames the model saw", [*cells], not _is_gif(file))
    if audio is not None:
        values = audio.values[:, 0].float().numpy()
        # One colour scale for all segments, so that they can be compared.
        low, high = float(values.min()), float(values.max())
        images = [_data_url(spectrum_image(segment, low, high), "PNG") for segment in values]
        cells = zip(images, audio.start_seconds, file.segment_shares, strict=True)
        strips += _strip("Sound", "Audio the model got", [*cells], not _is_gif(file))
    return (
        f'<section class="vl-card" aria-label="{name}"><header><strong>{name}</strong>'
        f"<span>{escape(summary(file.upload))}</span></header>{_player(file)}{strips}</section>"
    )


def _is_gif(file: SessionFile) -> bool:
    return file.kind != "audio" and Path(file.name).suffix.lower() == ".gif"


def _player(file: SessionFile) -> str:
    """Return a player of the file; page.js replaces one that the browser cannot show by a line or `data-seen`."""
    source, name = f"gradio_api/file={quote(str(file.path))}", escape(file.name)
    if file.upload.frames is not None and (file.kind == "image" or _is_gif(file)):
        seen = _data_url(file.upload.frames.frames[0], "JPEG", _PREVIEW_SIZE)
        return f'<img class="vl-player" src="{source}" alt="{name}" data-seen="{seen}">'
    attributes = f'class="vl-player" src="{source}" controls preload="metadata" aria-label="{name}"'
    return f"<{file.kind} {attributes}></{file.kind}>"


def _strip(what: str, title: str, parts: list[tuple[str, float, float]], is_seekable: bool) -> str:
    """Return a row of cells, one for each image with its time and its share of the attention."""
    highest = max(share for _, _, share in parts)
    cells = [_cell(image, seconds, share, highest, what, is_seekable) for image, seconds, share in parts]
    hint = "bars: share of attention"
    if is_seekable:
        hint += '<span class="vl-seek">; click to go there</span>'
    return (
        f'<div class="vl-strip-title"><span>{title}</span><small>{hint}</small></div>'
        f'<div class="vl-strip">{"".join(cells)}</div>'
    )


def _cell(image: str, seconds: float, share: float, highest: float, what: str, is_seekable: bool = True) -> str:
    label = f"{what} at {seconds:.1f} seconds, {share:.0%} of the attention"
    height = round(100 * share / (highest or 1))
    return (
        f'<button type="button" class="vl-cell" data-seconds="{seconds:.3f}" aria-label="{label}" title="{label}"'
        f"{' disabled' * (not is_seekable)}>"
        f'<span class="vl-bar"><i style="height:{height}%"></i></span><img src="{image}" alt="">'
        f"<span>{clock(seconds)}</span><small>{share:.0%}</small></button>"
    )


def clock(seconds: float) -> str:
    """Return a time as players write it: 0:07.5, 1:02:03.0."""
    # Round first, so that 59.96 seconds become 1:00.0 and not 0:60.0.
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:04.1f}"
    return f"{minutes}:{rest:04.1f}"


def spectrum_image(segment: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Return log-mel values (mel_bins, mel_frames) from `low` to `high` as colours, low frequencies at the bottom."""
    # Map the values to places in the colour table, then blend the two nearest colours of each place.
    scaled = (segment[::-1] - low) / max(high - low, 1e-6) * (len(_SPECTRUM) - 1)
    steps = np.arange(len(_SPECTRUM))
    channels = [np.interp(scaled, steps, _SPECTRUM[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _data_url(pixels: NDArray[np.uint8], format: str, size: int = _THUMBNAIL_SIZE) -> str:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((size, size))
    image.save(buffer, format=format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
