"""Captions, questions and answers in English: several wordings of each, simple enough for a strict parser.

Questions do not reveal whether there are one or several objects.
"""

from __future__ import annotations

from numpy.random import Generator

from examples.tiny_world.world.facts import Facts
from examples.tiny_world.world.vocabulary import NO_SOUND_TRACK, plural_of

__all__ = ["FOLLOW_UPS", "QUESTIONS", "answer", "ask", "caption", "describe", "describe_both"]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": ("What shape do you see?", "Which shape is shown?", "What is the shape?", "Name the shape."),
    "colour": ("What colour do you see?", "Which colour is shown?", "What is the colour?", "Name the colour."),
    "size": ("Is the size small or large?", "What is the size?", "Which size is shown?", "Name the size."),
    "count": ("How many do you see?", "How many are there?", "What is the number of shapes?", "Count the shapes."),
    "motion": (
        "Which way does the motion go?",
        "What is the direction of motion?",
        "Where does the movement go?",
        "Name the direction of motion.",
    ),
    "background": (
        "What colour is the background?",
        "Which background do you see?",
        "What is the background?",
        "Name the background.",
    ),
    "order": (
        "What comes first and what comes then?",
        "Does anything change?",
        "What changes during the video?",
        "What happens first and what then?",
    ),
    "sound": ("What do you hear?", "What did you hear?", "Which sound is there?", "What is the sound?"),
    "pitch": ("Does the pitch rise or fall?", "What does the pitch do?", "How does the pitch change?"),
    "position": (
        "Where in the picture is the shape?",
        "Which part of the picture shows the shape?",
        "What is the position?",
        "Name the position.",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "shape": ("And what shape is it?", "And which shape?"),
    "colour": ("And what colour is it?", "And which colour?"),
    "size": ("And how big is it?", "And which size?"),
    "count": ("And how many are there?", "And how many?"),
    "motion": ("And which way does it go?", "And in which direction?"),
    "background": ("And what is the background?", "And which background?"),
    "order": ("And does anything change?", "And what comes first and what then?"),
    "sound": ("And what did you hear?", "And what do you hear?"),
    "pitch": ("And does the pitch rise or fall?", "And what does the pitch do?"),
    "position": ("And where is it?", "And in which position?"),
}
"""For later turns of a conversation."""

_DESCRIBE_ANYTHING = ("Please describe this in detail.", "Describe this.")
_DESCRIBE = {
    "video": (
        "Describe the video.",
        "What happens in the video?",
        "What does the video show?",
        "What happens here?",
        "What is happening?",
        *_DESCRIBE_ANYTHING,
    ),
    "picture": (
        "Describe the picture.",
        "Describe the image.",
        "What is in the picture?",
        "What does the picture show?",
        "What do you see?",
        *_DESCRIBE_ANYTHING,
    ),
    "sound": (
        "Describe the sound.",
        "What is in the recording?",
        "What does the recording hold?",
        *_DESCRIBE_ANYTHING,
    ),
}

_DESCRIBE_BOTH = ("What do you see and hear?", "Describe what you see and hear.")

_ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": ("{It_is} {shape}.", "I see {shape}."),
    "colour": ("{It_is} {colour}.", "The colour is {colour}."),
    "size": ("{It_is} {size}.", "The size is {size}."),
    "count": ("There {is_} {count} {noun}.", "I see {count} {noun}."),
    "motion": ("{It} {moves}.", "The {noun} {moves}."),
    "background": ("The background is {background}.", "I see a {background} background."),
    "order": ("{It_is} first {first}, then {then}.", "First {it_is} {first}, then {it_is} {then}."),
    "sound": ("I hear {sound}.", "You can hear {sound}."),
    "pitch": ("The pitch {pitch}.",),
    "position": ("{It_is} {position}.", "The {noun} {is_} {position}."),
}
_NO_CHANGE = ("Nothing changes.", "There is nothing that changes.")
_NO_SOUND = ("There is no sound track.", "The video has no sound track.")

_CAPTIONS = {
    "picture": (
        "{objects} {position} on a {background} background",
        "a picture of {objects} {position} on {background}",
    ),
    "video": ("{objects} {moves} on a {background} background", "on a {background} background, {objects} {moves}"),
    "sound": ("{sound}", "the sound of {sound}", "you can hear {sound}"),
}
_SOUND_PHRASES = {
    "rising tone": "a rising tone",
    "falling tone": "a falling tone",
    "low hum": "a low hum",
    "whistle": "a whistle",
}


