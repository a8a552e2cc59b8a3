"""Pages that were closed are forgotten, but not before Gradio is done with them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from video_llama.demo import closed_pages
from video_llama.demo.closed_pages import ClosedPages


def test_a_closed_page_is_forgotten_once_gradio_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(closed_pages, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pages = {name: SimpleNamespace(is_closed=name != "open") for name in ("open", "closed", "reopened")}
    holder = SimpleNamespace(session_data=pages, time_last_used=dict.fromkeys(pages, 0), lock=threading.Lock())
    closed = ClosedPages(holder)
    assert closed.forget() == 0  # what it still has to do would make a record of an open page, for good
    assert set(pages) == {"open", "closed", "reopened"}
    now[0] += 5
    pages["reopened"].is_closed = False
    assert closed.forget() == 0
    now[0] += 5
    pages["reopened"].is_closed = True
    assert closed.forget() == 1
    assert set(pages) == set(holder.time_last_used) == {"open", "reopened"}
    now[0] += 10
    assert closed.forget() == 1
    assert set(pages) == {"open"}
