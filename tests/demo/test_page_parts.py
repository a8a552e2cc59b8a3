"""The composer, the viewer, languages, themes and sizes of the page, in a real browser."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.tiny_world.known_clips import QUESTIONS, Clip
from scripts.screenshot_demo import PHONE, add_file, ask, wait_until_idle
from tests.demo.browser import Visit, bubbles, choose, download, saved, wait_until
from video_llama.demo.page import EXAMPLES
from video_llama.demo.strings import STRINGS, Texts

pytestmark = pytest.mark.slow
COLOUR = QUESTIONS["colour"]
NAMES = "model megabytes minutes files percent name size most reason seconds time share"
VALUES = dict.fromkeys(NAMES.split(), "?")
# Gives an element of the page a file as a drop or a paste does; the file comes as base64.
HAND_OVER = """([selector, kind, name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const settings = { bubbles: true, cancelable: true };
  const target = document.querySelector(selector);
  const pasted = { ...settings, clipboardData: transfer };
  if (kind === "paste") return target.dispatchEvent(new ClipboardEvent("paste", pasted));
  target.dispatchEvent(new DragEvent("dragover", { ...settings, dataTransfer: transfer }));
  const isShown = getComputedStyle(document.querySelector("#vl-drop")).display;
  target.dispatchEvent(new DragEvent("drop", { ...settings, dataTransfer: transfer }));
  return isShown;
}"""


def hand_over(page: Any, selector: str, kind: str, path: Path) -> Any:
    data = base64.b64encode(path.read_bytes()).decode()
    return page.evaluate(HAND_OVER, [selector, kind, path.name, "image/jpeg", data])


def test_several_files_come_at_once_and_stay_in_their_order(visit: Visit, clips: list[Clip], red_cross: Path) -> None:
    page, tone = visit(), EXAMPLES[3][0]
    add_file(page, clips[0].path, red_cross, tone)
    names = [clips[0].path.name, red_cross.name, tone.name]
    assert page.locator("#vl-chips .vl-file b").all_inner_texts() == names
    assert page.locator(".vl-tab").all_inner_texts() == names
    assert page.locator(".vl-card:visible").count() == 1
    page.locator(".vl-tab").first.click()
    assert page.locator(".vl-card:visible video").count() == 1
    page.locator(".vl-tab").first.press("ArrowRight")
    assert page.locator(".vl-card:visible img.vl-player").count() == 1
    ask(page, COLOUR)
    assert page.locator("#vl-chat .message.user .vl-file b").all_inner_texts() == names
    assert page.locator("#vl-chips .vl-file").count() == 0
    page.locator("#vl-chat .vl-open").first.click()
    assert page.locator(".vl-card:visible video").count() == 1


def test_files_are_dropped_and_pasted_anywhere(visit: Visit, red_cross: Path) -> None:
    page = visit()
    for number, (selector, kind) in enumerate(
        [
            ("header", "drop"),
            ("#vl-scroll", "drop"),
            ("#vl-question", "drop"),
            ("#vl-question", "paste"),
            ("body", "paste"),
        ]
    ):
        shown = hand_over(page, selector, kind, red_cross)
        if kind == "drop":
            assert shown == "grid"
        page.wait_for_function(f"document.querySelectorAll('.vl-card').length === {number + 1}")
        wait_until_idle(page)
        assert page.locator("#vl-drop").is_hidden()
        assert page.locator("#vl-chips .vl-file").count() == number + 1


def test_a_question_waits_for_its_files(visit: Visit, world: SimpleNamespace, red_cross: Path) -> None:
    page = visit()
    # Slow enough that the question is sent while the file is on its way.
    page.route("**/gradio_api/upload", lambda route: (page.wait_for_timeout(1500), route.continue_()))
    page.set_input_files("#vl-file", str(red_cross))
    page.fill("#vl-question", COLOUR)
    page.press("#vl-question", "Enter")
    page.wait_for_selector(".message.user .vl-file", timeout=5000)
    page.wait_for_selector("#vl-chat .message.bot")
    wait_until_idle(page)
    assert "red" in bubbles(page, "bot")[-1]
    (turn,) = saved(page)["turns"]
    assert [item["name"] for item in turn["media"]] == [red_cross.name]


def test_a_file_is_removed_before_and_after_a_question(visit: Visit, world: SimpleNamespace, red_cross: Path) -> None:
    page, tone = visit(), EXAMPLES[3][0]
    add_file(page, red_cross, tone)
    page.locator("#vl-chips [data-action=remove]").nth(1).click()
    page.wait_for_function("document.querySelectorAll('.vl-card').length === 1")
    ask(page, COLOUR)
    page.locator("#vl-chat [data-action=remove]").click()
    page.wait_for_selector(".vl-card", state="detached")
    (turn,) = saved(page)["turns"]
    assert (turn["media"], turn["question"]) == ([], COLOUR)
    assert [list(session.folder.iterdir()) for session in world.sessions._sessions.values() if session.turns] == [[]]


def test_times_in_answers_go_there_in_the_player(visit: Visit, world: SimpleNamespace, red_cross: Path) -> None:
    page = visit()
    add_file(page, EXAMPLES[0][0])
    world.model.says = "It turns at 0:01.5, then after 2 seconds."
    ask(page, "When?")
    add_file(page, red_cross)
    assert page.locator(".vl-card:visible video").count() == 0
    page.locator("#vl-chat .vl-time").nth(1).click()
    assert page.locator(".vl-card:visible video").evaluate("one => one.currentTime") == pytest.approx(2, abs=0.01)
    page.locator("#vl-chat .vl-time").first.click()
    assert page.locator(".vl-card:visible video").evaluate("one => one.currentTime") == pytest.approx(1.5, abs=0.01)
    assert page.inner_text("#vl-chat .message.bot .vl-text") == world.model.says


def test_the_conversation_is_exported_as_markdown(visit: Visit, red_cross: Path) -> None:
    page = visit(locale="tr-TR")
    add_file(page, red_cross)
    answer = ask(page, COLOUR)
    path = download(page, "#vl-markdown")
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".md"
    assert text.startswith("# small model ile konuşma\n\nTarih: 20")
    for part in (f"` {red_cross.name} ` (tek görsel)", f"\n    {COLOUR}\n", f"\n    {answer}\n", "max_new_tokens=40"):
        assert part in text


def test_nothing_is_lost_without_a_warning(visit: Visit, red_cross: Path) -> None:
    page, asked = visit(), []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)  # nothing to lose
    page = visit()
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    add_file(page, red_cross)
    ask(page, COLOUR)
    choose(page, "#vl-more", "#vl-clear")
    page.click("#vl-confirm button >> nth=0")
    assert page.locator("#vl-chat .message.user").count() == 1
    page.close(run_before_unload=True)
    wait_until(page, lambda: bool(asked))
    assert asked == ["beforeunload"]
    assert page.locator("#vl-chat .message.user").count() == 1


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("tr-TR", "tr")])
def test_the_page_speaks_the_browsers_language_and_the_chosen_one(visit: Visit, locale: str, language: str) -> None:
    page = visit(locale=locale)
    add_file(page, EXAMPLES[0][0])

    def check(expected: str) -> None:
        texts, other = Texts(expected), Texts({"en": "tr", "tr": "en"}[expected])
        page.wait_for_selector(f"text={texts('frames_title')}")
        assert page.evaluate("document.documentElement.lang") == expected
        assert page.get_by_label(texts("question"), exact=True).get_attribute("placeholder") == texts("question_hint")
        page.click("#vl-gear")
        page.get_by_label(texts("precise")).wait_for()
        page.get_by_role("button", name=texts("advanced")).wait_for()
        page.keyboard.press("Escape")
        shown = page.inner_text("body")
        strange = [
            key for key in STRINGS if len(other(key, count=8, **VALUES)) > 4 and other(key, count=8, **VALUES) in shown
        ]
        # The switch is in the language that it switches to.
        assert set(strange) <= {"answers_with", "help_paper", "language", "top_p"}

    check(language)
    page.click("#vl-language")
    check({"en": "tr", "tr": "en"}[language])
    page.reload()
    page.wait_for_selector("#vl-question[placeholder]")
    assert page.evaluate("document.documentElement.lang") == {"en": "tr", "tr": "en"}[language]


def test_the_theme_is_switched_and_kept(visit: Visit) -> None:
    page = visit(color_scheme="light")
    background = "getComputedStyle(document.querySelector('.vl-header')).backgroundColor"
    light = page.evaluate(background)
    page.click("#vl-theme")
    dark = page.evaluate(background)
    assert light != dark
    page.reload()
    # Until Gradio has built the page there is no such element, and asking for its style is an error.
    page.wait_for_selector(".vl-header")
    page.wait_for_function(f"{background} === '{dark}'")


def test_everything_fits_a_phone(visit: Visit, clips: list[Clip]) -> None:
    page = visit(viewport=PHONE)
    add_file(page, clips[0].path)
    ask(page, "What is it? " + "Supercalifragilistic" * 5)
    outside = page.evaluate(
        "[...document.querySelectorAll('button, textarea, video, .vl-card, .message')]"
        ".filter((one) => one.checkVisibility() && !one.closest('.vl-strip, #vl-settings, #vl-dialogs'))"
        ".map((one) => one.getBoundingClientRect()).filter((box) => box.left < 0 || box.right > 375).length"
    )
    assert outside == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("document.documentElement.scrollHeight") <= PHONE["height"]
    composer = page.locator("#vl-form").bounding_box()
    assert PHONE["height"] - 30 < composer["y"] + composer["height"] <= PHONE["height"]
    before = page.locator("#vl-scroll").bounding_box()["height"]
    page.click("[data-action=fold]")
    assert page.locator("#vl-scroll").bounding_box()["height"] > before + 200


def test_the_camera_and_the_microphone_are_recorded(visit: Visit) -> None:
    page = visit(permissions=["camera", "microphone"])
    for number, kind in enumerate(("microphone", "camera")):
        choose(page, "#vl-add", f"#vl-sources [data-kind={kind}]")
        page.wait_for_selector("#vl-record:enabled")
        page.click("#vl-record")
        page.wait_for_timeout(2500)
        page.click("#vl-record")
        page.wait_for_function(f"document.querySelectorAll('.vl-card').length === {number + 1}")
        wait_until_idle(page)
    media = [item for turn in saved(page)["turns"] for item in turn["media"]]
    assert [item["kind"] for item in media] == ["audio", "video"]
    assert len(media[1]["frame_seconds"]) > 1


def test_a_browser_without_a_camera_says_so(visit: Visit) -> None:
    page = visit()
    refuse = "navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('no such device'))"
    page.evaluate(f"() => {{ {refuse} }}")
    choose(page, "#vl-add", "#vl-sources [data-kind=camera]")
    page.locator("#vl-recorder-error", has_text="no such device").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#vl-recorder").is_hidden()


@pytest.mark.parametrize("language", ["en-US", "tr-TR"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, language: str, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    page = visit(locale=language, color_scheme=scheme)
    found: list[str] = []

    def check(state: str) -> None:
        for width in (375, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(200)
            for one in axe.run(page).response["violations"]:
                if one["impact"] in ("serious", "critical"):
                    found.extend(f"{state} {width}: {one['id']}: {node['html'][:200]}" for node in one["nodes"])

    check("empty")
    add_file(page, EXAMPLES[0][0], EXAMPLES[2][0])
    check("attached")
    ask(page, COLOUR)
    check("answered")
    page.click("#vl-gear")
    page.get_by_role("button", name=Texts(language[:2])("advanced")).click()
    check("settings")
    page.keyboard.press("Escape")
    choose(page, "#vl-more", "#vl-clear")
    check("dialog")
    assert found == []
