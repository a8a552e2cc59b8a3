"""The components of the page, where they are, and what they look like."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.demo.limits import Limits
from video_llama.demo.sessions import Defaults
from video_llama.demo.views import NOTHING_YET
from video_llama.processor.media_processor import DEFAULT_NUM_FRAMES

__all__ = ["EXAMPLES", "Page", "launch_look"]

FOLDER = Path(__file__).parent
SAMPLES = FOLDER / "samples"
EXAMPLES = [
    (SAMPLES / "stars.mp4", "Which way does the motion go?"),
    (SAMPLES / "stars.mp4", "What do you hear?"),
    (SAMPLES / "cross.jpg", "What colour do you see?"),
    (SAMPLES / "tone.m4a", "Does the pitch rise or fall?"),
]
"""Of the generated world that the small model of the package knows."""


class Page:
    """The components, laid out in the order of their making; build it inside `gr.Blocks`.

    Args:
        title: the name of the model.
        limits: what the controls can be set to.
        defaults: what they are set to; the model's number of frames is set when it is loaded.
    """

    def __init__(self, title: str, limits: Limits, defaults: Defaults) -> None:
        answerer = f"; {escape(title)} answers" if title else ""
        head = f"<h1>Video-LLaMA</h1><p>Ask about a video, an image or a sound{answerer}.</p>"
        gr.HTML(head, elem_id="vl-head", padding=False)
        with gr.Row(elem_id="vl-columns"):
            with gr.Column(scale=5, min_width=320):
                self._add_media(limits)
            with gr.Column(scale=6, min_width=320):
                self._add_chat()
                with gr.Accordion("Settings", open=False, elem_id="vl-settings"):
                    self._add_settings(limits, defaults)

    @property
    def example_buttons(self) -> list[gr.Button]:
        """Return one button for each example."""
        return [button for button, _, _ in self.examples]

    @property
    def changing(self) -> list[Any]:
        """Return the components that handlers may change."""
        media = [self.upload, self.webcam, self.microphone, self.panel]
        chat = [self.notice, self.chatbot, self.question, self.send, self.stop, self.retry]
        return [*media, *chat, *self.example_buttons]

    def _add_media(self, limits: Limits) -> None:
        with gr.Tabs(elem_id="vl-sources"):
            with gr.Tab("File"):
                label = f"Video, image or sound, up to {limits.upload_mb:g} MB"
                self.upload = gr.File(label=label, height=170, elem_id="vl-upload")
            with gr.Tab("Webcam"):
                mirror = gr.WebcamOptions(mirror=False)
                self.webcam = gr.Video(
                    sources=["webcam"], include_audio=True, webcam_options=mirror, label="Record a video", height=240
                )
            with gr.Tab("Microphone"):
                self.microphone = gr.Audio(sources=["microphone"], type="filepath", label="Record a sound")
        gr.HTML("Examples", elem_id="vl-examples-title", padding=False)
        self.examples = []
        with gr.Row(elem_id="vl-examples"):
            for path, question in EXAMPLES:
                button = gr.Button(f"{path.name}: {question}", size="sm", variant="secondary", min_width=210)
                self.examples.append((button, path, question))
        self.panel = gr.HTML(NOTHING_YET, elem_id="vl-panel", padding=False)

    def _add_chat(self) -> None:
        self.chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="vl-chat",
            height="60vh",
            min_height=340,
            render_markdown=False,
            sanitize_html=True,
            editable="user",
            buttons=["copy"],
            placeholder="Add a video, an image or a sound, then ask about it.",
        )
        self.notice = gr.HTML("", elem_id="vl-notice", padding=False)
        with gr.Row(elem_id="vl-ask", equal_height=True):
            self.question = gr.Textbox(
                show_label=False,
                container=False,
                placeholder="Ask about it …",
                scale=6,
                min_width=180,
                elem_id="vl-question",
                autofocus=True,
            )
            size: dict[str, Any] = {"scale": 1, "min_width": 80}
            self.send = gr.Button("Ask", variant="primary", elem_id="vl-send", **size)
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="vl-stop", **size)
        with gr.Row(elem_id="vl-actions"):
            labels = ("Retry", "Undo", "Clear", "Save")
            small = [gr.Button(label, size="sm", min_width=70, elem_id=f"vl-{label.lower()}") for label in labels]
            self.retry, self.undo, self.clear, self.save = small
        self.exported = gr.Textbox(visible="hidden", elem_id="vl-exported")

    def _add_settings(self, limits: Limits, defaults: Defaults) -> None:
        def slider(least: float, most: float, value: float, label: str, info: str, step: float = 1) -> gr.Slider:
            return gr.Slider(least, most, value, step=step, label=label, info=info)

        options, frames = defaults.options, defaults.num_frames or DEFAULT_NUM_FRAMES
        self.num_frames = slider(1, limits.frames, frames, "Frames to look at", "for the next video")
        self.listen = gr.Checkbox(defaults.listen, label="Listen to the sound", info="of the next video")
        temperature = slider(0, limits.temperature, options.temperature, "Temperature", "0 is greedy", 0.05)
        top_p = slider(0.05, 1, options.top_p, "Top-p", "with a temperature above 0", 0.05)
        beams = slider(1, limits.beams, options.num_beams, "Beams", "above 1 nothing streams")
        longest = slider(1, limits.answer_tokens, options.max_new_tokens, "Longest answer", "in tokens")
        # In the order of `answer_options`.
        self.answer_settings = [temperature, top_p, beams, longest]


def launch_look(limits: Limits) -> dict[str, Any]:
    """Return the style and the script of the page, as arguments of `launch`."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    # Fonts that every system has: others would be fetched from elsewhere.
    theme = gr.themes.Soft(
        primary_hue="indigo",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(block_border_width="1px", input_border_width="1px")
    head = f"<script>window.uploadBytes = {limits.upload_bytes};\n{script}</script>"
    return {"theme": theme, "css_paths": [FOLDER / "page.css"], "head": head}
