"""What happens when something on the page is used. Handlers yield the components that change."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.demo.page import Page
from video_llama.demo.requests import answer_options, num_frames
from video_llama.demo.session import MediaItem, Session
from video_llama.demo.sessions import Sessions
from video_llama.demo.views import (
    conversation_json,
    media_panel,
    messages,
    notice,
    shown_text,
    summary,
    turn_of_message,
    typed_text,
)
from video_llama.errors import VideoLlamaError
from video_llama.inference.generation import GenerationOptions

__all__ = ["Events"]

Changes = dict[Any, Any]
DOING = {"decoding": "Decoding {} …", "encoding": "Looking at and listening to {} …"}


class Events:
    """The handlers of one page.

    Args:
        page: its components.
        sessions: the conversations.
        options: how answers are drawn where the page says nothing.
        concurrency: how many requests may be worked on at once; the model computes one at a time.
    """

    def __init__(self, page: Page, sessions: Sessions, options: GenerationOptions, concurrency: int = 1) -> None:
        self.page, self.sessions, self.options, self.concurrency = page, sessions, options, concurrency

    def connect(self) -> None:
        """Connect the handlers with the components; call it while the page is being built."""
        page = self.page
        settings = [page.temperature, page.top_p, page.num_beams, page.max_new_tokens]
        work = partial(self._on, concurrency_id="model", concurrency_limit=self.concurrency)
        quick = partial(self._on, queue=False)
        look = [page.num_frames, page.listen]
        work(page.upload.upload, self.add_file, [page.upload, *look])
        work(page.webcam.stop_recording, self.add_file, [page.webcam, *look])
        work(page.microphone.stop_recording, self.add_file, [page.microphone, *look])
        for button, path, question in page.examples:
            work(button.click, self.sample_handler(path, question), [*look, *settings])
        work(page.question.submit, self.ask, [page.question, *settings])
        work(page.send.click, self.ask, [page.question, *settings])
        work(page.retry.click, self.retry, settings)
        work(page.chatbot.edit, self.edit, settings)
        quick(page.undo.click, self.undo, [])
        for clear in (page.clear.click, page.chatbot.clear):
            cleared = quick(clear, self.clear, [])
            # What an answer said just before it was stopped may reach the page after the reply to this.
            quick(cleared.then, self.show_again, [])
        quick(page.stop.click, self.stop, [])
        saving = page.save.click(
            self.save, None, page.exported, queue=False, show_progress="hidden", api_visibility="private"
        )
        saving.then(None, page.exported, None, js="(text) => saveConversation(text)", api_visibility="private")

    def _on(self, event: Any, handler: Any, inputs: list[Any], **settings: Any) -> Any:
        changing = self.page.changing
        settings |= {"preprocess": False, "show_progress": "minimal", "show_progress_on": self.page.notice}
        return event(handler, inputs, changing, api_visibility="private", trigger_mode="once", **settings)

    def load(self) -> Iterator[Changes]:
        """Say how long the model has been loading, until it is there; then show what it can do."""
        page, started = self.page, time.monotonic()
        while not wait([self.sessions.model], timeout=1.0).done:
            text = f"Loading the model … {time.monotonic() - started:.0f} s"
            yield {page.notice: notice(text, "busy")}
        try:
            model = self.sessions.model.result()
        except VideoLlamaError:
            yield {page.notice: notice("The model could not be loaded; the terminal says why.", "error")}
            return
        listen = gr.Checkbox(interactive=model.has_audio, value=model.has_audio and self.sessions.listen)
        frames = gr.Slider(value=model.processor.media_processor.num_frames)
        yield {page.notice: "", page.listen: listen, page.num_frames: frames}

    def leave(self, request: gr.Request) -> None:
        """Free the session of a page that was closed."""
        self.sessions.end(request.session_hash)

    def add_file(self, data: Any, frames: Any, listen: Any, request: gr.Request) -> Iterator[Changes]:
        """Take in an upload or a recording."""
        try:
            path, name = self.sessions.uploads.find(data)
        except VideoLlamaError as error:
            yield self._failure(error)
            return
        yield from self._add(path, name, frames, listen, request)

    def sample_handler(self, path: Path, question: str) -> Callable[..., Iterator[Changes]]:
        """The handler that takes in one file of the examples, unless it is there already, and asks its question."""

        def ask_about_sample(
            frames: Any,
            listen: Any,
            temperature: Any,
            top_p: Any,
            num_beams: Any,
            max_new_tokens: Any,
            request: gr.Request,
        ) -> Iterator[Changes]:
            session = self.sessions.find(request.session_hash)
            is_there = session is not None and path in [item.source for item in session.media]
            if is_there or (yield from self._add(path, path.name, frames, listen, request)):
                yield from self._answer(question, "ask", (temperature, top_p, num_beams, max_new_tokens), request)

        return ask_about_sample

    def ask(
        self, question: Any, temperature: Any, top_p: Any, num_beams: Any, max_new_tokens: Any, request: gr.Request
    ) -> Iterator[Changes]:
        """Ask the question in the text field."""
        settings = (temperature, top_p, num_beams, max_new_tokens)
        yield from self._answer(str(question or ""), "ask", settings, request)

    def retry(
        self, temperature: Any, top_p: Any, num_beams: Any, max_new_tokens: Any, request: gr.Request
    ) -> Iterator[Changes]:
        """Answer the last question again."""
        yield from self._answer(None, "retry", (temperature, top_p, num_beams, max_new_tokens), request)

    def edit(
        self,
        temperature: Any,
        top_p: Any,
        num_beams: Any,
        max_new_tokens: Any,
        edited: gr.EditData,
        request: gr.Request,
    ) -> Iterator[Changes]:
        """Put the last question in other words."""
        session, index = self.sessions.find(request.session_hash), edited.index
        turn = turn_of_message(session, index) if session is not None and isinstance(index, int) else -1
        if session is None or turn < 0 or turn != len(session.turns) - 1:
            reason = "Only the last question can be changed; undo later ones, and later files, first."
            yield self._refresh(session) | {self.page.notice: notice(reason, "error")}
            return
        yield from self._answer(
            typed_text(str(edited.value)), "retry", (temperature, top_p, num_beams, max_new_tokens), request
        )

    def undo(self, request: gr.Request) -> Changes:
        """Take back the last question, which returns to the text field, or else the last file."""
        session = self.sessions.find(request.session_hash)
        if session is None:
            return self._refresh(None)
        try:
            question = session.undo()
        except VideoLlamaError as error:
            return self._failure(error)
        return self._refresh(session) | ({self.page.question: question} if question else {})

    def clear(self, request: gr.Request) -> Changes:
        """Forget the conversation and its files."""
        session = self.sessions.find(request.session_hash)
        try:
            if session is not None:
                session.clear()
        except VideoLlamaError as error:
            return self._failure(error)
        return self._refresh(session) | {self.page.question: ""}

    def show_again(self, request: gr.Request) -> Changes:
        """The conversation as it is a moment later."""
        time.sleep(0.5)
        session = self.sessions.find(request.session_hash)
        return {} if session is not None and session.busy else self._refresh(session)

    def stop(self, request: gr.Request) -> Changes:
        """End the answer after its current word."""
        session = self.sessions.find(request.session_hash)
        if session is not None:
            session.stop()
        return {self.page.notice: ""}

    def save(self, request: gr.Request) -> str:
        """The conversation as JSON."""
        return conversation_json(self.sessions.find(request.session_hash))

    def _add(
        self, path: Path, name: str, frames: Any, listen: Any, request: gr.Request
    ) -> Generator[Changes, None, bool]:
        """Yields changes as every handler; returns whether the file was taken in."""
        page = self.page
        try:
            frames = num_frames(frames, self.sessions.limits)
            session = self.sessions.get(request.session_hash)
            steps = session.adding(path, name, num_frames=frames, listen=bool(listen))
            item = yield from self._told(steps, name)
        except VideoLlamaError as error:
            yield self._failure(error) | self._emptied()
            return False
        ready = notice(f"{name}: {summary(item.upload)}. Ask about it.")
        yield self._refresh(session) | self._emptied() | {page.notice: ready}
        return True

    def _told(self, steps: Generator[str, None, MediaItem], name: str) -> Generator[Changes, None, MediaItem]:
        """Say at every step of taking in a file what is going on."""
        while True:
            try:
                step = next(steps)
            except StopIteration as done:
                item: MediaItem = done.value
                return item
            yield {self.page.notice: notice(DOING[step].format(name), "busy")}

    def _answer(
        self, question: str | None, how: str, settings: tuple[Any, ...], request: gr.Request
    ) -> Iterator[Changes]:
        page, session = self.page, None
        idle = self._answering(False)
        try:
            options = answer_options(settings, self.sessions.limits, self.options)
            session = self.sessions.get(request.session_hash)
            times_cleared = session.times_cleared
            pieces = session.ask(question or "", **options) if how == "ask" else session.retry(question, **options)
            yield {page.notice: notice("Reading the question …", "busy")} | self._answering(True)
            for number, said in enumerate(pieces):
                if session.times_cleared != times_cleared:
                    continue  # the page shows an empty conversation by now
                shown = [*messages(session), {"role": "assistant", "content": shown_text(said) or "…"}]
                first = {page.notice: ""} | ({page.question: ""} if how == "ask" else {}) if number == 0 else {}
                yield {page.chatbot: shown} | first
        except VideoLlamaError as error:
            yield self._failure(error, session) | idle
            return
        yield idle if session.times_cleared != times_cleared else self._refresh(session) | idle

    def _answering(self, is_so: bool) -> Changes:
        """While an answer is given it can be stopped; another one asked for would only wait unseen, and then begin."""
        page = self.page
        others = [page.retry, *page.example_buttons]
        return {page.send: gr.Button(visible=not is_so), page.stop: gr.Button(visible=is_so)} | {
            button: gr.Button(interactive=not is_so) for button in others
        }

    def _refresh(self, session: Session | None) -> Changes:
        page = self.page
        return {page.chatbot: messages(session), page.panel: media_panel(session), page.notice: ""}

    def _failure(self, error: VideoLlamaError, session: Session | None = None) -> Changes:
        shown = {self.page.chatbot: messages(session)} if session is not None and not session.busy else {}
        return {self.page.notice: notice(_sentence(str(error)), "error")} | shown

    def _emptied(self) -> Changes:
        return {self.page.upload: None, self.page.webcam: None, self.page.microphone: None}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if ":" not in text.split(" ")[0] else text
