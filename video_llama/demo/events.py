"""Handle the events of the page, and offer the named endpoints for scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from html import escape, unescape
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.demo import views
from video_llama.demo.limits import answer_options, check_num_frames
from video_llama.demo.page import Page
from video_llama.demo.session import Session
from video_llama.demo.sessions import Sessions
from video_llama.errors import VideoLlamaError

__all__ = ["Endpoints", "Events", "build_blocks"]

Changes = dict[Any, Any]
# Requests that may wait; more are refused.
QUEUE_SIZE = 64
DOING = {"decoding": "Decoding {} …", "encoding": "Encoding the frames and the audio of {} …"}


def build_blocks(sessions: Sessions, title: str = "", concurrency: int = 1) -> gr.Blocks:
    """Return the page with its handlers and the endpoints, ready to be launched.

    Args:
        sessions: the conversations.
        title: the name of the model.
        concurrency: how many requests are processed at once; the model computes one at a time.
    """
    work = {"concurrency_id": "model", "concurrency_limit": concurrency}
    with _Blocks(title="Video-LLaMA", analytics_enabled=False, fill_width=True) as blocks:
        # First, so that they get the names that handlers of the page have as well.
        Endpoints(sessions).connect(work)
        page = Page(title, sessions.limits, sessions.defaults)
        events = Events(page, sessions)
        events.connect(work)
        shown = [page.notice, page.listen, page.num_frames]
        blocks.load(events.load, None, shown, concurrency_limit=None, show_progress="hidden", api_visibility="private")
        blocks.unload(events.leave)
    return blocks.queue(max_size=QUEUE_SIZE)


class _Blocks(gr.Blocks):
    """Gradio's page, which says to scripts what their calls lack; Gradio says so in the log alone."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        needed = len(block_fn.inputs)
        if len(inputs) < needed:
            name = block_fn.api_name or block_fn.name
            raise gr.Error(f"{name} takes {needed} values, but {len(inputs)} were sent", print_exception=False)


