"""`chat_template.jinja` writes what the package's own templates write."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from video_llama import VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.conversation import conv_templates
from video_llama.processor.jinja import write_jinja
from video_llama.prompt_parts import video_with_audio_prefix

NAMES = sorted(set(conv_templates) - {"tokenizer"})
TEXTS = ["What?", "", "  two  ", "a line\nand one\n\n", " lead", "trail ", "###", "[INST]", "{{ x }}", "héé 😀"]


@pytest.fixture(scope="module")
def processor() -> VideoLlamaProcessor:
    return VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")


def draw_content(rng: random.Random, media: bool) -> Any:
    text = rng.choice(TEXTS)
    if rng.random() < 0.4:
        return text if text.strip() or not media else "A question"
    items = [{"type": "text", "text": rng.choice(TEXTS)} for _ in range(rng.randint(1, 3))]
    if media:
        for _ in range(rng.randint(0, 3)):
            items.insert(rng.randint(0, len(items)), {"type": rng.choice(["image", "video", "audio"])})
        items.append({"type": "text", "text": "A question"})
    return items


def draw_messages(rng: random.Random, is_open: bool) -> list[dict[str, Any]]:
    """Turns of a user, who may say several things in a row, and of an assistant."""
    messages = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(TEXTS)})
    for _ in range(rng.randint(1, 4)):
        messages += [{"role": "user", "content": draw_content(rng, True)} for _ in range(rng.choice([1, 1, 1, 2]))]
        messages.append({"role": "assistant", "content": draw_content(rng, False)})
    if is_open:
        messages.pop()
    return messages


def render(template: str | None, messages: Any, **options: Any) -> tuple[str, list[tuple[int, int]]]:
    texts, answers = render_jinja_template([messages], chat_template=template, **options)
    return texts[0], answers[0] if answers else []


@pytest.mark.parametrize("name", NAMES)
def test_200_conversations_are_written_as_the_package_writes_them(name: str, processor: VideoLlamaProcessor) -> None:
    rng = random.Random(name)
    written = VideoLlamaProcessor(processor.tokenizer, 840, 841, conv_template=name)
    template = write_jinja(conv_templates[name])
    for _ in range(200):
        is_open = rng.random() < 0.5
        messages = draw_messages(rng, is_open)
        ours = written.apply_chat_template(messages, add_generation_prompt=is_open)
        assert render(template, messages, add_generation_prompt=is_open)[0] == ours


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_marked_with_what_ends_them(name: str) -> None:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    text, answers = render(write_jinja(conv_templates[name]), messages, return_assistant_tokens_mask=True)
    assert [text[start:end].strip().startswith("Two.") for start, end in answers] == [True]
    assert answers[0][1] == len(text)


def test_typed_placeholders_are_no_placeholders() -> None:
    for name in NAMES:
        messages = [{"role": "user", "content": "<ImageHere> and <AudioHere>"}]
        text, _ = render(write_jinja(conv_templates[name]), messages)
        assert "<ImageHere>" not in text
        assert "<AudioHere>" not in text


def test_a_video_and_its_audio_behind_it_are_introduced_together() -> None:
    items = [{"type": "video", "path": "a.mp4"}, {"type": "audio", "path": "a.mp4"}, {"type": "text", "text": "What?"}]
    text, _ = render(write_jinja(conv_templates["v1"]), [{"role": "user", "content": items}])
    together = "".join(getattr(item, "token", item) for item in video_with_audio_prefix())
    assert together + " What?" in text


def test_a_saved_folder_has_the_template(processor: VideoLlamaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == processor.chat_template
    messages = [{"role": "user", "content": "Hello"}]
    assert render(template, messages)[0] == "<s>" + processor.apply_chat_template(messages)
    assert VideoLlamaProcessor.from_pretrained(tmp_path).chat_template == template
