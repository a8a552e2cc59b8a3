"""What is on the page, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from video_llama.demo.limits import Limits
from video_llama.demo.views import NOTHING_YET
from video_llama.inference.generation import GenerationOptions
from video_llama.processor.media_processor import DEFAULT_NUM_FRAMES

__all__ = ["EXAMPLES", "Page", "build_page"]

SAMPLES = Path(__file__).parent / "samples"
EXAMPLES = [
    (SAMPLES / "stars.mp4", "Which way does the motion go?"),
    (SAMPLES / "stars.mp4", "What do you hear?"),
    (SAMPLES / "cross.jpg", "What colour do you see?"),
    (SAMPLES / "tone.m4a", "Does the pitch rise or fall?"),
]
"""Of the generated world that the small model of the package knows."""


@dataclass
class Page:
    """The components that something happens to."""

    notice: gr.HTML
    upload: gr.File
    webcam: gr.Video
    microphone: gr.Audio
    examples: list[tuple[gr.Button, Path, str]]
    panel: gr.HTML
    chatbot: gr.Chatbot
    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    clear: gr.Button
    save: gr.Button
    exported: gr.Textbox
    num_frames: gr.Slider
    listen: gr.Checkbox
    temperature: gr.Slider
    top_p: gr.Slider
    num_beams: gr.Slider
    max_new_tokens: gr.Slider

    @property
    def changing(self) -> list[Any]:
        """What handlers may change."""
        return [
            self.notice,
            self.upload,
            self.webcam,
            self.microphone,
            self.panel,
            self.chatbot,
            self.question,
            self.send,
            self.stop,
            self.retry,
            *self.example_buttons,
        ]

    @property
    def example_buttons(self) -> list[Any]:
        """One for each example."""
        return [button for button, _, _ in self.examples]


def build_page(
    title: str, options: GenerationOptions, limits: Limits, num_frames: int | None = None, listen: bool = True
) -> Page:
    """Lay the page out; call it inside `gr.Blocks`.

    Args:
        title: which model answers.
        options: what the controls are set to.
        limits: what they can be set to.
        num_frames, listen: how the next video is taken in; the model's number of frames is set when it is there.
    """
    answerer = f"; {title} answers" if title else ""
    gr.HTML(
        f"<h1>Video-LLaMA</h1><p>Ask about a video, an image or a sound{answerer}.</p>",
        elem_id="vl-head",
        padding=False,
    )
    with gr.Row(elem_id="vl-columns"):
        with gr.Column(scale=5, min_width=320):
            found = _media_column(limits)
        with gr.Column(scale=6, min_width=320):
            found |= _chat_column()
            with gr.Accordion("Settings", open=False, elem_id="vl-settings"):
                found |= _settings(options, limits, num_frames or DEFAULT_NUM_FRAMES, listen)
    return Page(**found)


def _media_column(limits: Limits) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with gr.Tabs(elem_id="vl-sources"):
        with gr.Tab("File"):
            found["upload"] = gr.File(
                label=f"Video, image or sound, up to {limits.upload_mb:g} MB",
                height=170,
                elem_id="vl-upload",
            )
        with gr.Tab("Webcam"):
            webcam = gr.WebcamOptions(mirror=False)
            found["webcam"] = gr.Video(
                sources=["webcam"], include_audio=True, webcam_options=webcam, label="Record a video", height=240
            )
        with gr.Tab("Microphone"):
            found["microphone"] = gr.Audio(sources=["microphone"], type="filepath", label="Record a sound")
    found["examples"] = []
    gr.HTML("Examples", elem_id="vl-examples-title", padding=False)
    with gr.Row(elem_id="vl-examples"):
        for path, question in EXAMPLES:
            button = gr.Button(f"{path.name}: {question}", size="sm", variant="secondary", min_width=210)
            found["examples"].append((button, path, question))
    found["panel"] = gr.HTML(NOTHING_YET, elem_id="vl-panel", padding=False)
    return found


def _chat_column() -> dict[str, Any]:
    found: dict[str, Any] = {
        "chatbot": gr.Chatbot(
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
    }
    found["notice"] = gr.HTML("", elem_id="vl-notice", padding=False)
    with gr.Row(elem_id="vl-ask", equal_height=True):
        found["question"] = gr.Textbox(
            show_label=False,
            container=False,
            placeholder="Ask about it …",
            scale=6,
            min_width=180,
            elem_id="vl-question",
            autofocus=True,
        )
        found["send"] = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="vl-send")
        found["stop"] = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False, elem_id="vl-stop")
    with gr.Row(elem_id="vl-actions"):
        for name in ("retry", "undo", "clear", "save"):
            label = "Save" if name == "save" else name.capitalize()
            found[name] = gr.Button(label, size="sm", min_width=70, elem_id=f"vl-{name}")
    found["exported"] = gr.Textbox(visible="hidden", elem_id="vl-exported")
    return found


def _settings(options: GenerationOptions, limits: Limits, num_frames: int, listen: bool) -> dict[str, Any]:
    hottest, widest, longest = limits.temperature, limits.beams, limits.answer_tokens
    return {
        "num_frames": gr.Slider(
            1, limits.frames, num_frames, step=1, label="Frames to look at", info="for the next video"
        ),
        "listen": gr.Checkbox(listen, label="Listen to the sound", info="of the next video"),
        "temperature": gr.Slider(0, hottest, options.temperature, step=0.05, label="Temperature", info="0 is greedy"),
        "top_p": gr.Slider(0.05, 1, options.top_p, step=0.05, label="Top-p", info="with a temperature above 0"),
        "num_beams": gr.Slider(1, widest, options.num_beams, step=1, label="Beams", info="above 1 nothing streams"),
        "max_new_tokens": gr.Slider(
            1, longest, options.max_new_tokens, step=1, label="Longest answer", info="in tokens"
        ),
    }