def caption(facts: Facts, rng: Generator) -> str:
    """Return a caption with all facts of the frames (or of an audio file), without a full stop."""
    return str(rng.choice(_CAPTIONS[facts.medium])).format(**_phrases(facts, rng))


def describe(facts: Facts, rng: Generator) -> tuple[str, str]:
    """Return a question for a description, and the description as a sentence."""
    text = caption(facts, rng)
    return str(rng.choice(_DESCRIBE[facts.medium])), f"{text[0].upper()}{text[1:]}."


def describe_both(facts: Facts, rng: Generator) -> tuple[str, str]:
    """Return a question about frames and audio of a clip, and two sentences in answer."""
    has_sound = facts.values["sound"] != NO_SOUND_TRACK
    questions = (*_DESCRIBE_BOTH, *_DESCRIBE["video"]) if has_sound else _DESCRIBE_BOTH
    text = caption(facts, rng)
    return str(rng.choice(questions)), f"{text[0].upper()}{text[1:]}. {answer('sound', facts, rng)}"


def ask(attribute: str, facts: Facts, rng: Generator, *, follow_up: bool = False) -> tuple[str, str]:
    """Return a question on one attribute, and its answer.

    Raises:
        KeyError: the attribute is unknown, or these facts do not have it.
    """
    question = str(rng.choice((FOLLOW_UPS if follow_up else QUESTIONS)[attribute]))
    return question, answer(attribute, facts, rng)


def answer(attribute: str, facts: Facts, rng: Generator) -> str:
    """Return a full sentence that names the attribute's value."""
    value = facts.values[attribute]
    ways = _ANSWERS[attribute]
    if attribute == "order" and facts.changes is None:
        ways = _NO_CHANGE
    elif value == NO_SOUND_TRACK:
        ways = _NO_SOUND
    return str(rng.choice(ways)).format(**_phrases(facts, rng))


def _phrases(facts: Facts, rng: Generator) -> dict[str, str]:
    """Return the words that fill the templates, in singular or plural."""
    values, plural = facts.values, facts.is_plural
    phrases = dict(values)
    phrases["sound"] = _SOUND_PHRASES.get(values.get("sound", ""), values.get("sound", ""))
    if facts.medium == "sound":
        return phrases
    it_is = "they are" if plural else "it is"
    phrases |= {"It": "They" if plural else "It", "It_is": it_is.capitalize(), "it_is": it_is}
    phrases |= {"is_": "are" if plural else "is", "noun": _noun(values.get("shape", "shape"), plural)}
    shape = values.get("shape", "shape")
    phrases["shape"] = _noun(shape, plural) if plural else f"a {shape}"
    named = facts.changes == "shape"
    phrases |= {
        part: (_noun(word, plural) if plural else f"a {word}") if named else word
        for part, word in (("first", facts.first), ("then", facts.then))
    }
    objects = _objects(facts, rng)
    if "motion" in values:
        turning = "turn" if plural else "turns"
        if facts.changes == "colour":
            objects += f" {turning} from {facts.first} to {facts.then} and"
        elif facts.changes == "shape":
            objects += f" {turning} from {phrases['first']} into {phrases['then']} and"
        phrases["moves"] = _moves(values["motion"], plural)
    if "position" in values:
        phrases["position"] = _place(values["position"])
    phrases["objects"] = objects
    return phrases


def _objects(facts: Facts, rng: Generator) -> str:
    """Return for instance "two small red circles", without the attribute that changes."""
    values, plural = facts.values, facts.is_plural
    article = "one" if not plural and rng.random() < 0.5 else "a"
    words = [values["count"] if plural else article, values["size"], values.get("colour", "")]
    return " ".join([*filter(None, words), _noun(values.get("shape", "shape"), plural)])


def _noun(word: str, plural: bool) -> str:
    return plural_of(word) if plural else word


def _moves(motion: str, plural: bool) -> str:
    verb = "stay" if motion == "still" else "move"
    return f"{verb}{'' if plural else 's'} {motion}"


def _place(position: str) -> str:
    preposition = {"centre": "in", "left": "on", "right": "on"}.get(position, "at")
    return f"{preposition} the {position}"
