"""Captions, questions and answers say what is true, in words that a strict parser finds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.tiny_world.world.chinese import WORDS, ask_in_chinese
from examples.tiny_world.world.facts import Facts, facts_of
from examples.tiny_world.world.language import FOLLOW_UPS, QUESTIONS, ask, caption, describe
from examples.tiny_world.world.sounds import random_sound
from examples.tiny_world.world.vocabulary import ATTRIBUTES, NO_SOUND_TRACK, SHAPES, plural_of
from tests.tiny_world.conftest import random_scenes

RNG = np.random.default_rng(5)
CLIPS = [
    facts_of(scene, random_sound(RNG, 2.0) if number % 5 else None) for number, scene in enumerate(random_scenes(150))
]
PICTURES = [facts_of(scene, None) for scene in random_scenes(100, moving=False)]
SOUND_FACTS = [facts_of(None, random_sound(RNG, 2.0)) for _ in range(40)]
EVERYTHING = CLIPS + PICTURES + SOUND_FACTS


def found_values(attribute: str, text: str) -> list[str]:
    """The values of an attribute that a text names, in order; the longest match counts."""
    words = {value: value for value in ATTRIBUTES[attribute]}
    if attribute == "shape":
        words |= {plural_of(shape): shape for shape in SHAPES}
    pattern = "|".join(sorted(words, key=len, reverse=True))
    return [words[match] for match in re.findall(rf"\b({pattern})\b", text.lower())]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_answer_names_its_value_and_no_other(attribute: str) -> None:
    having = [facts for facts in EVERYTHING if attribute in facts.values]
    assert len(having) > 30
    for facts in having:
        _, answer = ask(attribute, facts, RNG)
        assert found_values(attribute, answer) == [facts.values[attribute]], answer
        assert re.fullmatch(r"[A-Z][a-z, ]+\.", answer), answer


def test_the_answer_on_order_names_both_values_in_their_order_or_says_that_nothing_changes() -> None:
    for facts in CLIPS:
        _, answer = ask("order", facts, RNG)
        if facts.changes is None:
            assert "nothing" in answer.lower()
        else:
            assert found_values(facts.changes, answer) == [facts.first, facts.then]
            assert facts.changes not in facts.values


def test_what_a_pitch_does_follows_from_the_sound() -> None:
    expected = {"rising tone": "The pitch rises.", "falling tone": "The pitch falls."}
    for facts in SOUND_FACTS:
        if facts.values["sound"] == "silence":
            assert "pitch" not in facts.values
        else:
            answer = ask("pitch", facts, RNG)[1]
            assert answer == expected.get(facts.values["sound"], "The pitch stays the same.")


def test_a_clip_without_sound_track_says_so_and_silence_is_something_else() -> None:
    silent = [facts for facts in CLIPS if facts.values["sound"] == NO_SOUND_TRACK]
    assert silent
    assert {ask("sound", facts, RNG)[1] for facts in silent} == {
        "There is no sound track.",
        "The video has no sound track.",
    }
    assert all("pitch" not in facts.values for facts in silent)


def test_verbs_and_nouns_are_in_the_right_number() -> None:
    for facts in CLIPS:
        answers = " ".join(ask(name, facts, RNG)[1] for name in ("count", "motion", "size"))
        wrong = r"\b(It is|moves|stays|There is)\b" if facts.is_plural else r"\b(They|move|stay|There are)\b"
        assert not re.search(wrong, answers), answers


@pytest.mark.parametrize("facts", [CLIPS, PICTURES, SOUND_FACTS], ids=["clips", "pictures", "sounds"])
def test_a_caption_names_all_there_is(facts: list[Facts]) -> None:
    for one in facts:
        text = caption(one, RNG)
        assert "{" not in text
        for attribute in one.visual if one.visual else ["sound"]:
            if attribute == "count" and not one.is_plural:
                assert re.search(r"\b(a|one) (small|large)\b", text)
            elif attribute == "colour":
                assert found_values("colour", text.replace("background", ""))[0] == one.values["colour"]
            elif attribute == "order":
                assert one.changes is None or re.search(rf"{one.first}\w* (to|into) (a )?{one.then}", text)
            else:
                assert one.values[attribute] in text, (attribute, text)


def test_a_description_is_a_caption_as_a_sentence() -> None:
    question, text = describe(PICTURES[0], RNG)
    assert "picture" in question
    assert re.fullmatch(r"[A-Z].*[a-z]\.", text)


@pytest.mark.parametrize("table", [QUESTIONS, FOLLOW_UPS], ids=["first", "later"])
def test_every_attribute_is_asked_about_in_several_ways(table: dict[str, tuple[str, ...]]) -> None:
    assert {*ATTRIBUTES, "order", "pitch"} == set(table)
    assert all(len(set(ways)) > 1 for ways in table.values())
    # No question belongs to two attributes.
    assert len({way for ways in table.values() for way in ways}) == sum(map(len, table.values()))


def test_questions_are_the_same_for_one_object_and_for_several() -> None:
    for attribute in ("shape", "count", "motion"):
        asked = {
            plural: {
                ask(attribute, facts, RNG)[0]
                for facts in CLIPS
                if facts.is_plural == plural and attribute in facts.values
            }
            for plural in (False, True)
        }
        assert asked[False] == asked[True] == set(QUESTIONS[attribute])


def test_later_questions_are_follow_ups() -> None:
    assert ask("sound", SOUND_FACTS[0], RNG, follow_up=True)[0].startswith("And what d")


def test_what_is_not_known_cannot_be_asked() -> None:
    with pytest.raises(KeyError):
        ask("motion", PICTURES[0], RNG)


@pytest.mark.parametrize("attribute", WORDS)
def test_chinese_answers_name_the_same_values(attribute: str) -> None:
    for facts in (facts for facts in CLIPS if attribute in facts.values):
        question, answer = ask_in_chinese(attribute, facts, RNG)
        named = [value for value, word in WORDS[attribute].items() if word in answer]
        assert named == [facts.values[attribute]]
        assert not re.search("[A-Za-z]", question + answer)


def test_chinese_answers_tell_the_order() -> None:
    for facts in (facts for facts in CLIPS if facts.changes):
        words = WORDS[facts.changes]
        assert ask_in_chinese("order", facts, RNG)[1] == f"先是{words[facts.first]},然后是{words[facts.then]}。"


def test_chinese_has_words_for_all_that_can_be_seen_in_a_clip() -> None:
    assert all(set(words) == set(ATTRIBUTES[attribute]) for attribute, words in WORDS.items())
