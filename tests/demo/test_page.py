"""The real page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.screenshot_demo import PHONE, add_file, ask, find_browser, launch, open_page

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if find_browser() is None:
    pytest.skip("no Chromium here (on Debian: apt-get install chromium)", allow_module_level=True)

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: SimpleNamespace) -> Iterator[Visit]:
    """Open the page as a new visitor."""
    pages = []

    def visit(**settings: Any) -> Any:
        pages.append(open_page(browser, server.address, **settings))
        return pages[-1]

    yield visit
    for page in pages:
        page.context.close()


def lower_limit(page: Any, tokens: int) -> None:
    """Let answers be as long as this."""
    page.click("#vl-settings button")
    page.get_by_label("number input for Longest answer").fill(str(tokens))
    page.keyboard.press("Tab")


def bubbles(page: Any, role: str) -> list[str]:
    return page.locator(f"#vl-chat .message.{role}").all_inner_texts()


def test_a_clip_is_seen_heard_asked_about_twice_and_forgotten(visit: Visit, make_video: Callable[..., Path]) -> None:
    page = visit()
    add_file(page, make_video("clip.mp4", num_frames=40, audio=True))
    assert page.locator(".vl-cell").count() == 16
    page.locator(".vl-cell").nth(4).click()
    seconds = float(page.locator(".vl-cell").nth(4).get_attribute("data-seconds"))
    assert page.evaluate("document.querySelector('video.vl-player').currentTime") == pytest.approx(seconds, abs=0.01)
    assert "8 frames seen" in bubbles(page, "user")[0]
    ask(page, "What is it?")
    ask(page, "Why?")
    assert len(bubbles(page, "bot")) == 2
    assert page.input_value("#vl-question textarea") == ""
    page.click("#vl-clear")
    page.wait_for_selector(".vl-empty")
    assert bubbles(page, "user") == []


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_an_image_and_a_sound_are_shown_and_asked_about(
    kind: str, visit: Visit, image: Path, make_sound: Callable[..., Path]
) -> None:
    page = visit()
    add_file(page, image if kind == "image" else make_sound())
    assert page.locator("img.vl-player" if kind == "image" else "audio.vl-player").count() == 1
    ask(page, "What is it?")
    assert len(bubbles(page, "bot")) == 1


def test_a_corrupt_file_is_explained_and_the_page_stays_usable(visit: Visit, image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "holiday.mp4"
    broken.write_bytes(bytes(range(256)) * 40)
    page = visit()
    page.set_input_files("#vl-upload input[type=file]", str(broken))
    page.wait_for_selector("#vl-notice [role=alert]")
    assert page.inner_text("#vl-notice").strip().startswith("holiday.mp4: not a media file")
    add_file(page, image)
    ask(page, "What is it?")
    assert page.locator("[role=alert]").count() == 0


def test_an_answer_streams_and_can_be_stopped(visit: Visit) -> None:
    page = visit()
    lower_limit(page, 1500)
    page.fill("#vl-question textarea", "Go on for ever")
    page.click("#vl-send")
    page.wait_for_selector("#vl-chat .message.bot")
    early = len(bubbles(page, "bot")[0])
    page.wait_for_function(f"document.querySelector('#vl-chat .message.bot').innerText.length > {early}")
    page.click("#vl-stop")
    page.wait_for_selector("#vl-stop", state="hidden")
    page.wait_for_selector("#vl-send")


def test_two_visitors_never_see_each_other(visit: Visit, image: Path) -> None:
    first, second = visit(), visit()
    add_file(first, image)
    ask(first, "Mine?")
    ask(second, "Yours?")
    assert second.locator(".vl-card").count() == 0
    assert ["Mine?" in text for text in (bubbles(first, "user")[-1], bubbles(second, "user")[-1])] == [True, False]
    assert (len(bubbles(first, "bot")), len(bubbles(second, "bot"))) == (1, 1)


def test_the_last_question_is_undone_and_the_conversation_saved(visit: Visit) -> None:
    page = visit()
    ask(page, "First?")
    ask(page, "Second?")
    page.click("#vl-undo")
    page.wait_for_function("document.querySelector('#vl-question textarea').value === 'Second?'")
    with page.expect_download() as download:
        page.click("#vl-save")
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [turn["question"] for turn in saved["turns"]] == ["First?"]


def test_what_people_type_is_text(visit: Visit) -> None:
    page = visit()
    ask(page, "<img src=x onerror=\"document.title='broken'\"> & <b>bold</b>?")
    assert "& <b>bold</b>?" in bubbles(page, "user")[0]
    assert page.title() == "Video-LLaMA"


def test_an_example_is_one_click(visit: Visit) -> None:
    page = visit()
    page.locator("#vl-examples button").first.click()
    page.wait_for_selector(".vl-card")
    page.wait_for_function("document.querySelector('#vl-question textarea').value !== ''")


def test_the_keyboard_is_enough(visit: Visit, image: Path) -> None:
    page = visit()
    add_file(page, image)
    page.locator("#vl-question textarea").focus()
    page.keyboard.type("What is it?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vl-chat .message.bot")
    page.wait_for_selector("#vl-send")
    reached = []
    page.locator("#vl-question textarea").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        if reached[-1] == "vl-clear":
            page.keyboard.press("Enter")
            break
    page.wait_for_selector(".vl-empty")


def test_everything_fits_a_phone(visit: Visit, make_video: Callable[..., Path]) -> None:
    page = visit(viewport=PHONE)
    add_file(page, make_video("clip.mp4", num_frames=40, audio=True))
    ask(page, "What is it? " + "Supercalifragilistic" * 5)
    outside = page.evaluate(
        "[...document.querySelectorAll('button, textarea, video, .vl-card, .message')]"
        ".filter((one) => one.offsetParent && !one.closest('.vl-strip'))"
        ".map((one) => one.getBoundingClientRect()).filter((box) => box.left < 0 || box.right > 375).length"
    )
    assert outside == 0


def test_the_page_asks_nothing_of_other_servers(browser: Any, server: SimpleNamespace) -> None:
    context = browser.new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(server.address)
    page.wait_for_selector("#vl-question textarea")
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server.address, "data:", "blob:"))] == []
