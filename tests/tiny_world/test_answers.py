"""The strict reading of free-text answers."""

from __future__ import annotations

import numpy as np
import pytest

from examples.tiny_world.evaluation.answers import parse_answer
from examples.tiny_world.world.facts import facts_of
from examples.tiny_world.world.language import ask
from examples.tiny_world.world.samples import random_sample


@pytest.mark.parametrize(
    ("attribute", "text", "value"),
    [
        ("shape", "It is a circle.", "circle"),
        ("shape", "They are crosses.", "cross"),
        ("colour", "The colour is RED!", "red"),
        ("size", "They are large.", "large"),
        ("count", "There are three stars.", "three"),
        ("motion", "The rings move up.", "up"),
        ("motion", "It stays still.", "still"),
        ("background", "I see a grey background.", "grey"),
        ("position", "The star is at the bottom right.", "bottom right"),
        ("position", "It is left.", "left"),
        ("sound", "You can hear a rising tone.", "rising tone"),
        ("sound", "There is no sound track.", "no sound track"),
        ("sound", "I hear silence.", "silence"),
        ("pitch", "The pitch stays the same.", "stays the same"),
        ("order", "They are first red, then blue.", "red, then blue"),
        ("order", "First it is a circle, then it is a star.", "circle, then star"),
        ("order", "First they are crosses, then they are rings.", "cross, then ring"),
        ("order", "Nothing changes.", "nothing"),
    ],
)
def test_an_answer_that_names_one_value_is_read_as_it(attribute: str, text: str, value: str) -> None:
    assert parse_answer(attribute, text) == value


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ("colour", ""),
        ("colour", "I do not know."),
        ("colour", "It is red or blue."),
        ("colour", "It is reddish."),
        ("shape", "It is a circle, not a star."),
        ("position", "It is at the top left or at the right."),
        ("sound", "I hear noise and a whistle."),
        ("motion", "It moves up and down."),
        ("order", "It is red."),
        ("order", "It is red, then a star."),
        ("order", "It is first red, then red."),
        ("order", "Red blue, then green."),
        ("order", "Nothing changes from red, then blue."),
        ("order", "Red and blue."),
    ],
)
def test_an_answer_that_names_no_value_or_several_says_nothing(attribute: str, text: str) -> None:
    assert parse_answer(attribute, text) is None


@pytest.mark.parametrize("stream", ["clip", "image", "sound"])
def test_every_answer_of_the_corpus_is_read_as_its_value(stream: str) -> None:
    for index in range(60):
        for entry in random_sample(5, "test", stream, index).questions:
            assert parse_answer(entry["attribute"], entry["answer"]) == entry["value"], entry


def test_an_answer_is_not_read_as_another_value_of_its_attribute() -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        sample = random_sample(5, "test", "clip", index)
        facts = facts_of(sample.scene, sample.sound)
        other = facts_of(random_sample(6, "test", "clip", index).scene, None)
        for attribute in facts.visual:
            if attribute in other.values and other.values[attribute] != facts.values[attribute]:
                assert parse_answer(attribute, ask(attribute, other, rng)[1]) != facts.values[attribute]


def test_an_unknown_attribute_is_an_error() -> None:
    with pytest.raises(KeyError):
        parse_answer("weight", "It is heavy.")
