"""Words that are not used in messages, docstrings and documents: those of people for programs, and archaic ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import video_llama

PACKAGE = Path(video_llama.__file__).parent
ROOT = PACKAGE.parent
WORDS = re.compile(
    r"\b(told|hear|hears|heard|lies?|shall|(?:take|takes|taken) in|mend(?:s|ed)?|no \w+ here)\b", re.IGNORECASE
)
# Questions to a model and its answers, values in files ("heard"), and tables of code or JSON are quotations.
QUOTED = re.compile(r"\"[^\"\n]*\"|`[^`\n]*`|“[^”\n]*”|I hear [\w ]+\.")
# Sentences that readers from elsewhere did not understand, by the words that made them so.
REPLACED = """\
Only the last question can be changed
clear it first
could not be taken in
no question to answer again
too many people
Looking at and listening
above 1 nothing streams
Longest answer
key frames are too far apart
neither video nor sound but
no GPU of Apple
torch sees
no such folder here
not to be had from
no such file or folder; it should be
ask you to accept their terms
so it cannot hear
something else is served
puts the page on the internet
who may connect
0 is greedy (0)
is called like this
there are captions already
how the run was begun
says nothing: there is no answer
other parts trained there
holds a run already
is slow; a tokenizer.json
Two commands
go on with the same result
is all they need
that shall be converted
are no bad samples
is never written over
also if it goes to all processes
it is told
is learnt, and nothing else
What is typed stays text
cannot be had
What was mended for this
could not be captioned; their lines have an error
""".splitlines()
# What stands in the prompts of the published models, word for word.
PROMPTS = {"prompt_parts.py"}


def forbidden(text: str) -> list[str]:
    return [match[0].lower() for match in WORDS.finditer(QUOTED.sub("", text))]


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string literal, docstrings and parts of f-strings included."""
    for node in ast.walk(ast.parse(source)):
        # Literals of one word are values, not sentences.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def in_package() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in PROMPTS:
            continue
        for line, text in texts_of(path.read_text(encoding="utf-8")):
            name = path.relative_to(ROOT).as_posix()
            # A question that is put to a model is a literal of its own.
            if not text.endswith("?"):
                found += [f"{name}:{line}: {word}" for word in forbidden(text)]
    return found


def in_documents() -> list[str]:
    found = []
    for path in sorted([*(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.md"), ROOT / "README.md"]):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in forbidden(line)]
    return found


def test_no_message_and_no_docstring_has_one_of_the_words() -> None:
    assert in_package() == []


def test_no_document_has_one_of_the_words() -> None:
    assert in_documents() == []


def test_no_sentence_that_was_replaced_is_back() -> None:
    paths = [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "scripts").glob("*.*"),
        ROOT / "README.md",
    ]
    found = []
    for path in paths:
        # Long messages are broken between literals, and documents between lines.
        text = " ".join(re.sub(r'"\s+f?"', "", path.read_text(encoding="utf-8")).split())
        found += [f"{path.relative_to(ROOT)}: {sentence}" for sentence in REPLACED if sentence in text]
    assert found == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("there is no device here", ["no device here"]),
        ("3.5 s of sound heard", ["heard"]),
        ("as it was told", ["told"]),
        ("families of bodies, relied on; mental, shallow, untold", []),
        ('{"sound": "heard"}, and `heard`', []),
        ("a red star moves left. I hear beeps.", []),
    ],
)
def test_words_are_found_and_quotations_are_not(text: str, words: list[str]) -> None:
    assert forbidden(text) == words


def test_parts_of_f_strings_and_docstrings_are_read() -> None:
    source = 'def f(a):\n    """Was told."""\n    return f"{a} lies there"\n'
    assert [word for _, text in texts_of(source) for word in forbidden(text)] == ["told", "lies"]
