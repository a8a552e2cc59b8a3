"""The components of the page, where they are, and what they look like."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.checkpoints.hub import is_packaged
from video_llama.demo.chat_view import Example, example_cards, welcome
from video_llama.demo.limits import Limits
from video_llama.demo.sessions import Defaults
from video_llama.demo.strings import LANGUAGES, STRINGS, Texts
from video_llama.processor.media_processor import DEFAULT_NUM_FRAMES

__all__ = ["EXAMPLES", "PRESETS", "Page", "fixed_parts", "launch_look"]

FOLDER = Path(__file__).parent
SAMPLES = FOLDER / "samples"
EXAMPLES: tuple[Example, ...] = (
    (SAMPLES / "stars.mp4", "Which way does the motion go?"),
    (SAMPLES / "stars.mp4", "What do you hear?"),
    (SAMPLES / "cross.jpg", "What colour do you see?"),
    (SAMPLES / "tone.m4a", "Does the pitch rise or fall?"),
)
"""Of the generated world that the small model of the package knows."""

# Temperature, top-p and beams.
PRESETS: dict[str, tuple[float, float, int]] = {
    "precise": (0, 1, 1),
    "balanced": (0.4, 0.9, 1),
    "creative": (1, 0.95, 1),
}
SCRIPTS = ("page.js", "composer.js", "recorder.js", "viewer.js")
# What page.js sends. Gradio finds the names of a component's events in its script.
_BRIDGE = (
    "vl.connect(trigger); /* 'attach' 'ask' 'retry' 'example' 'undo' 'remove' 'clear' 'stop' 'translate' 'save' */"
)


class Page:
    """The components, laid out in the order of their making; build it inside `gr.Blocks`.

    Texts of the fixed parts (page.html) are filled in by page.js; those of the components by `in_language`.

    Args:
        title: the name of the model.
        limits: what the controls can be set to.
        defaults: what they are set to; the model's number of frames is set when it is loaded.
    """

    def __init__(self, title: str, limits: Limits, defaults: Defaults) -> None:
        header, composer, dialogs = fixed_parts(title, limits)
        gr.HTML(header, elem_id="vl-head", js_on_load=None, apply_default_css=False)
        with gr.Row(elem_id="vl-columns"):
            with gr.Column(elem_id="vl-viewer", min_width=0):
                self.panel = _html("vl-panel")
            with gr.Column(elem_id="vl-talk", min_width=0):
                with gr.Column(elem_id="vl-scroll"):
                    self.chat = _html("vl-chat", welcome(EXAMPLES))
                    self.live = _html("vl-live")
                    _html("vl-pending", '<div id="vl-sent"></div>')
                self.notice = _html("vl-notice")
                with gr.Column(elem_id="vl-composer"):
                    self.chips = _html("vl-chips")
                    gr.HTML(composer, elem_id="vl-ask", js_on_load=None, apply_default_css=False)
                with gr.Column(elem_id="vl-settings"):
                    self._add_settings(limits, defaults)
        gr.HTML(dialogs, elem_id="vl-dialogs", js_on_load=None, apply_default_css=False)
        self.bridge = gr.HTML("", elem_id="vl-bridge", js_on_load=_BRIDGE)
        # Its value comes from page.js, with the events that have no data of their own.
        self.language = gr.Textbox(visible="hidden", elem_id="vl-chosen-language")
        self.exported = gr.Textbox(visible="hidden", elem_id="vl-exported")

    @property
    def changing(self) -> list[Any]:
        """Return the components that handlers may change."""
        return [self.chat, self.live, self.chips, self.panel, self.notice]

    @property
    def translated(self) -> list[Any]:
        """Return the components whose labels depend on the language, or on the model."""
        return [self.preset, self.num_frames, self.use_audio, self.advanced, *self.answer_settings]

    def in_language(self, texts: Texts) -> dict[Any, Any]:
        """Return the labels of the settings in a language, as changes of the components."""
        temperature, top_p, beams, longest = self.answer_settings
        changes: dict[Any, Any] = {
            self.preset: gr.Radio(label=texts("style"), choices=[(texts(name), name) for name in PRESETS]),
            self.use_audio: gr.Checkbox(label=texts("use_audio"), info=texts("use_audio_info")),
            self.advanced: gr.Accordion(label=texts("advanced")),
        }
        sliders = ((self.num_frames, "frames"), (temperature, "temperature"), (top_p, "top_p"), (beams, "beams"))
        for slider, name in (*sliders, (longest, "longest")):
            changes[slider] = gr.Slider(label=texts(name), info=texts(f"{name}_info"))
        return changes

    def _add_settings(self, limits: Limits, defaults: Defaults) -> None:
        texts = Texts()

        def slider(least: float, most: float, value: float, name: str, step: float = 1) -> gr.Slider:
            return gr.Slider(least, most, value, step=step, label=texts(name), info=texts(f"{name}_info"))

        options, frames = defaults.options, defaults.num_frames or DEFAULT_NUM_FRAMES
        names = [name for name, (temperature, _, _) in PRESETS.items() if temperature == options.temperature]
        choices = [(texts(name), name) for name in PRESETS]
        self.preset = gr.Radio(choices, value=next(iter(names), None), label=texts("style"))
        self.num_frames = slider(1, limits.frames, frames, "frames")
        self.use_audio = gr.Checkbox(defaults.listen, label=texts("use_audio"), info=texts("use_audio_info"))
        with gr.Accordion(texts("advanced"), open=False) as self.advanced:
            temperature = slider(0, limits.temperature, options.temperature, "temperature", 0.05)
            top_p = slider(0.05, 1, options.top_p, "top_p", 0.05)
            beams = slider(1, limits.beams, options.num_beams, "beams")
            longest = slider(1, limits.answer_tokens, options.max_new_tokens, "longest")
        # In the order of `answer_options`.
        self.answer_settings = [temperature, top_p, beams, longest]


def launch_look(limits: Limits) -> dict[str, Any]:
    """Return the style and the script of the page, as arguments of `launch`."""
    columns = {language: _column(number) for number, language in enumerate(LANGUAGES)}
    # "</" would end the script.
    strings = json.dumps(columns, ensure_ascii=False).replace("</", "<\\/")
    scripts = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # Fonts that every system has: others would be fetched from elsewhere.
    theme = gr.themes.Soft(
        primary_hue="indigo",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(block_border_width="1px", input_border_width="1px")
    settings = f"window.vlStrings = {strings};\nwindow.vlUploadBytes = {limits.upload_bytes};"
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    # Not as `css`: Gradio would put its own selectors before those of a state of the whole page.
    head = f"<style>{style}</style><script>(() => {{\n{settings}\n{scripts}\n}})();</script>"
    return {"theme": theme, "head": head, "favicon_path": str(FOLDER / "favicon.png")}


def _column(number: int) -> dict[str, str]:
    return {key: row[number] for key, row in STRINGS.items()}


def _html(elem_id: str, value: str = "") -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, js_on_load=None, apply_default_css=False)


def fixed_parts(title: str, limits: Limits) -> list[str]:
    """Return the header, the composer and the dialogs of page.html."""
    text = (FOLDER / "page.html").read_text(encoding="utf-8")
    values = {
        "model": escape(title),
        "megabytes": f"{limits.upload_mb:g}",
        "minutes": f"{limits.seconds / 60:g}",
        "files": str(limits.media),
        "examples": example_cards(EXAMPLES),
        "toy": "" if is_packaged(title) else "hidden",
    }
    for name, value in values.items():
        text = text.replace(f"[[{name}]]", value)
    return text.split("<!-- part -->")[1:]
