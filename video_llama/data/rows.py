"""Read rows of fine-tuning tools as messages: media in columns, their positions as tags in the text.

LLaMA-Factory, ms-swift, TRL, LLaVA-Video and VideoLLaMA2 write a conversation as `messages`, as `conversations`, as
`query` and `response` or as `prompt` and `completion`, name its files in columns such as `videos`, and mark positions
by `<video>`, `<image>` and `<audio>`: the n-th tag is the n-th file of its kind. A file without a tag, or a tag without
a file, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from video_llama.constants import Modality
from video_llama.data.annotations import KeyCheck, required_list, required_text
from video_llama.errors import DatasetError, shown

__all__ = ["FORMS", "read_row"]

_TAG = re.compile("<(video|image|audio)>")
FORMS: dict[str, tuple[str, ...]] = {
    "messages": (),
    "conversations": (),
    "query": ("response", "history"),
    "instruction": ("input", "output", "history"),
    "completion": ("prompt",),
}
"""The form of a row by the key that holds its conversation, with the other keys that belong to it."""

_COLUMNS: dict[str, tuple[str, ...]] = {kind: (f"{kind}s", kind) for kind in get_args(Modality)}
_COMMON = ("id", "system", "tags", *(name for names in _COLUMNS.values() for name in names))
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Message = dict[str, Any]
Files = dict[str, list[Any]]


def read_row(row: Mapping[str, Any], where: str, keys: KeyCheck) -> dict[str, Any]:
    """Return the conversation of a row as `{"messages": […]}`, with media items in the place of tags.

    Args:
        row: one entry of an annotation file. With `"tags": false`, tags in its text stay text.
        where: the file and the row, for error messages.
        keys: warns of keys that are not used.

    Raises:
        DatasetError: the row has no conversation or several, or the files that it names do not match its tags.
    """
    forms = [form for form in FORMS if row.get(form) is not None]
    if len(forms) > 1:
        raise DatasetError(f"{where}: has both {forms[0]!r} and {forms[1]!r}; keep the one that is to be learnt")
    form = (forms or ["messages"])[0]
    keys.check(row, (form, *FORMS[form], *_COMMON), "an entry", where)
    messages = _read_messages(row, form, where)
    files = {kind: list(_read_column(row, kind, where, keys)) for kind in _COLUMNS}
    if row.get("tags") is False:
        _check_counts(files, dict.fromkeys(files, 0), where)
        # Shards are packed from this text, so the key must go with it.
        return {"messages": messages, "tags": False}
    renamed = _is_llava_video(messages, files)
    messages = [_split_tags(message, renamed) for message in messages]
    _check_counts(files, _count_positions(messages), where)
    return {"messages": [_name_files(message, files) for message in messages]}


def _read_messages(row: Mapping[str, Any], form: str, where: str) -> list[Message]:
    """Return the conversation of a row in the form of `messages`."""
    if form in ("messages", "conversations"):
        messages = [_with_role(message, where) for message in required_list(row, form, where)]
    elif form == "completion":
        messages = _read_completion(row, where)
    else:
        question, answer = required_text(row, form, where), {"query": "response", "instruction": "output"}[form]
        if row.get("input"):
            # LLaMA-Factory joins an instruction and its input so.
            question += "\n" + required_text(row, "input", where)
        turns = [*_read_history(row, where), (question, required_text(row, answer, where))]
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    if row.get("system"):
        if messages[0].get("role") == "system":
            raise DatasetError(f"{where}: has a system message and the key 'system'; keep one of them")
        messages.insert(0, {"role": "system", "content": required_text(row, "system", where)})
    return messages


def _read_completion(row: Mapping[str, Any], where: str) -> list[Message]:
    """Return prompt and completion, as TRL has them: both texts, or both messages. Only the completion is learnt."""
    if isinstance(row["completion"], str):
        question, answer = (required_text(row, name, where) for name in ("prompt", "completion"))
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt, completion = (
        [_with_role(message, where) for message in required_list(row, name, where)] for name in ("prompt", "completion")
    )
    context = [{**message, "loss": False} if message.get("role") == "assistant" else message for message in prompt]
    return context + completion


def _read_history(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DatasetError(
                f"{where}: 'history' must be a list of pairs of question and answer, but holds {shown(pair)}"
            )
        yield pair[0], pair[1]


def _with_role(message: Any, where: str) -> Message:
    """Return a message with `role` and `content`, also one that says `from` and `value`."""
    if not isinstance(message, Mapping):
        raise DatasetError(f"{where}: a message is a {type(message).__name__}, not an object")
    named = dict(message)
    if "from" in named and "role" not in named:
        speaker = named.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DatasetError(f"{where}: 'from' must be human, gpt or system, not {shown(speaker)}")
        named["role"] = _SHAREGPT_ROLES[speaker]
    if "value" in named and "content" not in named:
        named["content"] = named.pop("value")
    return named


def _read_column(row: Mapping[str, Any], kind: str, where: str, keys: KeyCheck) -> Iterator[Any]:
    """Yield the file names of one kind: a text, an object with `path`, or a list of these."""
    columns = [name for name in _COLUMNS[kind] if row.get(name) not in (None, [])]
    if len(columns) > 1:
        raise DatasetError(f"{where}: has both {columns[0]!r} and {columns[1]!r}; name all files in one of them")
    for column in columns:
        value = row[column]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                keys.check(item, ("path", "bytes"), f"a file in {column!r}", where)
                if isinstance(item.get("bytes"), bytes):
                    # The file itself, as Hugging Face datasets hold images.
                    yield item
                    continue
                item = item.get("path")
            if not isinstance(item, str) or not item:
                raise DatasetError(f"{where}: {column!r} must hold names of files, but holds {shown(item)}")
            yield item


def _is_llava_video(messages: Sequence[Message], files: Files) -> bool:
    """Return whether `<image>` stands for videos, as LLaVA-Video writes it."""
    if not files["video"] or files["image"]:
        return False
    tags = [tag for message in messages for text in _question_texts(message) for tag in _TAG.findall(text)]
    return "image" in tags and "video" not in tags


def _question_texts(message: Message) -> list[str]:
    """Return the texts of a question; tags in other messages are text."""
    content = message.get("content")
    if message.get("role") != "user":
        return []
    if isinstance(content, str):
        return [content]
    items = content if isinstance(content, list) else []
    return [str(item.get("text")) for item in items if isinstance(item, Mapping) and item.get("type") == "text"]


def _split_tags(message: Message, renamed: bool) -> Message:
    """Return a message in which each tag of a question is a media item, so far without a file."""
    if not any(_TAG.search(text) for text in _question_texts(message)):
        return message
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    items: list[Any] = []
    for item in content:
        if item.get("type") != "text":
            items.append(item)
            continue
        # Text and the names of tags alternate: text, kind, text, kind, text.
        for number, piece in enumerate(_TAG.split(str(item.get("text")))):
            if number % 2:
                items.append({"type": "video" if renamed and piece == "image" else piece})
            # Items are joined by spaces, so those around a tag would be doubled.
            elif piece.strip():
                items.append({"type": "text", "text": piece.strip()})
    return {**message, "content": items}


def _is_open(item: Any) -> bool:
    """Return whether an item is a media item that takes its file from a column."""
    return isinstance(item, Mapping) and item.get("type") in list(_COLUMNS) and set(item) == {"type"}


def _count_positions(messages: Sequence[Message]) -> dict[str, int]:
    counts = dict.fromkeys(_COLUMNS, 0)
    for message in messages:
        content = message.get("content")
        for item in content if isinstance(content, list) else ():
            if _is_open(item):
                counts[item["type"]] += 1
    return counts


def _check_counts(files: Files, counts: Mapping[str, int], where: str) -> None:
    for kind, names in files.items():
        if len(names) != counts[kind]:
            raise DatasetError(
                f"{where}: names {len(names)} {kind} files ({kind!r} or '{kind}s'), but its questions have "
                f"{counts[kind]} places for one (a tag <{kind}>, or an item without a file of its own); each file "
                'needs one place and each place one file. With "tags": false in the entry, tags are text'
            )


def _name_files(message: Message, files: Files) -> Message:
    """Return a message whose open media items name the next files of their kinds."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    items = []
    for item in content:
        if _is_open(item):
            item = {**item, "path": files[item["type"]].pop(0)}
        items.append(item)
    return {**message, "content": items}
