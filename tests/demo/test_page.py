"""The real page in a real browser, answered by the small model of the package."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.tiny_world.evaluation.answers import parse_answer
from examples.tiny_world.known_clips import QUESTIONS, Clip
from examples.tiny_world.world.encoding import write_sound
from examples.tiny_world.world.sounds import draw_sound, random_sound
from scripts.screenshot_demo import PHONE, add_file, ask, find_browser, launch, open_page
from video_llama.demo.page import EXAMPLES
from video_llama.inference.chat import Chat

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if find_browser() is None:
    pytest.skip("no Chromium here (on Debian: apt-get install chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow
Visit = Callable[..., Any]
PATIENCE_MS = 120_000
COLOUR, SOUND = QUESTIONS["colour"], QUESTIONS["sound"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, world: SimpleNamespace) -> Iterator[Visit]:
    """Open the page as a new visitor; nobody may need anything from other servers."""
    pages, asked = [], []

    def visit(**settings: Any) -> Any:
        context = browser.new_context(**settings)
        context.on("request", lambda request: asked.append(request.url))
        pages.append(open_page(context, world.address))
        pages[-1].set_default_timeout(PATIENCE_MS)
        return pages[-1]

    yield visit
    world.model.gate.set()
    world.model.says = None
    for page in pages:
        page.context.close()
    assert asked
    assert [url for url in asked if not url.startswith((world.address, "data:", "blob:"))] == []


@pytest.fixture
def red_cross() -> Path:
    """The picture of the examples."""
    return next(path for path, _ in EXAMPLES if path.suffix == ".jpg")


def bubbles(page: Any, role: str) -> list[str]:
    """Questions ("user"), or answers and what came of files ("bot")."""
    return page.locator(f"#vl-chat .message.{role}").all_inner_texts()


def wait_until(page: Any, is_so: Callable[[], bool]) -> None:
    """Let the page go on until something is so on the server."""
    for _ in range(600):
        if is_so():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never was")


def saved(page: Any) -> list[dict[str, Any]]:
    """The turns of the conversation, as the page saves them."""
    with page.expect_download() as download:
        page.click("#vl-save")
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["turns"]


def test_a_clip_is_seen_heard_asked_about_twice_and_forgotten(
    visit: Visit, world: SimpleNamespace, clips: list[Clip]
) -> None:
    page, clip = visit(), clips[10]
    add_file(page, clip.path)
    assert page.locator(".vl-cell").count() == 16
    cell = page.locator(".vl-cell").nth(4)
    cell.click()
    seconds = float(cell.get_attribute("data-seconds"))
    assert page.evaluate("document.querySelector('video.vl-player').currentTime") == pytest.approx(seconds, abs=0.01)
    assert "8 frames seen" in bubbles(page, "bot")[0]
    world.model.gate.clear()
    page.fill("#vl-question textarea", COLOUR)
    page.press("#vl-question textarea", "Enter")
    page.wait_for_selector("#vl-chat .message.user")
    early = bubbles(page, "bot")[-1]
    assert clip.colour not in early  # it streams: the first word is there, the whole is not
    world.model.gate.set()
    page.wait_for_selector("#vl-send")
    assert parse_answer("colour", bubbles(page, "bot")[-1]) == clip.colour
    assert parse_answer("sound", ask(page, SOUND)) == clip.sound
    assert page.input_value("#vl-question textarea") == ""
    page.click("#vl-clear")
    page.wait_for_selector(".vl-empty")
    assert bubbles(page, "user") == []


def test_an_image_and_a_sound_are_shown_and_asked_about_in_one_conversation(
    visit: Visit, red_cross: Path, tmp_path: Path
) -> None:
    sound = tmp_path / "sound.wav"
    write_sound(sound, draw_sound(random_sound(np.random.default_rng(1), 3.0, "whistle")))
    page = visit()
    add_file(page, red_cross)
    assert page.locator("img.vl-player").count() == 1
    assert parse_answer("colour", ask(page, COLOUR)) == "red"
    page.click("#vl-clear")
    page.wait_for_selector(".vl-empty")
    add_file(page, sound)
    assert parse_answer("sound", ask(page, "What do you hear?")) == "whistle"
    add_file(page, red_cross)
    assert (page.locator("img.vl-player").count(), page.locator("audio.vl-player").count()) == (1, 1)
    (first, second) = saved(page)
    assert [item["kind"] for turn in (first, second) for item in turn["media"]] == ["audio", "image"]


def test_the_page_says_when_a_file_is_decoded_and_when_the_model_looks_at_it(
    visit: Visit, red_cross: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {name: threading.Event() for name in ("decode_img", "add")}
    for name, event in held.items():
        step = getattr(Chat, name)
        monkeypatch.setattr(Chat, name, lambda chat, item, step=step, event=event: event.wait(60) and step(chat, item))
    page = visit()
    page.set_input_files("#vl-upload input[type=file]", str(red_cross))
    for name, told in (("decode_img", "Decoding"), ("add", "Encoding the frames and the audio of")):
        page.locator("#vl-notice", has_text=f"{told} {red_cross.name}").wait_for()
        assert page.locator(".vl-card").count() == 0
        held[name].set()
    page.locator("#vl-notice", has_text="Ask about it").wait_for()
    assert page.locator(".vl-card").count() == 1


def test_bad_files_are_explained_and_the_page_stays_usable(visit: Visit, red_cross: Path, tmp_path: Path) -> None:
    page = visit()
    for name, content, message in (
        ("holiday.mp4", bytes(range(256)) * 40, "holiday.mp4: not a media file"),
        ("note.txt", b"just a note\n" * 100, "note.txt: "),
        ("large.mp4", bytes(2_100_000), "large.mp4: 2.1 MB is too large (at most 2.0 MB)"),
    ):
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#vl-upload input[type=file]", str(tmp_path / name))
        page.wait_for_function(
            "(text) => [...document.querySelectorAll('[role=alert]')].some((one) => one.innerText.includes(text))",
            arg=message,
        )
    add_file(page, red_cross)
    assert parse_answer("colour", ask(page, COLOUR)) == "red"
    assert page.locator("[role=alert]:visible").count() == 0


def test_an_answer_is_stopped_and_given_again(visit: Visit, world: SimpleNamespace, red_cross: Path) -> None:
    page = visit()
    add_file(page, red_cross)
    world.model.gate.clear()
    page.fill("#vl-question textarea", COLOUR)
    page.click("#vl-send")
    page.wait_for_selector("#vl-chat .message.user")  # with the first word of the answer
    others = page.locator("#vl-retry, #vl-examples button")
    assert {button.is_disabled() for button in others.all()} == {True}
    page.click("#vl-stop")
    (session,) = [session for session in world.sessions._sessions.values() if session.busy]
    wait_until(page, session._stop.is_set)
    world.model.gate.set()
    page.wait_for_selector("#vl-stop", state="hidden")
    page.wait_for_selector("#vl-send")
    (turn,) = saved(page)
    assert {button.is_disabled() for button in others.all()} == {False}
    stopped = turn["answer"]
    assert "red" not in stopped
    page.click("#vl-retry")
    page.wait_for_function("[...document.querySelectorAll('#vl-chat .message.bot')].at(-1).innerText.includes('red')")
    page.wait_for_selector("#vl-send")
    (turn,) = saved(page)
    assert turn["answer"].startswith(stopped)


def test_clearing_during_an_answer_leaves_nothing_on_the_page(
    visit: Visit, world: SimpleNamespace, red_cross: Path
) -> None:
    page = visit()
    add_file(page, red_cross)
    for pause_ms in (0, 100, 200):
        world.model.gate.clear()
        page.fill("#vl-question textarea", COLOUR)
        page.click("#vl-send")
        page.wait_for_selector("#vl-chat .message.user")
        page.click("#vl-clear")
        page.wait_for_timeout(pause_ms)
        world.model.gate.set()
        page.wait_for_selector(".vl-empty")
        page.wait_for_timeout(1500)
        assert (bubbles(page, "user"), page.locator(".vl-card").count()) == ([], 0)
        add_file(page, red_cross)


def test_two_visitors_at_once_never_see_each_other(visit: Visit, world: SimpleNamespace, clips: list[Clip]) -> None:
    pages, both = (visit(), visit()), (clips[0], clips[5])
    for page, clip in zip(pages, both, strict=True):
        add_file(page, clip.path)
    for page in pages:  # the second asks while the first is being answered
        page.fill("#vl-question textarea", SOUND)
        page.press("#vl-question textarea", "Enter")
    for page, clip, other in zip(pages, both, reversed(both), strict=True):
        page.wait_for_function("document.querySelectorAll('#vl-chat .message.user').length == 1")
        page.wait_for_selector("#vl-send")
        page.wait_for_function(
            "(sound) => document.querySelector('#vl-chat').innerText.includes(sound)", arg=clip.sound
        )
        everything = page.inner_text("body")
        assert other.path.name not in everything
        assert other.sound not in everything
        assert page.locator(".vl-card").count() == 1


def test_the_place_in_the_queue_is_shown(visit: Visit, world: SimpleNamespace) -> None:
    first, second = visit(), visit()
    world.model.gate.clear()
    for page in (first, second):
        page.fill("#vl-question textarea", "What do you hear?")
        page.press("#vl-question textarea", "Enter")
        page.wait_for_timeout(300)
    place = second.locator("#vl-notice .progress-text", has_text=re.compile(r"queue: \d+/\d+"))
    place.wait_for()
    assert place.bounding_box()["height"] > 10
    world.model.gate.set()
    second.wait_for_selector("#vl-chat .message.bot")


def test_the_last_question_is_changed_undone_and_the_conversation_saved(visit: Visit, red_cross: Path) -> None:
    page = visit()
    add_file(page, red_cross)
    ask(page, "What is the background?")
    ask(page, "What is it?")
    page.locator("#vl-chat button[aria-label=Edit]:visible, #vl-chat button[title=Edit]:visible").last.click()
    page.locator("#vl-chat textarea").fill(COLOUR)
    page.locator("#vl-chat button[aria-label=Submit], #vl-chat button[title=Submit]").click()
    page.wait_for_function("[...document.querySelectorAll('#vl-chat .message.bot')].at(-1).innerText.includes('red')")
    page.wait_for_selector("#vl-send")
    assert [turn["question"] for turn in saved(page)] == ["What is the background?", COLOUR]
    page.click("#vl-undo")
    page.wait_for_function(f"document.querySelector('#vl-question textarea').value === '{COLOUR}'")
    assert [turn["question"] for turn in saved(page)] == ["What is the background?"]


def test_what_people_the_model_and_file_names_say_is_text(visit: Visit, world: SimpleNamespace, image: Path) -> None:
    nasty = "<img src=x onerror=\"document.title='broken'\"> & <b>bold</b> **stars**"
    named = image.rename(image.with_name("<img src=x onerror=alert(1)> & co.png"))
    world.model.says = f"{nasty} <script>document.title = 'broken'</script>"
    page = visit()
    add_file(page, named)
    assert "<img src=x onerror=alert(1)> & co.png" in bubbles(page, "bot")[0]
    assert "<img src=x onerror=alert(1)> & co.png" in page.inner_text("#vl-panel")
    assert world.model.says in ask(page, nasty)
    assert nasty in bubbles(page, "user")[0]
    assert page.title() == "Video-LLaMA"


def test_files_the_browser_cannot_play_are_shown_as_the_model_saw_them(
    visit: Visit, red_cross: Path, tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    page = visit()
    still, moving = tmp_path / "still.tiff", tmp_path / "moving.gif"
    Image.open(red_cross).save(still)
    frames = [Image.new("RGB", (64, 48), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(moving, save_all=True, append_images=frames[1:], duration=200)
    add_file(page, make_video("clip.avi", codec="mpeg4", num_frames=8))
    page.wait_for_selector(".vl-unplayable")
    card = page.locator(".vl-card")
    assert card.locator("p").inner_text().startswith("Your browser cannot play this file; the frames below")
    assert card.locator(".vl-seek").count() == 0
    assert card.locator(".vl-cell:disabled").count() == card.locator(".vl-cell").count() > 0
    page.click("#vl-clear")
    page.wait_for_selector(".vl-empty")
    for path, shown in ((moving, "gradio_api"), (still, "data:image/jpeg")):
        add_file(page, path)
        picture = page.locator(".vl-card").first.locator("img.vl-player")  # the latest file is the first
        wait_until(page, lambda picture=picture: picture.evaluate("one => one.naturalWidth") > 0)
        assert shown in picture.get_attribute("src")


def test_an_emptied_setting_is_the_default_again(visit: Visit) -> None:
    page = visit()
    page.click("#vl-settings button")
    field = page.get_by_label("number input for Longest answer")
    before = field.input_value()
    assert int(before) > 1
    field.fill("7")
    field.fill("")
    page.focus("#vl-question textarea")
    wait_until(page, lambda: field.input_value() == before)


def test_an_example_is_one_click(visit: Visit) -> None:
    page = visit()
    for number, cards in ((0, 1), (1, 1), (2, 2)):  # the second is about the first one's clip
        page.locator("#vl-examples button").nth(number).click()
        page.wait_for_function(f"document.querySelectorAll('#vl-chat .message.user').length == {number + 1}")
        page.wait_for_selector("#vl-send")
        assert page.locator(".vl-card").count() == cards
    turns = saved(page)
    assert [turn["question"] for turn in turns] == [question for _, question in EXAMPLES[:3]]
    assert parse_answer("sound", turns[1]["answer"]) == "beeps"


def test_the_keyboard_is_enough(visit: Visit, red_cross: Path) -> None:
    page = visit()
    # Focus and key in one step: the page may still draw its controls anew, which takes the focus away.
    with page.expect_file_chooser() as chooser:
        page.locator("#vl-upload button").first.press("Space")
    chooser.value.set_files(str(red_cross))
    page.wait_for_selector(".vl-card")
    page.locator("#vl-question textarea").focus()
    page.keyboard.type(COLOUR)
    page.keyboard.press("Enter")
    page.wait_for_function("[...document.querySelectorAll('#vl-chat .message.bot')].at(-1).innerText.includes('red')")
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


def test_everything_fits_a_phone(visit: Visit, clips: list[Clip]) -> None:
    page = visit(viewport=PHONE)
    add_file(page, clips[0].path)
    ask(page, "What is it? " + "Supercalifragilistic" * 5)
    outside = page.evaluate(
        "[...document.querySelectorAll('button, textarea, video, .vl-card, .message')]"
        ".filter((one) => one.offsetParent && !one.closest('.vl-strip'))"
        ".map((one) => one.getBoundingClientRect()).filter((box) => box.left < 0 || box.right > 375).length"
    )
    assert outside == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("#vl-ask").bounding_box()["y"] < page.locator("#vl-panel").bounding_box()["y"]


def test_the_webcam_and_the_microphone_are_recorded(visit: Visit) -> None:
    page = visit(permissions=["camera", "microphone"])
    for tab, player in (("Microphone", "audio.vl-player"), ("Webcam", "video.vl-player")):
        page.get_by_role("tab", name=tab).click()
        if tab == "Webcam":
            page.get_by_text("Click to Access Webcam").click()
        page.locator("button:visible", has_text="Record").click()
        page.locator("button:visible", has_text="Stop").wait_for()
        page.wait_for_timeout(3000)
        page.locator("button:visible", has_text="Stop").first.click()
        page.wait_for_selector(player)
    assert [item["kind"] for turn in saved(page) for item in turn["media"]] == ["audio", "video"]


def test_closing_the_tab_frees_the_conversation_and_its_files(
    visit: Visit, world: SimpleNamespace, red_cross: Path
) -> None:
    before = set(world.sessions._sessions)
    page = visit()
    add_file(page, red_cross)
    (key,) = set(world.sessions._sessions) - before
    folder = world.sessions.find(key).folder
    assert list(folder.iterdir())
    page.close()
    wait_until(visit(), lambda: world.sessions.find(key) is None and not folder.exists())
