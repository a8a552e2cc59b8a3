"""The real page in a real browser, answered by the small model of the package."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
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
from scripts.screenshot_demo import add_file, ask, wait_until_idle
from tests.demo.browser import Visit, bubbles, choose, saved, wait_until
from video_llama.demo.page import EXAMPLES
from video_llama.inference.chat import Chat

pytestmark = pytest.mark.slow
COLOUR, SOUND = QUESTIONS["colour"], QUESTIONS["sound"]


def start_new(page: Any) -> None:
    """Begin a new conversation."""
    choose(page, "#vl-more", "#vl-clear")
    page.click("#vl-confirm-yes")
    page.wait_for_selector(".vl-card", state="detached")
    page.wait_for_selector(".vl-empty")
    wait_until_idle(page)


def test_a_clip_is_seen_heard_asked_about_twice_and_forgotten(
    visit: Visit, world: SimpleNamespace, clips: list[Clip]
) -> None:
    page, clip = visit(), clips[10]
    add_file(page, clip.path)
    assert page.locator(".vl-cell").count() == 16
    assert "8 frames" in page.inner_text("#vl-chips .vl-file")
    cell = page.locator(".vl-cell").nth(4)
    cell.click()
    seconds = float(cell.get_attribute("data-seconds"))
    assert page.evaluate("document.querySelector('video.vl-player').currentTime") == pytest.approx(seconds, abs=0.01)
    world.model.gate.clear()
    page.fill("#vl-question", COLOUR)
    page.press("#vl-question", "Enter")
    # The question with its file and a typing bubble are there at once, and the text field is empty.
    page.wait_for_selector(".message.user .vl-file >> visible=true", timeout=1000)
    assert page.input_value("#vl-question") == ""
    page.wait_for_selector("#vl-live .message.bot .vl-text")
    assert clip.colour not in page.inner_text("#vl-live")  # it streams: the first word is there, the whole is not
    world.model.gate.set()
    wait_until_idle(page)
    assert parse_answer("colour", bubbles(page, "bot")[-1]) == clip.colour
    assert parse_answer("sound", ask(page, SOUND)) == clip.sound
    assert page.locator("#vl-chat .message.user .vl-file").count() == 1
    start_new(page)
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
    start_new(page)
    add_file(page, sound)
    assert parse_answer("sound", ask(page, "What do you hear?")) == "whistle"
    add_file(page, red_cross)
    assert (page.locator("img.vl-player").count(), page.locator("audio.vl-player").count()) == (1, 1)
    (first, second) = saved(page)["turns"]
    assert [item["kind"] for turn in (first, second) for item in turn["media"]] == ["audio", "image"]


def test_the_page_says_when_a_file_is_decoded_and_when_the_model_looks_at_it(
    visit: Visit, red_cross: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {name: threading.Event() for name in ("decode_img", "add")}
    for name, event in held.items():
        step = getattr(Chat, name)
        monkeypatch.setattr(Chat, name, lambda chat, item, step=step, event=event: event.wait(60) and step(chat, item))
    page = visit()
    page.set_input_files("#vl-file", str(red_cross))
    for name, doing in (("decode_img", "Decoding"), ("add", "Encoding the frames and the audio of")):
        page.locator("#vl-chips .vl-reading", has_text=f"{doing} {red_cross.name}").wait_for()
        assert page.locator(".vl-card").count() == 0
        held[name].set()
    page.locator("#vl-chips .vl-file", has_text="one image").wait_for()
    assert page.locator(".vl-card").count() == 1


def test_bad_files_are_explained_and_the_page_stays_usable(visit: Visit, red_cross: Path, tmp_path: Path) -> None:
    page = visit()
    for name, content, message in (
        ("holiday.mp4", bytes(range(256)) * 40, "holiday.mp4: not a media file"),
        ("note.txt", b"just a note\n" * 100, "note.txt: a text file, not a video"),
        ("large.mp4", bytes(2_100_000), "large.mp4: 2.1 MB is too large (at most 2.0 MB)"),
    ):
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#vl-file", str(tmp_path / name))
        page.wait_for_function(
            "(text) => [...document.querySelectorAll('[role=alert]')].some((one) => one.innerText.includes(text))",
            arg=message,
        )
        wait_until_idle(page)
    add_file(page, red_cross)
    assert parse_answer("colour", ask(page, COLOUR)) == "red"
    assert page.locator("[role=alert]:visible").count() == 0


def test_an_answer_is_stopped_and_given_again(visit: Visit, world: SimpleNamespace, red_cross: Path) -> None:
    page = visit()
    add_file(page, red_cross)
    world.model.gate.clear()
    page.fill("#vl-question", COLOUR)
    page.click("#vl-send")
    page.wait_for_selector("#vl-live .message.bot .vl-text")  # with the first word of the answer
    assert page.locator("#vl-send").is_hidden()
    page.click("#vl-stop")
    (session,) = [session for session in world.sessions._sessions.values() if session.busy]
    wait_until(page, session._stop.is_set)
    world.model.gate.set()
    page.wait_for_selector("#vl-stop", state="hidden")
    (turn,) = saved(page)["turns"]
    stopped = turn["answer"]
    assert "red" not in stopped
    page.click("[data-action=retry]")
    wait_until_idle(page)
    (turn,) = saved(page)["turns"]
    assert turn["answer"].startswith(stopped)
    assert parse_answer("colour", turn["answer"]) == parse_answer("colour", bubbles(page, "bot")[-1]) == "red"


def test_clearing_during_an_answer_leaves_nothing_on_the_page(
    visit: Visit, world: SimpleNamespace, red_cross: Path
) -> None:
    page = visit()
    add_file(page, red_cross)
    for pause_ms in (0, 100, 200):
        world.model.gate.clear()
        page.fill("#vl-question", COLOUR)
        page.click("#vl-send")
        page.wait_for_selector("#vl-live .message.bot .vl-text")
        choose(page, "#vl-more", "#vl-clear")
        page.click("#vl-confirm-yes")
        page.wait_for_timeout(pause_ms)
        world.model.gate.set()
        page.wait_for_selector(".vl-empty")
        page.wait_for_timeout(1500)
        assert (page.locator(".message").count(), page.locator(".vl-card").count()) == (0, 0)
        add_file(page, red_cross)


def test_two_visitors_at_once_never_see_each_other(visit: Visit, world: SimpleNamespace, clips: list[Clip]) -> None:
    pages, both = (visit(), visit()), (clips[0], clips[5])
    for page, clip in zip(pages, both, strict=True):
        add_file(page, clip.path)
    for page in pages:  # the second asks while the first is being answered
        page.fill("#vl-question", SOUND)
        page.press("#vl-question", "Enter")
    for page, clip, other in zip(pages, both, reversed(both), strict=True):
        wait_until_idle(page)
        assert clip.sound in bubbles(page, "bot")[-1]
        everything = page.inner_text("body")
        assert other.path.name not in everything
        assert other.sound not in everything
        assert page.locator(".vl-card").count() == 1


def test_the_place_in_the_queue_is_shown(visit: Visit, world: SimpleNamespace) -> None:
    first, second = visit(), visit(locale="tr-TR")
    world.model.gate.clear()
    for page in (first, second):
        page.fill("#vl-question", "What do you hear?")
        page.press("#vl-question", "Enter")
        page.wait_for_timeout(300)
    second.locator("#vl-queue", has_text=re.compile(r"Bekleniyor: sizden önce (bir|\d+) istek var")).wait_for()
    world.model.gate.set()
    second.wait_for_selector("#vl-chat .message.bot")


def test_the_last_question_is_changed_undone_and_the_conversation_saved(visit: Visit, red_cross: Path) -> None:
    page = visit()
    add_file(page, red_cross)
    ask(page, "What is the background?")
    ask(page, "What is it?")
    page.click("[data-action=edit]")
    page.fill(".vl-edit textarea", COLOUR)
    page.press(".vl-edit textarea", "Enter")
    wait_until_idle(page)
    assert "red" in bubbles(page, "bot")[-1]
    assert [turn["question"] for turn in saved(page)["turns"]] == ["What is the background?", COLOUR]
    page.click("[data-action=undo]")
    page.wait_for_function("document.querySelectorAll('#vl-chat .message.user').length === 1")
    assert page.input_value("#vl-question") == COLOUR
    assert [turn["question"] for turn in saved(page)["turns"]] == ["What is the background?"]


def test_what_people_the_model_and_file_names_say_is_text(visit: Visit, world: SimpleNamespace, image: Path) -> None:
    nasty = "<img src=x onerror=\"document.title='broken'\"> & <b>bold</b> **stars**"
    named = image.rename(image.with_name("<img src=x onerror=alert(1)> & co.png"))
    world.model.says = f"{nasty} <script>document.title = 'broken'</script>"
    page = visit()
    add_file(page, named)
    for part in ("#vl-chips", "#vl-panel"):
        assert "<img src=x onerror=alert(1)> & co.png" in page.inner_text(part)
    assert world.model.says in ask(page, nasty)
    assert bubbles(page, "user") == [nasty]
    assert "<img src=x onerror=alert(1)> & co.png" in page.inner_text("#vl-chat .message.user .vl-file")
    assert page.locator("#vl-chat b b, #vl-chat img[src=x]").count() == 0
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
    start_new(page)
    for path, shown in ((moving, "gradio_api"), (still, "data:image/jpeg")):
        add_file(page, path)
        picture = page.locator(".vl-card:visible img.vl-player")  # the latest file
        wait_until(page, lambda picture=picture: picture.evaluate("one => one.naturalWidth") > 0)
        assert shown in picture.get_attribute("src")


def test_an_emptied_setting_is_the_default_again(visit: Visit) -> None:
    page = visit()
    page.click("#vl-gear")
    page.get_by_role("button", name="Advanced settings").click()
    field = page.get_by_label("number input for Max new tokens")
    before = field.input_value()
    assert int(before) > 1
    field.fill("7")
    field.fill("")
    page.focus("#vl-question")
    wait_until(page, lambda: field.input_value() == before)


def test_every_order_of_the_examples_gives_the_right_answers(visit: Visit) -> None:
    page, expected = visit(), {0: "left", 1: "beeps", 2: "red"}
    page.locator("#vl-chat .vl-example").nth(2).click()
    wait_until_idle(page)
    assert "red" in bubbles(page, "bot")[-1]
    for number in (0, 1, 2, 1, 0, 2):  # each pair of neighbours once
        choose(page, "#vl-add", "#vl-sources [data-dialog=vl-more-examples]")
        page.locator("#vl-more-examples .vl-example").nth(number).click()
        page.click("#vl-confirm-yes")
        page.wait_for_timeout(100)
        wait_until_idle(page)
        (turn,) = saved(page)["turns"]  # a conversation of its own
        assert turn["question"] == EXAMPLES[number][1]
        assert expected[number] in turn["answer"]
        assert page.locator(".vl-card").count() == 1


def test_the_keyboard_is_enough(visit: Visit, red_cross: Path) -> None:
    page = visit()
    with page.expect_file_chooser() as chooser:
        page.locator("#vl-add").press("Enter")
        page.keyboard.press("Enter")  # the first of the menu has the focus
    chooser.value.set_files(str(red_cross))
    page.wait_for_selector(".vl-card")
    wait_until_idle(page)
    page.locator("#vl-question").focus()
    page.keyboard.type(COLOUR)
    page.keyboard.press("Enter")
    wait_until_idle(page)
    assert "red" in bubbles(page, "bot")[-1]
    assert page.evaluate("document.activeElement.id") == "vl-question"
    page.locator("#vl-more").press("Enter")
    page.keyboard.press("Escape")
    assert page.locator("#vl-menu").is_hidden()
    assert page.evaluate("document.activeElement.id") == "vl-more"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # New conversation
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".vl-empty")


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


def test_the_settings_of_an_answer_are_in_the_exported_json(visit: Visit, red_cross: Path) -> None:
    page = visit()
    page.click("#vl-gear")
    page.get_by_label("Balanced").check()
    page.keyboard.press("Escape")
    add_file(page, red_cross)
    ask(page, COLOUR)
    exported = saved(page)
    assert exported["turns"][0]["settings"] == {
        "temperature": 0.4,
        "top_p": 0.9,
        "num_beams": 1,
        "max_new_tokens": 40,
    }
    assert json.dumps(exported["model"]) == '"small model"'
