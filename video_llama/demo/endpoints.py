"""The named endpoints, for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from video_llama.demo.exports import conversation_json, describe_file
from video_llama.demo.limits import answer_options, check_num_frames
from video_llama.demo.sessions import Sessions
from video_llama.errors import VideoLlamaError

__all__ = ["Endpoints"]


class Endpoints:
    """Endpoints for scripts; each client has its own conversation. docs/demo.md shows them with gradio_client.

    Args:
        sessions: the conversations.
        title: the name of the model.
    """

    def __init__(self, sessions: Sessions, title: str = "") -> None:
        self.sessions, self.title = sessions, title

    def connect(self, work: dict[str, Any]) -> None:
        """Add the endpoints to the page that is being built; `work` limits those that compute."""
        for handler in (self.upload, self.ask, self.retry):
            gr.api(handler, **work)
        for quick in (self.undo, self.clear, self.stop, self.export):
            gr.api(quick, queue=False)

    def upload(
        self, file: dict[str, Any], request: gr.Request, frames: int | None = None, listen: bool | None = None
    ) -> dict[str, Any]:
        """Add a video, an image or an audio file; returns what the model gets of it."""
        defaults = self.sessions.defaults
        with _refusals():
            path, name = self.sessions.uploads.find(file)
            session = self.sessions.get(request.session_hash)
            num_frames = check_num_frames(frames, self.sessions.limits) or defaults.num_frames
            if listen is None:
                listen = defaults.listen
            if not isinstance(listen, bool):
                raise VideoLlamaError("listen must be true or false")
            return describe_file(session.add(path, name, num_frames=num_frames, listen=listen))

    def ask(
        self,
        question: str,
        request: gr.Request,
        temperature: float | None = None,
        top_p: float | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[str]:
        """Ask about the uploaded files; streams the answer so far, the last item is the whole."""
        with _refusals():
            options = self._options(temperature, top_p, num_beams, max_new_tokens)
            yield from self.sessions.get(request.session_hash).ask(question, **options)

    def retry(
        self,
        request: gr.Request,
        question: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[str]:
        """Answer the last question again, or another one in its place."""
        with _refusals():
            options = self._options(temperature, top_p, num_beams, max_new_tokens)
            yield from self.sessions.get(request.session_hash).retry(question, **options)

    def undo(self, request: gr.Request) -> str:
        """Take back the last question and return it; without one, the last file."""
        session = self.sessions.find(request.session_hash)
        with _refusals():
            return session.undo() if session is not None else ""

    def clear(self, request: gr.Request) -> bool:
        """Forget the conversation and its files."""
        session = self.sessions.find(request.session_hash)
        with _refusals():
            if session is not None:
                session.clear()
        return True

    def stop(self, request: gr.Request) -> bool:
        """End the answer that is being given; returns whether there is a conversation."""
        session = self.sessions.find(request.session_hash)
        if session is not None:
            session.stop()
        return session is not None

    def export(self, request: gr.Request) -> str:
        """Return the conversation as JSON text."""
        return conversation_json(self.sessions.find(request.session_hash), self.title)

    def _options(self, *settings: Any) -> dict[str, Any]:
        return answer_options(settings, self.sessions.limits, self.sessions.defaults.options)


@contextmanager
def _refusals() -> Iterator[None]:
    """Let bad input reach the caller of an endpoint as an error of Gradio's, its text escaped."""
    try:
        yield
    except VideoLlamaError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from error