class Events:
    """The handlers of the page. They yield or return the components that change.

    `settings` are the values of `Page.answer_settings`.
    """

    def __init__(self, page: Page, sessions: Sessions) -> None:
        self.page, self.sessions = page, sessions

    def connect(self, work: dict[str, Any]) -> None:
        """Connect the handlers with the components; `work` limits those that compute."""
        page = self.page
        slow: Callable[..., Any] = partial(self._on, **work)
        reading, answering = [page.num_frames, page.listen], page.answer_settings
        slow(page.upload.upload, self.add_file, [page.upload, *reading])
        slow(page.webcam.stop_recording, self.add_file, [page.webcam, *reading])
        slow(page.microphone.stop_recording, self.add_file, [page.microphone, *reading])
        for button, path, question in page.examples:
            slow(button.click, self.sample_handler(path, question), [*reading, *answering])
        slow(page.question.submit, self.ask, [page.question, *answering])
        slow(page.send.click, self.ask, [page.question, *answering])
        slow(page.retry.click, self.retry, answering)
        slow(page.chatbot.edit, self.edit, answering)
        quick = partial(self._on, queue=False)
        quick(page.undo.click, self.undo)
        quick(page.stop.click, self.stop)
        for clear in (page.clear.click, page.chatbot.clear):
            cleared = quick(clear, self.clear)
            # The last words of a stopped answer may reach the page after the reply to this.
            quick(cleared.then, self.show_again)
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        saving = page.save.click(self.save, None, page.exported, queue=False, **hidden)
        saving.then(None, page.exported, None, js="(text) => saveConversation(text)", api_visibility="private")

    def _on(self, event: Any, handler: Any, inputs: list[Any] | None = None, **settings: Any) -> Any:
        settings |= {"preprocess": False, "show_progress": "minimal", "show_progress_on": self.page.notice}
        return event(handler, inputs, self.page.changing, api_visibility="private", trigger_mode="once", **settings)

    def load(self) -> Iterator[Changes]:
        """Show how long the model has been loading, until it is there; then what it can do."""
        page, started = self.page, time.monotonic()
        # Each item that is yielded updates the page, so a visitor sees the seconds while the model loads.
        while not wait([self.sessions.model], timeout=1.0).done:
            yield {page.notice: views.notice(f"Loading the model … {time.monotonic() - started:.0f} s", "busy")}
        try:
            model = self.sessions.model.result()
        except VideoLlamaError:
            yield {page.notice: views.notice("The model could not be loaded; the terminal says why.", "error")}
            return
        defaults, model_frames = self.sessions.defaults, model.processor.media_processor.num_frames
        listen = gr.Checkbox(interactive=model.has_audio, value=model.has_audio and defaults.listen)
        yield {page.notice: "", page.listen: listen, page.num_frames: defaults.num_frames or model_frames}

    def leave(self, request: gr.Request) -> None:
        """Free the session of a page that was closed."""
        self.sessions.end(request.session_hash)

    def add_file(self, request: gr.Request, data: Any, frames: Any, listen: Any) -> Iterator[Changes]:
        """Add an upload or a recording to the conversation."""
        try:
            path, name = self.sessions.uploads.find(data)
            yield from self._add(path, name, frames, listen, request)
        except VideoLlamaError as error:
            yield self._failure(error) | self._emptied()

    def sample_handler(self, path: Path, question: str) -> Callable[..., Iterator[Changes]]:
        """Return the handler that adds one file of the examples, unless it is there already, and asks its question."""

        def ask_about_sample(request: gr.Request, frames: Any, listen: Any, *settings: Any) -> Iterator[Changes]:
            session = self._find(request)
            try:
                if session is None or path not in [file.source for file in session.media]:
                    yield from self._add(path, path.name, frames, listen, request)
            except VideoLlamaError as error:
                yield self._failure(error)
                return
            yield from self._answer(request, settings, question)

        return ask_about_sample

    def ask(self, request: gr.Request, question: Any, *settings: Any) -> Iterator[Changes]:
        """Ask the question in the text field."""
        yield from self._answer(request, settings, str(question or ""))

    def retry(self, request: gr.Request, *settings: Any) -> Iterator[Changes]:
        """Answer the last question again."""
        yield from self._answer(request, settings, None, is_retry=True)

    def edit(self, request: gr.Request, edited: gr.EditData, *settings: Any) -> Iterator[Changes]:
        """Put the last question in other words."""
        session = self._find(request)
        if session is None or not views.is_last_question(session, edited.index):
            reason = "Only your last question can be edited; undo newer ones first."
            yield self._refresh(session) | {self.page.notice: views.notice(reason, "error")}
            return
        yield from self._answer(request, settings, unescape(str(edited.value)), is_retry=True)

    def undo(self, request: gr.Request) -> Changes:
        """Take back the last question, which returns to the text field, or else the last file."""
        session = self._find(request)
        try:
            question = session.undo() if session is not None else ""
        except VideoLlamaError as error:
            return self._failure(error)
        changes = self._refresh(session)
        if question:
            changes[self.page.question] = question
        return changes

    def clear(self, request: gr.Request) -> Changes:
        """Forget the conversation and its files."""
        session = self._find(request)
        try:
            if session is not None:
                session.clear()
        except VideoLlamaError as error:
            return self._failure(error)
        return self._refresh(session) | {self.page.question: ""}

    def show_again(self, request: gr.Request) -> Changes:
        """Show the conversation as it is a moment later."""
        time.sleep(0.5)
        session = self._find(request)
        return {} if session is not None and session.busy else self._refresh(session)

    def stop(self, request: gr.Request) -> Changes:
        """End the answer after its current token."""
        session = self._find(request)
        if session is not None:
            session.stop()
        return {self.page.notice: ""}

    def save(self, request: gr.Request) -> str:
        """Return the conversation as JSON."""
        return views.conversation_json(self._find(request))

    def _find(self, request: gr.Request) -> Session | None:
        return self.sessions.find(request.session_hash)

    def _add(self, path: Path, name: str, frames: Any, listen: Any, request: gr.Request) -> Iterator[Changes]:
        num_frames = check_num_frames(frames, self.sessions.limits) or self.sessions.defaults.num_frames
        session = self.sessions.get(request.session_hash)
        for step in session.adding(path, name, num_frames=num_frames, listen=bool(listen)):
            if isinstance(step, str):
                yield {self.page.notice: views.notice(DOING[step].format(name), "busy")}
            else:
                ready = views.notice(f"{name}: {views.summary(step.upload)}. Ask about it.")
                yield self._refresh(session) | self._emptied() | {self.page.notice: ready}

    def _answer(
        self, request: gr.Request, settings: tuple[Any, ...], question: str | None, is_retry: bool = False
    ) -> Iterator[Changes]:
        page, session = self.page, None
        idle = self._answering(False)
        try:
            options = answer_options(settings, self.sessions.limits, self.sessions.defaults.options)
            session = self.sessions.get(request.session_hash)
            # A visitor may clear the conversation while this answer runs; what comes after that must not be shown.
            times_cleared = session.times_cleared
            texts = session.retry(question, **options) if is_retry else session.ask(question or "", **options)
            yield {page.notice: views.notice("Reading the question …", "busy")} | self._answering(True)
            # The first piece of text also removes the notice and empties the text field.
            first = {page.notice: ""} if is_retry else {page.notice: "", page.question: ""}
            for text in texts:
                # Once it was cleared, the page shows an empty conversation.
                if session.times_cleared == times_cleared:
                    answer = {"role": "assistant", "content": views.shown_text(text) or "…"}
                    yield {page.chatbot: [*views.messages(session), answer]} | first
                    first = {}
        except VideoLlamaError as error:
            yield self._failure(error, session) | idle
            return
        # After a clear the page is up to date, so only the buttons change back.
        yield idle if session.times_cleared != times_cleared else self._refresh(session) | idle

    def _answering(self, is_so: bool) -> Changes:
        """Return the state of the buttons: a running answer can be stopped, and no other request can be started."""
        page = self.page
        changes: Changes = {button: gr.Button(interactive=not is_so) for button in [page.retry, *page.example_buttons]}
        return changes | {page.send: gr.Button(visible=not is_so), page.stop: gr.Button(visible=is_so)}

    def _refresh(self, session: Session | None) -> Changes:
        page = self.page
        return {page.chatbot: views.messages(session), page.panel: views.media_panel(session), page.notice: ""}

    def _failure(self, error: VideoLlamaError, session: Session | None = None) -> Changes:
        text = str(error)
        # Not a file name.
        if ":" not in text.split(" ")[0]:
            text = text[:1].upper() + text[1:]
        changes: Changes = {self.page.notice: views.notice(text, "error")}
        if session is not None and not session.busy:
            changes[self.page.chatbot] = views.messages(session)
        return changes

    def _emptied(self) -> Changes:
        return {self.page.upload: None, self.page.webcam: None, self.page.microphone: None}


class Endpoints:
    """Endpoints for scripts; each client has its own conversation. docs/demo.md shows them with gradio_client."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

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
            return views.describe_file(session.add(path, name, num_frames=num_frames, listen=listen))

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
        return views.conversation_json(self.sessions.find(request.session_hash))

    def _options(self, *settings: Any) -> dict[str, Any]:
        return answer_options(settings, self.sessions.limits, self.sessions.defaults.options)


@contextmanager
def _refusals() -> Iterator[None]:
    """Let bad input reach the caller of an endpoint as an error of Gradio's, its text escaped."""
    try:
        yield
    except VideoLlamaError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from error
