"""What the model saw and heard, as people and programs read it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import frame_number
from video_llama.demo import chat_view, exports, views
from video_llama.demo.page import EXAMPLES
from video_llama.demo.session import Session
from video_llama.demo.strings import Texts

ENGLISH, TURKISH = Texts("en"), Texts("tr")
NASTY = '<img src=x onerror="alert(1)">.mp4'


@pytest.fixture
def asked(session: Session, make_video: Callable[..., Path]) -> Session:
    """A session with one video with sound and one answered question about it."""
    session.add(make_video("clip.mp4", audio=True), NASTY, num_frames=4, listen=True)
    list(session.ask("Is 1 < 2 & <b>bold</b>?", max_new_tokens=4))
    return session


def conversation(session: Session | None, texts: Texts = ENGLISH) -> str:
    return chat_view.conversation(session, texts, EXAMPLES)


def test_names_and_questions_are_escaped_everywhere(asked: Session) -> None:
    shown = views.media_panel(asked, ENGLISH) + views.notice(NASTY, "error") + conversation(asked)
    shown += chat_view.progress_bubble(NASTY) + chat_view.answer_bubble(NASTY, ENGLISH, asked.media[0])
    asked.add(asked.media[0].path, NASTY, num_frames=1, listen=False)
    shown += chat_view.attached(asked, ENGLISH, (NASTY, NASTY))
    assert "<img src=x" not in shown
    assert 'onerror="' not in shown
    assert "<b>bold" not in shown
    assert "Is 1 &lt; 2 &amp; &lt;b&gt;" in shown


def test_without_attention_the_strip_has_times_and_no_bars(asked: Session) -> None:
    assert "vl-bar" in views.media_panel(asked, ENGLISH)
    asked.media[0].frame_shares.clear()
    asked.media[0].segment_shares.clear()
    panel = views.media_panel(asked, ENGLISH)
    assert panel.count("data-seconds") == 4 + 8
    assert "vl-bar" not in panel
    assert "%</small>" not in panel


def test_the_strip_shows_every_frame_in_order_with_time_and_share(asked: Session) -> None:
    panel = views.media_panel(asked, ENGLISH)
    seconds = [float(text) for text in re.findall(r'data-seconds="([\d.]+)"', panel)]
    frames = asked.media[0].upload.frames
    assert seconds[:4] == [round(time, 3) for time in frames.times_seconds]
    assert len(seconds) == 4 + 8
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", panel[panel.index("<section") :])
    numbers = [frame_number(np.asarray(Image.open(io.BytesIO(base64.b64decode(one))))) for one in pictures]
    assert numbers == frames.indices
    assert panel.count("data:image/png") == 8


def test_the_highest_bar_is_full_and_the_others_are_in_proportion(asked: Session) -> None:
    cells = [views._cell("", 1.0, share, 0.6, "frame", ENGLISH) for share in (0.6, 0.3, 0.0)]
    assert [re.findall(r"height:(\d+)%", cell) for cell in cells] == [["100"], ["50"], ["0"]]
    assert 'aria-label="Frame at 1.0 seconds, 30 % of the attention"' in cells[1]


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


def test_files_are_with_the_question_about_them_and_only_the_last_can_be_changed(asked: Session) -> None:
    shown = conversation(asked)
    assert shown.index("4 frames seen, all 1.2 s of audio") < shown.index("Is 1 &lt; 2")
    user, bot = shown.split('<article class="message bot">')
    assert ("vl-file" in user, "vl-file" in bot) == (True, False)
    assert shown.count('data-action="edit"') == shown.count('data-action="retry"') == 1
    pending = chat_view.conversation(asked, ENGLISH, EXAMPLES, "And then?")
    assert pending.count('class="message user"') == 2
    assert 'data-action="edit"' not in pending
    again = chat_view.conversation(asked, ENGLISH, EXAMPLES, "In other words?", is_retry=True)
    assert (again.count('class="message user"'), again.count('class="message bot"')) == (1, 0)
    assert "4 frames seen" in again
    assert "4 kare görüldü, 1.2 sn sesin tamamı" in conversation(asked, TURKISH)


def test_files_that_wait_for_a_question_are_in_the_composer_only(session: Session, image: Path) -> None:
    session.add(image, "a.png", num_frames=None, listen=True)
    assert "a.png" in chat_view.attached(session, ENGLISH)
    assert "a.png" not in conversation(session)
    list(session.ask("What is it?", max_new_tokens=2))
    assert "a.png" not in chat_view.attached(session, ENGLISH)
    assert "a.png" in conversation(session)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("It turns at 0:07.5 and at 1:02:03.", [7.5, 3723]),
        ("After 5 seconds, and 12.5 s later; 5. saniyede.", [5, 12.5, 5]),
        ("At 10:99, 1.2.3, 16:9:4:3, 5 stars, v2:30, 3.5 sevens and 7 sec", [7]),
        ("<b>0:05</b>", [5]),
    ],
)
def test_times_in_answers_are_buttons(text: str, seconds: list[float], asked: Session) -> None:
    bubble = chat_view.answer_bubble(text, ENGLISH, asked.media[0])
    assert [float(one) for one in re.findall(r'data-seconds="([\d.]+)"', bubble)] == seconds
    assert f'data-file="{asked.media[0].key}"' in bubble
    plain = re.sub(r"</?button[^>]*>", "", bubble[: bubble.index("</p>")])
    assert plain.endswith(text.replace("<", "&lt;").replace(">", "&gt;"))
    assert "<button" not in chat_view.answer_bubble(text, ENGLISH).replace('class="vl-tool"', "")[: len(text)]


def test_an_image_and_a_sound_have_players_of_their_kind(
    session: Session, image: Path, make_audio: Callable[..., Path]
) -> None:
    session.add(image, "a.png", num_frames=None, listen=True)
    session.add(make_audio(), "b.wav", num_frames=None, listen=True)
    panel = views.media_panel(session, ENGLISH)
    assert panel.index('<img class="vl-player"') < panel.index("<audio ")
    assert panel.count("vl-card") - panel.count(" hidden>") > 1
    assert re.findall(r'aria-selected="(\w+)"', panel) == ["false", "true"]  # the latest file is shown
    assert "Frames that the model gets" not in panel
    assert [views.summary(item.upload, ENGLISH) for item in session.media] == ["one image", "all 1.0 s of audio"]


def test_a_gif_is_an_image_to_the_browser_whose_frames_cannot_be_gone_to(session: Session, tmp_path: Path) -> None:
    for count in (4, 1):
        path = tmp_path / f"{count}.gif"
        first, *rest = [Image.new("RGB", (32, 24), (60 * number, 0, 0)) for number in range(count)]
        first.save(path, save_all=True, append_images=rest, duration=200)
        session.add(path, path.name, num_frames=None, listen=True)
    panel = views.media_panel(session, ENGLISH)
    assert panel.count('<img class="vl-player"') == panel.count('data-seen="data:image/jpeg;base64,') == 2
    assert ("<video" in panel, "click to go there" in panel) == (False, False)
    assert panel.count(" disabled>") == panel.count('class="vl-cell"') >= 4


def test_an_exported_conversation_can_be_read_again(asked: Session) -> None:
    exported = json.loads(exports.conversation_json(asked, "a model"))
    (turn,) = exported["turns"]
    assert (turn["question"], turn["answer"]) == ("Is 1 < 2 & <b>bold</b>?", asked.turns[0].answer)
    assert turn["media"][0]["name"] == NASTY
    assert len(turn["media"][0]["frame_seconds"]) == len(turn["media"][0]["frame_shares"]) == 4
    assert (exported["model"], turn["settings"]) == ("a model", {"max_new_tokens": 4})
    assert datetime.fromisoformat(exported["date"]).tzinfo is not None
    assert json.loads(exports.conversation_json(None))["turns"] == []


def test_a_conversation_as_markdown_has_everything_and_quotes_what_was_written(asked: Session) -> None:
    text = exports.conversation_markdown(asked, "a model", ENGLISH)
    assert text.startswith("# Conversation with a model\n\nDate: 20")
    assert f"**File:** ` {NASTY} ` (4 frames seen" in text
    assert "\n    Is 1 < 2 & <b>bold</b>?\n" in text
    assert "` max_new_tokens=4 `" in text
    assert text.count(NASTY) == text.count(f"` {NASTY} `")
    assert "**Soru:**" in exports.conversation_markdown(asked, "", TURKISH)
    assert exports._code("a ``b` c") == "``` a ``b` c ```"


def test_without_files_the_viewer_is_empty_and_the_conversation_offers_examples() -> None:
    assert views.media_panel(None, ENGLISH) == views.notice("") == ""
    assert conversation(None).count('data-action="example"') == len(EXAMPLES)


def test_a_question_without_any_file_is_marked_until_there_is_one(session: Session, image: Path) -> None:
    mark = f'<p class="vl-no-file">{ENGLISH("no_file")}</p>'
    # While it is answered, and afterwards.
    assert chat_view.conversation(session, ENGLISH, EXAMPLES, "What is it?").count(mark) == 1
    list(session.ask("What is it?", max_new_tokens=2))
    assert conversation(session).count(mark) == 1
    session.add(image, "a.png", num_frames=None, listen=True)
    list(session.ask("And now?", max_new_tokens=2))
    shown = conversation(session)
    assert shown.count(mark) == 1
    assert shown.index(mark) < shown.index("a.png") < shown.index("And now?")
    assert TURKISH("no_file") in conversation(session, TURKISH)
