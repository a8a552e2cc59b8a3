"""Caption cleaning; every recorded case is in tests/parity/test_text_parity.py."""

from __future__ import annotations

from video_llama.processor.builders import BlipCaptionProcessor
from video_llama.registry import PROCESSORS


def test_the_registry_builds_the_caption_processor_with_its_settings() -> None:
    clean = PROCESSORS.build("blip_caption", prompt="a video of ", max_words=3)
    assert isinstance(clean, BlipCaptionProcessor)
    assert clean("A Man, riding: FAST!") == "a video of a man, riding"


def test_a_caption_of_exactly_the_allowed_words_is_kept_whole() -> None:
    clean = BlipCaptionProcessor(max_words=4)
    assert clean("one two three four") == "one two three four"
    assert clean("one two three four five") == "one two three four"


def test_punctuation_leaves_single_spaces() -> None:
    assert BlipCaptionProcessor()('He said: "no"; (twice)...') == "he said no twice"


def test_other_scripts_are_kept() -> None:
    assert BlipCaptionProcessor()("Çok güzel! 视频。") == "çok güzel 视频。"
