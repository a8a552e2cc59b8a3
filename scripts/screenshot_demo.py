#!/usr/bin/env python
"""Take screenshots of the demo's page in all its states, and a moving one; needs playwright and Chromium.

python scripts/screenshot_demo.py --model CHECKPOINTS --output docs/images
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

DESKTOP, WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 1920, "height": 1080}, {"width": 375, "height": 812}
# Of the moving picture: its size, how long each of its frames is shown, and how long the last one.
MOVING, FRAME_MS, LAST_MS = {"width": 1000, "height": 680}, 160, 2500
PATIENCE_MS = 120_000  # a model on a busy CPU takes a while


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def launch(playwright: Any) -> Browser:
    """Start a headless browser with a fake camera; without a sandbox, which containers forbid."""
    devices = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    return playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", *devices])


def open_page(visitor: BrowserContext, address: str) -> Page:
    """Open the page and wait until it can be used."""
    page = visitor.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    # The script's strings, and the first reply of the server.
    page.wait_for_selector("#vl-question[placeholder]")
    page.wait_for_selector("#vl-settings input[type=range]", state="attached")
    page.wait_for_function("document.querySelector('#vl-notice .vl-busy') === null")
    return page


def add_file(page: Page, *paths: Path) -> None:
    """Upload files and wait until they are decoded and encoded."""
    expected = page.locator(".vl-card").count() + len(paths)
    page.set_input_files("#vl-file", [str(path) for path in paths])
    page.wait_for_function(f"document.querySelectorAll('.vl-card').length === {expected}")
    wait_until_idle(page)


def wait_until_idle(page: Page) -> None:
    """Wait until nothing is being read or answered."""
    page.wait_for_function("!document.body.classList.contains('vl-busy') && !document.querySelector('.vl-sent')")


def ask(page: Page, question: str) -> str:
    """Type a question, wait for the whole answer and return it."""
    page.fill("#vl-question", question)
    page.press("#vl-question", "Enter")
    wait_until_idle(page)
    return page.locator("#vl-chat .message.bot .vl-text").last.inner_text()


def save(page: Page, path: Path) -> None:
    """Save a screenshot once the video is loaded, in few enough colours to be small."""
    from PIL import Image

    page.wait_for_function(
        "[...document.querySelectorAll('.vl-card:not([hidden]) video')].every((one) => one.readyState >= 2)"
    )
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)  # until the players' controls have faded
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def take_screenshots(address: str, clip: Path, questions: Sequence[str], output: Path) -> None:
    """Save screenshots of every state: demo.png and demo_dark.png of a conversation, the others under their names."""
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for name, settings in (
            ("", {"viewport": DESKTOP}),
            ("_dark", {"viewport": DESKTOP, "color_scheme": "dark", "locale": "tr-TR"}),
            ("_wide", {"viewport": WIDE}),
            ("_phone", {"viewport": PHONE}),
        ):
            visit_states(open_page(browser.new_context(**settings), address), clip, questions, output, f"demo{name}")
        record_conversation(open_page(browser.new_context(viewport=MOVING), address), clip, questions, output)
        browser.close()


def visit_states(page: Page, clip: Path, questions: Sequence[str], output: Path, name: str) -> None:
    """Go through the states of the page and save each; `name` begins the names of the files."""
    save(page, output / f"{name}_empty.png")
    add_file(page, clip)
    save(page, output / f"{name}_attached.png")
    page.fill("#vl-question", questions[0])
    page.press("#vl-question", "Enter")
    page.screenshot(path=output / f"{name}_busy.png")
    wait_until_idle(page)
    for question in questions[1:]:
        ask(page, question)
    save(page, output / f"{name}.png")
    for opened, button in (("settings", "#vl-gear"), ("sources", "#vl-add"), ("menu", "#vl-more")):
        page.click(button)
        page.wait_for_timeout(300)
        page.screenshot(path=output / f"{name}_{opened}.png")
        page.keyboard.press("Escape")
    page.click("#vl-more")
    page.click("#vl-clear")
    page.screenshot(path=output / f"{name}_confirm.png")
    page.keyboard.press("Escape")
    broken = output / "broken.mp4"
    broken.write_bytes(bytes(range(256)) * 40)
    page.set_input_files("#vl-file", str(broken))
    page.wait_for_selector("#vl-notice .vl-error")
    broken.unlink()
    save(page, output / f"{name}_error.png")


def record_conversation(page: Page, clip: Path, questions: Sequence[str], output: Path) -> None:
    """Save an animation of a conversation: a file is attached, questions are answered, a frame is clicked."""
    from PIL import Image

    shots: list[bytes] = [page.screenshot()] * 5

    def record(count: int) -> None:
        for _ in range(count):
            page.wait_for_timeout(FRAME_MS)
            shots.append(page.screenshot())

    page.set_input_files("#vl-file", str(clip))
    record(3)
    page.wait_for_selector(".vl-card")
    wait_until_idle(page)
    record(5)
    for question in questions:
        page.focus("#vl-question")
        for start in range(0, len(question), 4):
            page.keyboard.type(question[start : start + 4])
            record(1)
        page.keyboard.press("Enter")
        record(8)
        wait_until_idle(page)
        record(4)
    page.locator(".vl-cell").nth(6).click()
    record(5)
    frames = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(
        output / "demo.webp", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=70, method=4
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model's page on this machine and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id or packaged model")
    parser.add_argument("--clip", type=Path, default=None, help="what to show; by default a bundled clip")
    parser.add_argument("--question", nargs="+", default=["Which way does the motion go?", "And what do you hear?"])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the screenshots")
    arguments = parser.parse_args(argv)
    if find_browser() is None:
        print("error: Chromium is not installed; on Debian: apt-get install chromium", file=sys.stderr)
        return 1

    from video_llama.demo.page import EXAMPLES
    from video_llama.demo.server import DemoServer, ServerSettings
    from video_llama.demo.sessions import Defaults
    from video_llama.inference.generation import GenerationOptions
    from video_llama.inference.load import load_pretrained_model

    server = DemoServer(
        lambda: load_pretrained_model(arguments.model, device="cpu"),
        ServerSettings(title=Path(arguments.model).name),
        defaults=Defaults(GenerationOptions(max_new_tokens=64)),
    )
    try:
        take_screenshots(server.start(), arguments.clip or EXAMPLES[0][0], arguments.question, arguments.output)
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
