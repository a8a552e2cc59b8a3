"""The conversation as HTML: questions with their files, answers with times to click, and the empty page."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from pathlib import Path

from video_llama.demo.session import Session, SessionFile
from video_llama.demo.strings import Texts
from video_llama.demo.views import clock, image_url, is_gif, summary, thumbnail
from video_llama.inference.chat import Turn
from video_llama.media.containers import media_kind
from video_llama.media.decode import decode_video
from video_llama.media.image import load_image, resize_image

__all__ = ["Example", "answer_bubble", "attached", "conversation", "example_cards", "progress_bubble", "welcome"]

Example = tuple[Path, str]
# A time in an answer: 1:02:03, 0:07.5, "5 seconds", "7.5 s", "5. saniye". Not a part of a longer number or word.
_TIME = re.compile(
    r"(?<![\w:.])(?:(?:(?P<hours>\d{1,2}):)?(?P<minutes>\d{1,2}):(?P<rest>[0-5]\d(?:\.\d+)?)"
    r"|(?P<seconds>\d+(?:\.\d+)?)\.? ?(?:seconds?|secs?|s|saniye\w*|sn))(?![\w:])"
)


def conversation(
    session: Session | None,
    texts: Texts,
    examples: tuple[Example, ...],
    question: str | None = None,
    is_retry: bool = False,
) -> str:
    """Return all questions and answers; the files that wait for a question are shown by `attached`.

    Args:
        session: the conversation; None for an empty one.
        texts: the language.
        examples: what the empty page offers.
        question: what is being answered at the moment; its answer is not shown here.
        is_retry: whether it takes the place of the last question.
    """
    turns = session.turns if session is not None else []
    asked = [turn for turn in turns if turn.question is not None]
    if session is None or (not asked and question is None):
        return welcome(examples)
    last = None
    if is_retry:
        last = asked.pop()
    elif turns and turns[-1].question is None:
        last = turns[-1]
    bubbles = []
    for turn in asked:
        # A question can be changed while no newer one and no newer file follows it.
        is_last = turn is turns[-1] and question is None
        bubbles.append(_question_bubble(session, turn, str(turn.question), texts, is_last))
        if turn.answer is not None:
            bubbles.append(answer_bubble(turn.answer or texts("no_answer"), texts, _playable(session, turn), is_last))
    if question is not None:
        bubbles.append(_question_bubble(session, last or Turn(), question, texts, False))
    return f'<section class="vl-messages" aria-label="{texts("conversation")}">{"".join(bubbles)}</section>'


def answer_bubble(text: str, texts: Texts, file: SessionFile | None = None, is_last: bool = False) -> str:
    """Return an answer; its times go to `file`, and only the last answer can be given again."""
    tools = _tool("copy", texts)
    if is_last:
        tools += _tool("retry", texts)
    return (
        f'<article class="message bot"><p class="vl-text">{_linked(text, texts, file)}</p>'
        f'<div class="vl-tools">{tools}</div></article>'
    )


def progress_bubble(text: str) -> str:
    """Return the bubble of an answer that has no words yet."""
    dots = '<span class="vl-dots" aria-hidden="true"><i></i><i></i><i></i></span>'
    return f'<article class="message bot vl-typing">{dots}<span>{escape(text)}</span></article>'


def attached(session: Session | None, texts: Texts, busy: tuple[str, str] | None = None) -> str:
    """Return the files that the next question is about, as chips of the composer.

    Args:
        session: the conversation.
        texts: the language.
        busy: name of a file that is being read, and what is done with it.
    """
    chips = []
    if session is not None and session.turns and session.turns[-1].question is None:
        chips = [_file(session.file(upload), texts) for upload in session.turns[-1].uploads]
    if busy is not None:
        name, doing = busy
        chips.append(
            f'<div class="vl-file vl-reading" role="status"><span class="vl-spin" aria-hidden="true"></span>'
            f'<span class="vl-label"><b>{escape(name)}</b><small>{escape(doing)}</small></span></div>'
        )
    return "".join(chips)


def welcome(examples: tuple[Example, ...]) -> str:
    """Return what an empty conversation shows: what to do, and the examples; page.js fills in the strings."""
    return (
        '<div class="vl-empty"><h2 data-t="welcome"></h2><p data-t="welcome_hint"></p>'
        f'<div class="vl-examples" role="group" data-l="examples">{example_cards(examples)}</div></div>'
    )


@cache
def example_cards(examples: tuple[Example, ...]) -> str:
    """Return one button for each example, with an image of its file."""
    return "".join(_example(number, path, question) for number, (path, question) in enumerate(examples))


def _example(number: int, path: Path, question: str) -> str:
    kind = media_kind(path)
    if kind == "audio":
        picture = '<span class="vl-note" aria-hidden="true">♪</span>'
    else:
        # Frames are squashed while they are decoded, images here.
        image = resize_image(load_image(path), 112) if kind == "image" else decode_video(path, 1, 112, 112).frames[0]
        picture = f'<img src="{image_url(image)}" alt="">'
    return (
        f'<button type="button" class="vl-example" data-action="example" data-number="{number}">{picture}'
        f"<span><b>{escape(question)}</b><small>{escape(path.name)}</small></span></button>"
    )


def _question_bubble(session: Session, turn: Turn, question: str, texts: Texts, is_last: bool) -> str:
    files = "".join(_file(session.file(upload), texts) for upload in turn.uploads)
    if files:
        files = f'<div class="vl-files">{files}</div>'
    tools = ""
    if is_last:
        tools = f'<div class="vl-tools">{_tool("edit", texts)}{_tool("undo", texts)}</div>'
    note = ""
    if not _is_about_a_file(session, turn):
        note = f'<p class="vl-no-file">{texts("no_file")}</p>'
    return f'<article class="message user">{files}<p class="vl-text">{escape(question)}</p>{note}{tools}</article>'


def _is_about_a_file(session: Session, turn: Turn) -> bool:
    """Whether there is a file in the conversation up to a turn; a turn that has just begun is its last."""
    for one in session.turns:
        if one.uploads:
            return True
        if one is turn:
            break
    return False


def _file(file: SessionFile, texts: Texts) -> str:
    name, key = escape(file.name), file.key
    shown, remove = escape(texts("open_file", name=file.name)), escape(texts("remove", name=file.name))
    return (
        f'<div class="vl-file"><button type="button" class="vl-open" data-action="open" data-file="{key}" '
        f'aria-label="{shown}"><img src="{thumbnail(file)}" alt=""><span class="vl-label"><b>{name}</b>'
        f"<small>{escape(summary(file.upload, texts))}</small></span></button>"
        f'<button type="button" class="vl-remove" data-action="remove" data-file="{key}" aria-label="{remove}">'
        "✕</button></div>"
    )


def _tool(action: str, texts: Texts) -> str:
    return f'<button type="button" class="vl-tool" data-action="{action}">{texts(action)}</button>'


def _playable(session: Session, turn: Turn) -> SessionFile | None:
    """Return the file in which times of a turn's answer can be gone to: the last video or audio file up to it."""
    found = None
    for one in session.turns:
        for upload in one.uploads:
            file = session.file(upload)
            if file.kind != "image" and not is_gif(file):
                found = file
        if one is turn:
            break
    return found


def _linked(text: str, texts: Texts, file: SessionFile | None) -> str:
    """Return a text as HTML, with a button for every time in it."""
    if file is None:
        return escape(text)
    parts, end = [], 0
    for match in _TIME.finditer(text):
        seconds = float(match["seconds"] or match["rest"])
        seconds += 60 * int(match["minutes"] or 0) + 3600 * int(match["hours"] or 0)
        label = escape(texts("go_to", time=clock(seconds)))
        parts += [
            escape(text[end : match.start()]),
            f'<button type="button" class="vl-time" data-action="time" data-file="{file.key}" '
            f'data-seconds="{seconds:.3f}" title="{label}">{match[0]}</button>',
        ]
        end = match.end()
    return "".join([*parts, escape(text[end:])])
