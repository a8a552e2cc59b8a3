"""The strings of the page: complete in both languages, and none that nobody uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import video_llama.demo
from video_llama.demo.page import PRESETS
from video_llama.demo.strings import LANGUAGES, STRINGS, Texts, choose_language

FOLDER = Path(video_llama.demo.__file__).parent


@pytest.mark.parametrize("key", STRINGS)
def test_a_string_is_there_in_both_languages_with_the_same_values(key: str) -> None:
    english, turkish = STRINGS[key]
    assert english.strip()
    assert turkish.strip()
    assert sorted(re.findall(r"\{(\w+)\}", english)) == sorted(re.findall(r"\{(\w+)\}", turkish))
    # Words of their own: only names and terms may be the same.
    assert english != turkish or key in ("answers_with", "help_paper", "top_p")


def test_every_string_is_used_and_every_used_one_is_there() -> None:
    code = {
        path: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.suffix in (".py", ".js", ".html")
    }
    everything = "\n".join(text for path, text in code.items() if path.name != "strings.py")
    unused = [
        key
        for key in STRINGS
        if not re.search(rf"[\"']{key.removesuffix('_one').removesuffix('_info')}[\"']", everything)
    ]
    assert unused == ["frame_at", "audio_at"]  # made of the kind of a strip
    used = re.findall(r"""(?:\btexts|vl\.text)\(\s*["'](\w+)["']""", everything)
    used += re.findall(r"""data-[tlp]="(\w+)\"""", everything)
    assert len(used) > 60
    assert set(used) - set(STRINGS) == set()
    assert set(PRESETS) <= set(STRINGS)


def test_numbers_choose_their_form() -> None:
    assert Texts("en")("frames_seen", 1) == "1 frame seen"
    assert Texts("en")("frames_seen", 8) == "8 frames seen"
    assert Texts("tr")("queue", 1) == "Bekleniyor: sizden önce bir istek var"


@pytest.mark.parametrize(
    ("wanted", "accepted", "language"),
    [
        (None, None, "en"),
        (None, "tr-TR,tr;q=0.9,en;q=0.8", "tr"),
        (None, "de-DE, de;q=0.9, tr;q=0.5, en;q=0.3", "tr"),
        (None, "en-GB,tr;q=0.5", "en"),
        (None, "*", "en"),
        ("tr", "en", "tr"),
        ("en", "tr", "en"),
        ("xx", "tr", "tr"),
        (["tr"], "", "en"),
        ({}, "trx", "en"),
    ],
)
def test_the_language_is_the_chosen_one_or_the_browsers(wanted: object, accepted: str | None, language: str) -> None:
    assert choose_language(wanted, accepted) == language
    assert language in LANGUAGES
