"""What a notebook shows of a model and of an upload, and a question in one call."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from video_llama.inference.chat import Chat
from video_llama.inference.load import load_pretrained_model
from video_llama.processor.media_processor import MediaProcessor


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    # Large squares of one colour, which scaling and JPEG leave as they are.
    Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST).save(tmp_path / "still.png")
    return tmp_path / "still.png"


class Elements(HTMLParser):
    """The tags of a text in HTML, the addresses of its pictures, and what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_call_answers_as_a_chat_does_and_everything_prints_as_one_line(
    tiny_checkpoint: Path, make_video: Callable[..., Path]
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    clip = make_video("clip.mp4", audio=True)
    chat = Chat(model)
    upload = chat.upload_video(clip)
    chat.ask("What happens?")
    answer = chat.answer(max_new_tokens=6)
    assert model(clip, "What happens?", max_new_tokens=6) == answer
    again = Chat(model)
    again.upload_video(clip)
    assert again("What happens?", max_new_tokens=6) == answer
    assert (again.turns[0].question, again.turns[0].answer) == ("What happens?", answer)
    assert repr(again) == f"Chat({model!r}, files=1, answers=1)"
    assert repr(upload) == f"Upload({str(clip)!r}: 8 frames, one every 0.1 s; audio: all of its 1.2 s)"
    assert upload._repr_html_().count("<img ") == 8
    assert repr(model).startswith(f"VideoLlama({tiny_checkpoint.name}, ")
    assert repr(model).endswith(" M parameters, float32, frames and audio, on cpu)")


def test_a_conversation_is_shown_as_text_and_with_its_frames_and_nothing_in_it_becomes_html(
    tiny_checkpoint: Path, make_video: Callable[..., Path], image: Path
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    chat = Chat(model)
    assert repr(chat.show()) == "(nothing was asked)"
    chat.upload_video(make_video("<b>clip.mp4"), num_frames=3)
    chat.upload_img(image)
    chat.ask("Is it <script>?")
    chat.turns[-1].answer = "It is <i>so</i>."
    chat.ask("Why?")
    first, second, *rest = repr(chat.show()).splitlines()
    assert "<b>clip.mp4: 3 frames, one every" in first
    assert second == f"[{image}: an image]"
    assert rest == ["> Is it <script>?", "It is <i>so</i>.", "> Why?", "(no answer)"]
    shown = Elements()
    shown.feed(chat.show()._repr_html_())
    assert Counter(shown.tags) == {"div": 4, "span": 4, "img": 4, "b": 4, "p": 2, "br": 6}
    assert "Is it <script>?" in shown.text
    assert "It is <i>so</i>." in shown.text


def test_frames_are_shown_as_they_are(make_video: Callable[..., Path], image: Path) -> None:
    processor = MediaProcessor(num_frames=4)
    for media, number in ((processor.process_video(make_video("clip.mp4"))[0], 4), (processor.process_image(image), 1)):
        shown = Elements()
        shown.feed(media._repr_html_())
        pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in shown.sources]
        assert len(pictures) == number
        for picture, frame in zip(pictures, media.frames, strict=True):
            assert picture.size == (112, 112)
            expected = np.asarray(Image.fromarray(frame).resize((112, 112)), dtype=float)
            # JPEG and the way of scaling cost a few grey levels.
            assert np.abs(np.asarray(picture, dtype=float) - expected).mean() < 8
