"""The named endpoints for scripts; docs/demo.md shows how to call them with gradio_client."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from video_llama.demo.requests import answer_options, num_frames
from video_llama.demo.session import Session
from video_llama.demo.sessions import Sessions
from video_llama.demo.views import conversation_json, describe_item
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions

__all__ = ["Endpoints"]


class Endpoints:
    """What scripts can call; each client has a conversation of its own.

    Args:
        sessions: the conversations, shared with the page.
        options: how answers are drawn where a call says nothing.
        concurrency: how many requests may be worked on at once.
    """

    def __init__(self, sessions: Sessions, options: GenerationOptions, concurrency: int = 1) -> None:
        self.sessions, self.options, self.concurrency = sessions, options, concurrency

    def connect(self) -> None:
        """Add the endpoints; call it while the page is being built."""
        for handler in (self.upload, self.ask, self.retry):
            gr.api(handler, concurrency_id="model", concurrency_limit=self.concurrency)
        for quick in (self.undo, self.clear, self.stop, self.export):
            gr.api(quick, queue=False)

    def upload(
        self, file: dict[str, Any], request: gr.Request, frames: int | None = None, listen: bool | None = None
    ) -> dict[str, Any]:
        """Show a video or an image, or play a sound; returns what was seen and heard."""
        try:
            path, name = self.sessions.uploads.find(file)
            session = self.sessions.get(request.session_hash)
            frames = num_frames(frames, self.sessions.limits)
            listen = self.sessions.listen if listen is None else listen
            if not isinstance(listen, bool):
                raise VideoLlamaError("listen must be true or false")
            return describe_item(session.add(path, name, num_frames=frames, listen=listen))
        except VideoLlamaError as error:
            raise _refusal(error) from error

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
        try:
            options = answer_options(
                (temperature, top_p, num_beams, max_new_tokens), self.sessions.limits, self.options
            )
            yield from self.sessions.get(request.session_hash).ask(question, **options)
        except VideoLlamaError as error:
            raise _refusal(error) from error

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
        try:
            options = answer_options(
                (temperature, top_p, num_beams, max_new_tokens), self.sessions.limits, self.options
            )
            yield from self.sessions.get(request.session_hash).retry(question, **options)
        except VideoLlamaError as error:
            raise _refusal(error) from error

    def undo(self, request: gr.Request) -> str:
        """Take back the last question and return it; without one, the last file."""
        session = self._find(request)
        try:
            return "" if session is None else session.undo()
        except VideoLlamaError as error:
            raise _refusal(error) from error

    def clear(self, request: gr.Request) -> bool:
        """Forget the conversation and its files."""
        session = self._find(request)
        try:
            if session is not None:
                session.clear()
        except VideoLlamaError as error:
            raise _refusal(error) from error
        return True

    def stop(self, request: gr.Request) -> bool:
        """End the answer that is being given."""
        session = self._find(request)
        if session is not None:
            session.stop()
        return session is not None

    def export(self, request: gr.Request) -> str:
        """The conversation as JSON text."""
        return conversation_json(self._find(request))

    def _find(self, request: gr.Request) -> Session | None:
        return self.sessions.find(request.session_hash)


def _refusal(error: VideoLlamaError) -> gr.Error:
    return gr.Error(escape(str(error), quote=False), print_exception=False)
