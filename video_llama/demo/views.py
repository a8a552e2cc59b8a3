"""The files of a conversation as HTML: what the model gets of them; every name and text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from video_llama.demo.session import Session, SessionFile
from video_llama.demo.strings import Texts
from video_llama.inference.chat import Upload

__all__ = ["clock", "image_url", "is_gif", "media_panel", "notice", "summary", "thumbnail"]

_THUMBNAIL_SIZE, _PREVIEW_SIZE = 112, 224
_SPECTRUM = np.array([(10, 12, 40), (72, 28, 110), (190, 55, 85), (250, 150, 45), (252, 250, 190)], dtype=float)
# Phrases of `Upload.sound` that the page has in all languages; others are shown as they are.
_AUDIO_STATES = {
    "no sound track": "no_audio_track",
    "not listened to": "audio_unused",
    "the model has no audio branch": "no_audio_branch",
}
# Each file's small image is made once, and goes with the file.
_THUMBNAILS: WeakKeyDictionary[SessionFile, str] = WeakKeyDictionary()


def notice(text: str = "", kind: str = "info") -> str:
    """Return the line above the composer: `kind` is "info", "busy" or "error"; nothing for an empty text."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="vl-notice vl-{kind}" role="{role}">{escape(text)}</div>'


def summary(upload: Upload, texts: Texts) -> str:
    """Return in a few words what the model gets of a file."""
    audio = upload.sound
    if audio in _AUDIO_STATES:
        audio = texts(_AUDIO_STATES[audio])
    if upload.audio is not None:
        segments, seconds = len(upload.audio.start_seconds), upload.audio.duration_seconds
        audio = texts("audio_segments", segments, seconds=f"{seconds:.1f}")
        if upload.has_all_audio:
            audio = texts("all_audio", seconds=f"{seconds:.1f}")
    if upload.frames is None:
        return audio
    if upload.frames.kind == "image":
        return texts("one_image")
    return f"{texts('frames_seen', len(upload.frames.times_seconds))}, {audio}"


def thumbnail(file: SessionFile) -> str:
    """Return the address of a small image of a file: its first frame, or the spectrum of its first audio segment."""
    if file not in _THUMBNAILS:
        frames, audio = file.upload.frames, file.upload.audio
        if frames is not None:
            _THUMBNAILS[file] = image_url(frames.frames[0])
        else:
            assert audio is not None
            _THUMBNAILS[file] = _spectra(audio.values[:1, 0].float().numpy())[0]
    return _THUMBNAILS[file]


def media_panel(session: Session | None, texts: Texts) -> str:
    """Return the viewer: a card for every file, of which page.js shows one, and a row of tabs to choose it."""
    files = session.media if session is not None else []
    if not files:
        return ""
    last = files[-1]
    tabs = "".join(_tab(file, file is last) for file in files)
    cards = "".join(_card(file, file is last, texts) for file in files)
    fold = f'<button type="button" class="vl-fold" data-action="fold" aria-label="{texts("fold")}">⌃</button>'
    rail = f'<div class="vl-tabs" role="tablist" aria-label="{texts("files")}">{tabs}</div>'
    return f'<div class="vl-rail">{rail}{fold}</div>{cards}'


def _tab(file: SessionFile, is_shown: bool) -> str:
    selected, index = ("true", 0) if is_shown else ("false", -1)
    return (
        f'<button type="button" class="vl-tab" role="tab" id="vl-tab-{file.key}" aria-controls="vl-card-{file.key}" '
        f'aria-selected="{selected}" tabindex="{index}" data-action="open" data-file="{file.key}">'
        f'<img src="{thumbnail(file)}" alt=""><span>{escape(file.name)}</span></button>'
    )


