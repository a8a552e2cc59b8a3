"""The conversation as JSON, for programs, and as Markdown, for people."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from video_llama.demo.session import Session, SessionFile
from video_llama.demo.strings import Texts
from video_llama.demo.views import summary

__all__ = ["conversation_json", "conversation_markdown", "describe_file"]


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


def conversation_json(session: Session | None, model: str = "") -> str:
    """Return the conversation with its files, the model, the settings of each answer and the date, as indented JSON."""
    turns = []
    for turn in session.turns if session is not None else []:
        assert session is not None
        media = [describe_file(session.file(upload)) for upload in turn.uploads]
        settings = session.settings(turn)
        turns.append({"media": media, "question": turn.question, "answer": turn.answer, "settings": settings})
    exported = {"model": model, "date": _now(), "turns": turns}
    return json.dumps(exported, indent=2, ensure_ascii=False)


def conversation_markdown(session: Session | None, model: str, texts: Texts) -> str:
    """Return the conversation as Markdown; what people and the model wrote is quoted as it is."""
    title = texts("export_title", model=model or "Video-LLaMA")
    parts = [f"# {title}", f"{texts('export_date')}: {_now()}"]
    for turn in session.turns if session is not None else []:
        assert session is not None
        for upload in turn.uploads:
            parts.append(f"**{texts('export_file')}:** {_code(session.file(upload).name)} ({summary(upload, texts)})")
        if turn.question is not None:
            parts += [f"**{texts('export_question')}:**", _quoted(turn.question)]
        if turn.answer is not None:
            settings = ", ".join(f"{name}={value}" for name, value in session.settings(turn).items())
            parts += [f"**{texts('export_answer')}:**", _quoted(turn.answer or texts("no_answer"))]
            parts.append(f"<sub>{texts('export_settings')}: {_code(settings)}</sub>")
    return "\n\n".join(parts) + "\n"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _quoted(text: str) -> str:
    """Return a text as an indented block, in which Markdown and HTML mean nothing."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _code(text: str) -> str:
    # More backticks around it than it has itself.
    ticks = "`" * (1 + max((len(run) for run in text.replace("`", " `").split() if set(run) == {"`"}), default=0))
    while ticks in text:
        ticks += "`"
    return f"{ticks} {text} {ticks}"
