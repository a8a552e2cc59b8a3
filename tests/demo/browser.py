"""What the tests of the page in a browser share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.screenshot_demo import find_browser

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if find_browser() is None:
    pytest.skip("no Chromium here (on Debian: apt-get install chromium)", allow_module_level=True)

Visit = Callable[..., Any]
PATIENCE_MS = 120_000


def bubbles(page: Any, role: str) -> list[str]:
    """Return the questions ("user") or the answers ("bot")."""
    return page.locator(f"#vl-chat .message.{role} .vl-text").all_inner_texts()


def wait_until(page: Any, is_so: Callable[[], bool]) -> None:
    """Let the page go on until something is so on the server."""
    for _ in range(600):
        if is_so():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never was")


def choose(page: Any, menu: str, item: str) -> None:
    """Choose from a menu."""
    page.click(menu)
    page.click(item)


def download(page: Any, item: str) -> Path:
    """Save the conversation with an item of the menu; returns the file, under the name that the page gives it."""
    with page.expect_download() as started:
        choose(page, "#vl-more", item)
    path = Path(started.value.path())
    return path.rename(path.with_name(started.value.suggested_filename))


def saved(page: Any) -> dict[str, Any]:
    """Return the conversation as the page exports it."""
    return json.loads(download(page, "#vl-save").read_text(encoding="utf-8"))