def _card(file: SessionFile, is_shown: bool, texts: Texts) -> str:
    frames, audio, name = file.upload.frames, file.upload.audio, escape(file.name)
    strips = ""
    # A still image has no times: its one frame got all the attention.
    if frames is not None and frames.times_seconds:
        images = [image_url(frame) for frame in frames.frames]
        cells = zip(images, frames.times_seconds, _shares(file.frame_shares, images), strict=True)
        strips += _strip("frame", [*cells], not is_gif(file), texts)
    if audio is not None:
        images = _spectra(audio.values[:, 0].float().numpy())
        cells = zip(images, audio.start_seconds, _shares(file.segment_shares, images), strict=True)
        strips += _strip("audio", [*cells], not is_gif(file), texts)
    return (
        f'<section class="vl-card" role="tabpanel" id="vl-card-{file.key}" aria-labelledby="vl-tab-{file.key}" '
        f'data-file="{file.key}"{" hidden" * (not is_shown)}><header><strong>{name}</strong>'
        f"<span>{escape(summary(file.upload, texts))}</span></header>{_player(file, texts)}{strips}</section>"
    )


def _shares(shares: Sequence[float], images: Sequence[str]) -> list[float | None]:
    """Return the shares of the attention; None for each image where a connector has no attention."""
    return [*shares] or [None] * len(images)


def is_gif(file: SessionFile) -> bool:
    """Return whether a file is an animation: browsers play it, but cannot go to a time in it."""
    return file.kind != "audio" and Path(file.name).suffix.lower() == ".gif"


def _player(file: SessionFile, texts: Texts) -> str:
    """Return a player of the file; page.js replaces one that the browser cannot show by a line or `data-seen`."""
    source, name = f"gradio_api/file={quote(str(file.path))}", escape(file.name)
    if file.upload.frames is not None and (file.kind == "image" or is_gif(file)):
        seen = image_url(file.upload.frames.frames[0], "JPEG", _PREVIEW_SIZE)
        return f'<img class="vl-player" src="{source}" alt="{name}" data-seen="{seen}">'
    instead = texts("unplayable_audio" if file.kind == "audio" else "unplayable_video")
    attributes = f'class="vl-player" src="{source}" controls preload="metadata" aria-label="{name}"'
    return f'<{file.kind} {attributes} data-instead="{instead}"></{file.kind}>'


def _strip(kind: str, parts: list[tuple[str, float, float | None]], is_seekable: bool, texts: Texts) -> str:
    """Return a row of cells, one for each image with its time and its share of the attention."""
    highest = max(share or 0.0 for _, _, share in parts)
    cells = [_cell(image, seconds, share, highest, kind, texts, is_seekable) for image, seconds, share in parts]
    title, hint = texts("frames_title" if kind == "frame" else "audio_title"), ""
    if highest:
        hint = texts("bars")
    if is_seekable:
        hint += f'<span class="vl-seek">; {texts("seek")}</span>'
    return (
        f'<div class="vl-strip-title"><span>{title}</span><small>{hint}</small></div>'
        f'<div class="vl-strip" role="group" aria-label="{title}">{"".join(cells)}</div>'
    )


def _cell(
    image: str, seconds: float, share: float | None, highest: float, kind: str, texts: Texts, is_seekable: bool = True
) -> str:
    label, bar, percent = clock(seconds), "", ""
    if share is not None:
        label = texts(f"{kind}_at", seconds=f"{seconds:.1f}", share=f"{100 * share:.0f}")
        height = round(100 * share / (highest or 1))
        bar, percent = f'<span class="vl-bar"><i style="height:{height}%"></i></span>', f"<small>{share:.0%}</small>"
    return (
        f'<button type="button" class="vl-cell" data-seconds="{seconds:.3f}" aria-label="{label}" title="{label}"'
        f"{' disabled' * (not is_seekable)}>"
        f'{bar}<img src="{image}" alt=""><span>{clock(seconds)}</span>{percent}</button>'
    )


def _spectra(values: NDArray[np.float32]) -> list[str]:
    # One colour scale for all segments, so that they can be compared.
    low, high = float(np.min(values)), float(np.max(values))
    return [image_url(spectrum_image(segment, low, high), "PNG") for segment in values]


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


def image_url(pixels: NDArray[np.uint8], format: str = "JPEG", size: int = _THUMBNAIL_SIZE) -> str:
    """Return an image as an address that has it inside, at most `size` pixels wide and high."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((size, size))
    image.save(buffer, format=format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
