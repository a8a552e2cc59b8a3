"""Handle the events of the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.demo import chat_view, views
from video_llama.demo.endpoints import Endpoints
from video_llama.demo.exports import conversation_json, conversation_markdown
from video_llama.demo.limits import answer_options, check_num_frames
from video_llama.demo.page import EXAMPLES, PRESETS, Page
from video_llama.demo.session import Session, SessionFile
from video_llama.demo.sessions import Sessions
from video_llama.demo.strings import Texts, choose_language
from video_llama.errors import VideoLlamaError

__all__ = ["Events", "build_blocks"]

Changes = dict[Any, Any]
# Requests that may wait; more are refused.
QUEUE_SIZE = 64


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
        Endpoints(sessions, title).connect(work)
        page = Page(title, sessions.limits, sessions.defaults)
        events = Events(page, sessions, title)
        events.connect(work)
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        shown = [*page.changing, *page.translated]
        blocks.load(events.load, page.language, shown, js="() => vl.language", **hidden)
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

    page.js sends each event with its data, among it the language that the visitor chose. `settings` are the values of
    `Page.answer_settings`.
    """

    def __init__(self, page: Page, sessions: Sessions, title: str) -> None:
        self.page, self.sessions, self.title = page, sessions, title

    def connect(self, work: dict[str, Any]) -> None:
        """Connect the handlers with the components; `work` limits those that compute."""
        page, bridge = self.page, self.page.bridge
        slow: Callable[..., Any] = partial(self._on, **work)
        reading, answering = [page.num_frames, page.use_audio], page.answer_settings
        for event, handler, inputs in (
            (bridge.attach, self.attach, reading),
            (bridge.ask, self.ask, answering),
            (bridge.retry, self.retry, answering),
            (bridge.example, self.example, [*reading, *answering]),
        ):
            # The page sends its next request after this one, also where it failed.
            slow(event, handler, inputs).then(None, None, None, js="() => vl.done()", api_visibility="private")
        quick = partial(self._on, queue=False)
        quick(bridge.undo, self.undo)
        quick(bridge.remove, self.remove)
        cleared = quick(bridge.clear, self.clear)
        # The last words of a stopped answer may reach the page after the reply to this.
        quick(cleared.then, self.show_again, [page.language], js="() => vl.language")
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        bridge.stop(self.stop, None, None, **hidden)
        bridge.translate(self.translate, None, [*page.changing, *page.translated], **hidden)
        saving = bridge.save(self.save, None, page.exported, **hidden)
        saving.then(None, page.exported, None, js="(file) => vl.save(file)", api_visibility="private")
        # The browser sets the sliders; a slider that is moved by hand belongs to no preset.
        page.preset.input(None, page.preset, page.answer_settings[:3], js=_preset_script(), api_visibility="private")
        for slider in page.answer_settings[:3]:
            slider.release(None, None, page.preset, js="() => null", api_visibility="private")

    def _on(self, event: Any, handler: Any, inputs: list[Any] | None = None, **settings: Any) -> Any:
        settings |= {"preprocess": False, "show_progress": "minimal", "show_progress_on": self.page.notice}
        settings |= {"api_visibility": "private", "trigger_mode": "multiple"}
        return event(handler, inputs, self.page.changing, **settings)

    def load(self, request: gr.Request, language: Any) -> Iterator[Changes]:
        """Show the visitor's language; how long the model has been loading, until it is there; then what it can do."""
        page, started, texts = self.page, time.monotonic(), _texts(request, language)
        yield page.in_language(texts) | self._everything(None, texts)
        # Each item that is yielded updates the page, so a visitor sees the seconds while the model loads.
        while not wait([self.sessions.model], timeout=1.0).done:
            seconds = f"{time.monotonic() - started:.0f}"
            yield {page.notice: views.notice(texts("loading", seconds=seconds), "busy")}
        try:
            model = self.sessions.model.result()
        except VideoLlamaError:
            yield {page.notice: views.notice(texts("not_loaded"), "error")}
            return
        defaults, model_frames = self.sessions.defaults, model.processor.media_processor.num_frames
        use_audio = gr.Checkbox(interactive=model.has_audio, value=model.has_audio and defaults.listen)
        yield {page.notice: "", page.use_audio: use_audio, page.num_frames: defaults.num_frames or model_frames}

    def leave(self, request: gr.Request) -> None:
        """Free the session of a page that was closed."""
        self.sessions.end(request.session_hash)

    def translate(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Show the page in the language that the visitor chose."""
        texts = _texts(request, event)
        return self.page.in_language(texts) | self._everything(self._find(request), texts)

    def attach(self, request: gr.Request, event: gr.EventData, frames: Any, use_audio: Any) -> Iterator[Changes]:
        """Read uploads, which then wait for a question; one that cannot be read does not stop the others."""
        texts, failures, files = _texts(request, event), [], _field(event, "files")
        if not isinstance(files, list):
            files = [files]
        for data in files:
            try:
                path, name = self.sessions.uploads.find(data)
                yield from self._add(path, name, frames, use_audio, request, texts)
            except VideoLlamaError as error:
                failures.append(_sentence(error))
        session = self._find(request)
        changes: Changes = {self.page.chips: chat_view.attached(session, texts)}
        if failures:
            changes[self.page.notice] = views.notice("\n".join(failures), "error")
        yield changes

    def example(
        self, request: gr.Request, event: gr.EventData, frames: Any, use_audio: Any, *settings: Any
    ) -> Iterator[Changes]:
        """Begin a conversation about one of the examples, and ask its question."""
        texts, session, number = _texts(request, event), self._find(request), _field(event, "number")
        # Anybody may send anything: only the page sends the number of one.
        if not isinstance(number, int) or number not in range(len(EXAMPLES)):
            return
        path, question = EXAMPLES[number]
        try:
            # An answer about one example must not depend on those before it.
            if session is not None and session.turns:
                session.clear()
                yield self._everything(session, texts)
            yield from self._add(path, path.name, frames, use_audio, request, texts)
        except VideoLlamaError as error:
            yield self._failure(error, request, texts)
            return
        yield from self._answer(request, texts, settings, question)

    def ask(self, request: gr.Request, event: gr.EventData, *settings: Any) -> Iterator[Changes]:
        """Answer a question as it is being generated."""
        yield from self._answer(request, _texts(request, event), settings, _field(event, "question"))

    def retry(self, request: gr.Request, event: gr.EventData, *settings: Any) -> Iterator[Changes]:
        """Answer the last question again, or another one in its place."""
        question = _field(event, "question")
        yield from self._answer(request, _texts(request, event), settings, question, is_retry=True)

    def undo(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Take back the last question; page.js puts it into the text field again."""
        return self._change(request, event, lambda session: session.undo())

    def remove(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Take one file out of the conversation."""
        return self._change(request, event, lambda session: session.remove(str(_field(event, "file"))))

    def clear(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Forget the conversation and its files."""
        return self._change(request, event, lambda session: session.clear())

    def show_again(self, request: gr.Request, language: Any) -> Any:
        """Show the conversation as it is a moment later."""
        time.sleep(0.5)
        session = self._find(request)
        if session is not None and session.busy:
            return gr.skip()
        return self._everything(session, _texts(request, language))

    def stop(self, request: gr.Request) -> None:
        """End the answer after its current token."""
        session = self._find(request)
        if session is not None:
            session.stop()

    def save(self, request: gr.Request, event: gr.EventData) -> str:
        """Return name, type and text of a file with the conversation, as JSON."""
        session, texts = self._find(request), _texts(request, event)
        if _field(event, "format") == "markdown":
            text = conversation_markdown(session, self.title, texts)
            return json.dumps({"name": "conversation.md", "type": "text/markdown", "text": text})
        text = conversation_json(session, self.title)
        return json.dumps({"name": "conversation.json", "type": "application/json", "text": text})

    def _find(self, request: gr.Request) -> Session | None:
        return self.sessions.find(request.session_hash)

    def _change(self, request: gr.Request, event: gr.EventData, change: Callable[[Session], Any]) -> Changes:
        session, texts = self._find(request), _texts(request, event)
        try:
            if session is not None:
                change(session)
        except VideoLlamaError as error:
            return self._failure(error, request, texts)
        return self._everything(session, texts)

    def _add(
        self, path: Path, name: str, frames: Any, use_audio: Any, request: gr.Request, texts: Texts
    ) -> Iterator[Changes]:
        num_frames = check_num_frames(frames, self.sessions.limits) or self.sessions.defaults.num_frames
        page, session = self.page, self.sessions.get(request.session_hash)
        for step in session.adding(path, name, num_frames=num_frames, listen=bool(use_audio)):
            if isinstance(step, SessionFile):
                yield {page.chips: chat_view.attached(session, texts), page.panel: views.media_panel(session, texts)}
            else:
                busy = (name, texts(step, name=name))
                yield {page.chips: chat_view.attached(session, texts, busy), page.notice: ""}

    def _answer(
        self,
        request: gr.Request,
        texts: Texts,
        settings: tuple[Any, ...],
        question: Any,
        is_retry: bool = False,
    ) -> Iterator[Changes]:
        page = self.page
        try:
            options = answer_options(settings, self.sessions.limits, self.sessions.defaults.options)
            session = self.sessions.get(request.session_hash)
            # A visitor may clear the conversation while this answer runs; what comes after that must not be shown.
            times_cleared = session.times_cleared
            if is_retry:
                question = question or session.last_question().question
                answers = session.retry(question, **options)
            else:
                answers = session.ask(question, **options)
            question = self.sessions.limits.check_question(question)
            asked = chat_view.conversation(session, texts, EXAMPLES, question, is_retry)
            waiting = chat_view.progress_bubble(texts("reading"))
            yield {page.chat: asked, page.live: waiting, page.chips: "", page.notice: ""}
            for text in answers:
                # Once it was cleared, the page shows an empty conversation.
                if session.times_cleared == times_cleared:
                    bubble = waiting
                    if text:
                        bubble = chat_view.answer_bubble(text, texts)
                    yield {page.live: bubble}
        except VideoLlamaError as error:
            yield self._failure(error, request, texts)
            return
        # After a clear the page is up to date.
        if session.times_cleared == times_cleared:
            chat = chat_view.conversation(session, texts, EXAMPLES)
            yield {page.chat: chat, page.live: "", page.chips: chat_view.attached(session, texts)}

    def _everything(self, session: Session | None, texts: Texts) -> Changes:
        page = self.page
        return {
            page.chat: chat_view.conversation(session, texts, EXAMPLES),
            page.live: "",
            page.chips: chat_view.attached(session, texts),
            page.panel: views.media_panel(session, texts),
            page.notice: "",
        }

    def _failure(self, error: VideoLlamaError, request: gr.Request, texts: Texts) -> Changes:
        session, changes = self._find(request), {}
        # Another request of the conversation shows what it does.
        if session is None or not session.busy:
            changes = self._everything(session, texts)
        return changes | {self.page.notice: views.notice(_sentence(error), "error")}


def _field(event: gr.EventData, name: str) -> Any:
    """Return one value that page.js sent with an event; anybody may send anything else."""
    data = event._data
    if isinstance(data, dict):
        return data.get(name)
    return None


def _texts(request: gr.Request, wanted: Any) -> Texts:
    """Return the strings for a visitor; `wanted` is an event with the language chosen on the page, or that itself."""
    if isinstance(wanted, gr.EventData):
        wanted = _field(wanted, "language")
    return Texts(choose_language(wanted, request.headers.get("accept-language")))


def _sentence(error: VideoLlamaError) -> str:
    text = str(error)
    # Not a file name.
    if ":" not in text.split(" ")[0]:
        text = text[:1].upper() + text[1:]
    return text


def _preset_script() -> str:
    return f"(name) => ({json.dumps(PRESETS)})[name] || [0, 1, 1]"
