"""The conversation of `video-llama chat` on a terminal: what is typed, and the commands that begin with a slash."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from video_llama.errors import ConfigError, VideoLlamaError

if TYPE_CHECKING:
    from video_llama.inference.chat import Chat

__all__ = ["Terminal", "save_conversation"]

HELP = """\
  /add FILE ...   attach videos, images or audio files (a line that is only a file's path does the same)
  /undo           take back the last question and the files that were attached before it
  /clear          begin a new conversation, without files
  /save [FILE]    write the conversation to a file: .md for people, .json for programs
  /help           show this
  /quit           leave (also exit, quit, Ctrl-D)
Ctrl-C stops an answer; twice, it ends the program."""
# An address, or one word that ends like a media file.
_ADDRESS_OR_MEDIA = re.compile(r"https?://\S+|\S+\.(mp4|mov|mkv|webm|avi|gif|jpe?g|png|wav|mp3|m4a|flac)", re.I)
NO_FILE = "note: no file is attached, so the answer is not about any file (attach one: /add clip.mp4, or chat clip.mp4)"


class Terminal:
    """A conversation that is typed.

    Args:
        chat: answers.
        attach: adds a file to the chat and prints what the model gets of it.
        model: its name, for `/save`.
    """

    def __init__(self, chat: Chat, attach: Callable[[str], None], model: str) -> None:
        self.chat = chat
        self.model = model
        self._attach = attach
        self._commands: dict[str, Callable[[str], None]] = {
            "/add": self._add,
            "/undo": self._undo,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda rest: print(HELP),
        }

    def run(self) -> None:
        """Answer until the user leaves.

        Raises:
            KeyboardInterrupt: Ctrl-C, twice.
        """
        # Cursor keys and the history of questions; Windows has no such module, and types without it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print("Type a question; /help shows the commands, /quit ends the conversation.")
        was_interrupted = False
        while True:
            try:
                line = input("> ").strip()
                if line in ("exit", "quit", "/quit", "/exit"):
                    return
                self._read(line)
                was_interrupted = False
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if was_interrupted:
                    raise
                was_interrupted = True
                print("\n(stopped; Ctrl-C again ends the program)")

    def _read(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif is_existing_file(line) or _ADDRESS_OR_MEDIA.fullmatch(line):
                # Terminals write the path of a file that is dropped on them, some of them in quotes. What can only be
                # meant as a file is no question: that it is not there, or must be downloaded, is an error.
                self._add(line)
            elif name.startswith("/"):
                near = "".join(f"; did you mean {match}?" for match in get_close_matches(name, self._commands, 1))
                print(f"Unknown command {name}{near} (/help shows the commands)")
            elif line:
                self.ask(line)
        except VideoLlamaError as error:
            print(f"error: {error}", file=sys.stderr)

    def ask(self, question: str) -> None:
        """Print the answer, piece by piece.

        Raises:
            VideoLlamaError: the question with its files is too long, or the device failed.
        """
        if not any(turn.uploads for turn in self.chat.turns):
            print(NO_FILE, file=sys.stderr)
        self.chat.ask(question)
        try:
            for piece in self.chat.stream_answer():
                print(piece, end="", flush=True)
            print()
        except VideoLlamaError:
            # The question that has no answer goes; its files stay for the next one.
            self.chat.turns[-1].question = None
            if not self.chat.turns[-1].uploads:
                self.chat.undo()
            raise

    def _add(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/add needs a file: /add clip.mp4")
        names = [rest.strip("'\"")]
        if not is_existing_file(rest):
            names = rest.split()
        for name in names:
            self._attach(name)

    def _undo(self, rest: str) -> None:
        undone = self.chat.undo()
        if undone is None:
            print("There is nothing to undo.")
            return
        files = [Path(upload.source).name for upload in undone.uploads]
        taken = [f"the question {undone.question!r}"] * (undone.question is not None) + files
        print(f"Removed {', '.join(taken)}.")

    def _clear(self, rest: str) -> None:
        self.chat.reset()
        print("A new conversation; no files are attached.")

    def _save(self, rest: str) -> None:
        name = rest or f"conversation-{datetime.datetime.now():%Y%m%d-%H%M%S}.md"
        save_conversation(self.chat, Path(name).expanduser(), self.model)
        print(f"Written to {name}.")


def is_existing_file(text: str) -> bool:
    """Return whether a line is the path of a file, with or without quotes."""
    # A question may be longer than any path, or hold characters that no path can.
    with contextlib.suppress(OSError, ValueError):
        return bool(text) and Path(text.strip("'\"")).expanduser().is_file()
    return False


def save_conversation(chat: Chat, path: Path, model: str) -> None:
    """Write a conversation with its model, settings and date as Markdown (.md) or JSON.

    Raises:
        ConfigError: there is such a file already, or another ending.
    """
    from video_llama.utils.files import write_whole

    if path.suffix not in (".md", ".json"):
        raise ConfigError(f"{path}: the name must end with .md or .json")
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name")
    turns = [
        {
            "files": [{"name": upload.source, "given": upload.summary} for upload in turn.uploads],
            "question": turn.question,
            "answer": turn.answer,
        }
        for turn in chat.turns
    ]
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"model": model, "date": date, "options": vars(chat.options), "turns": turns}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    if path.suffix == ".md":
        text = _as_markdown(chat, model, date)
    write_whole(path, partial(_write_text, text=text))


def _as_markdown(chat: Chat, model: str, date: str) -> str:
    options = ", ".join(f"{name}={value}" for name, value in vars(chat.options).items())
    lines = ["# Conversation", "", f"Model {model}, {date}, {options}", ""]
    for turn in chat.turns:
        lines += [f"- {upload.source}: {upload.summary}" for upload in turn.uploads]
        if turn.question is not None:
            lines += ["", f"**{turn.question}**", "", turn.answer or "(no answer)", ""]
    return "\n".join(lines) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
