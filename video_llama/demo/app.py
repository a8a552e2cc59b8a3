"""The page, its handlers and the endpoints, put together."""

from __future__ import annotations

from typing import Any

import gradio as gr

from video_llama.demo.endpoints import Endpoints
from video_llama.demo.events import Events
from video_llama.demo.page import build_page
from video_llama.demo.sessions import Sessions
from video_llama.inference.generation import GenerationOptions

__all__ = ["build_app"]

QUEUE_SIZE = 64  # requests that may wait; further ones are told to come again


def build_app(sessions: Sessions, options: GenerationOptions, title: str = "", concurrency: int = 1) -> gr.Blocks:
    """The app, ready to be launched.

    Args:
        sessions: the conversations.
        options: how answers are drawn unless visitors choose otherwise.
        title: which model answers, as HTML.
        concurrency: how many requests may be worked on at once.
    """
    with gr.Blocks(title="Video-LLaMA", analytics_enabled=False, fill_width=True) as app:
        Endpoints(sessions, options, concurrency).connect()  # first: the names of the page's handlers give way
        page = build_page(title, options, sessions.limits, sessions.num_frames, sessions.listen)
        events = Events(page, sessions, options, concurrency)
        events.connect()
        shown = [page.notice, page.listen, page.num_frames]
        quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        app.load(events.load, None, shown, concurrency_limit=None, **quietly)
        app.unload(events.leave)
    app.queue(max_size=QUEUE_SIZE)
    return app
