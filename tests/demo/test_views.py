"""What the model saw and heard, as people and programs read it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import frame_number
from video_llama.demo import views
from video_llama.demo.session import Session

NASTY = '<img src=x onerror="alert(1)">.mp4'


@pytest.fixture
def asked(session: Session, make_video: Callable[..., Path]) -> Session:
    """A session with one video with sound and one answered question about it."""
    session.add(make_video("clip.mp4", audio=True), NASTY, num_frames=4, listen=True)
    list(session.ask("Is 1 < 2 & <b>bold</b>?", max_new_tokens=4))
    return session


def test_names_and_questions_are_escaped_everywhere(asked: Session) -> None:
    shown = views.media_panel(asked) + views.notice(NASTY, "error") + json.dumps(views.messages(asked))
    assert "<img src=x" not in shown
    assert "<b>" not in shown
    assert "Is 1 &lt; 2 &amp; &lt;b&gt;" in shown
    assert html.unescape(views.shown_text("1 < 2 &amp; 3")) == "1 < 2 &amp; 3"


def test_the_strip_shows_every_frame_in_order_with_time_and_share(asked: Session) -> None:
    panel = views.media_panel(asked)
    seconds = [float(text) for text in re.findall(r'data-seconds="([\d.]+)"', panel)]
    frames = asked.media[0].upload.frames
    assert seconds[:4] == [round(time, 3) for time in frames.times_seconds]
    assert len(seconds) == 4 + 8
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", panel)
    numbers = [frame_number(np.asarray(Image.open(io.BytesIO(base64.b64decode(one))))) for one in pictures]
    assert numbers == frames.indices
    assert panel.count("data:image/png") == 8


def test_the_highest_bar_is_full_and_the_others_are_in_proportion(asked: Session) -> None:
    cells = [views._cell("", 1.0, share, 0.6, "Frame") for share in (0.6, 0.3, 0.0)]
    assert [re.findall(r"height:(\d+)%", cell) for cell in cells] == [["100"], ["50"], ["0"]]
    assert 'aria-label="Frame at 1.0 seconds, 30% of the attention"' in cells[1]


def test_a_spectrum_is_dark_where_silent_bright_where_loud_and_has_deep_notes_below() -> None:
    segment = np.zeros((8, 5), dtype=np.float32)
    segment[0] = 1  # the deepest band
    picture = views.spectrum_image(segment, 0.0, 1.0)
    assert picture.shape == (8, 5, 3)
    assert picture[-1].mean() > 200 > 60 > picture[0].mean()
    assert views.spectrum_image(np.zeros((2, 2), np.float32), 0.0, 0.0).dtype == np.uint8  # silence divides by nothing


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00.0"), (7.54, "0:07.5"), (59.96, "1:00.0"), (3723.04, "1:02:03.0")]
)
def test_times_are_written_as_players_do(seconds: float, text: str) -> None:
    assert views.clock(seconds) == text


def test_messages_are_files_questions_and_answers_in_order(asked: Session) -> None:
    file, question, answer = views.messages(asked)
    assert file["content"] == "4 frames seen, 1.2 s of audio, in 8 segments"
    assert file["metadata"]["title"].startswith("Video: &lt;img")
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert [views.is_last_question(asked, index) for index in range(-1, 4)] == [False, False, True, False, False]


def test_an_image_and_a_sound_have_players_of_their_kind(
    session: Session, image: Path, make_audio: Callable[..., Path]
) -> None:
    session.add(image, "a.png", num_frames=None, listen=True)
    session.add(make_audio(), "b.wav", num_frames=None, listen=True)
    panel = views.media_panel(session)
    assert panel.index("<audio ") < panel.index('<img class="vl-player"')  # the latest file first
    assert "Frames the model saw" not in panel
    assert [views.summary(item.upload) for item in session.media] == [
        "one image",
        "1.0 s of audio, in 8 segments",
    ]


def test_a_gif_is_an_image_to_the_browser_whose_frames_cannot_be_gone_to(session: Session, tmp_path: Path) -> None:
    for count in (4, 1):
        path = tmp_path / f"{count}.gif"
        first, *rest = [Image.new("RGB", (32, 24), (60 * number, 0, 0)) for number in range(count)]
        first.save(path, save_all=True, append_images=rest, duration=200)
        session.add(path, path.name, num_frames=None, listen=True)
    panel = views.media_panel(session)
    assert panel.count('<img class="vl-player"') == panel.count('data-seen="data:image/jpeg;base64,') == 2
    assert ("<video" in panel, "click to go there" in panel) == (False, False)
    assert panel.count(" disabled>") == panel.count("<button") >= 4


def test_an_exported_conversation_can_be_read_again(asked: Session) -> None:
    (turn,) = json.loads(views.conversation_json(asked))["turns"]
    assert (turn["question"], turn["answer"]) == ("Is 1 < 2 & <b>bold</b>?", asked.turns[0].answer)
    assert turn["media"][0]["name"] == NASTY
    assert len(turn["media"][0]["frame_seconds"]) == len(turn["media"][0]["frame_shares"]) == 4
    assert json.loads(views.conversation_json(None)) == {"turns": []}


def test_without_files_the_panel_says_what_to_do() -> None:
    assert "Drop in a video" in views.media_panel(None)
    assert views.notice("") == ""
