"""Read annotation files; whatever is wrong with one is a `DatasetError` that names file and place."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_llama.errors import DatasetError

__all__ = [
    "find_files",
    "read_json",
    "read_json_lines",
    "read_table",
    "required_list",
    "required_text",
    "resolve_messages",
]

# Captions can be long; the csv module's own limit of 128 KiB is not.
csv.field_size_limit(1 << 24)
_END = "\x1eend of file"


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or all files of a folder with one of the suffixes, sorted.

    Raises:
        DatasetError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DatasetError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise DatasetError(f"{path}: no annotation file in it (one that ends in {' or '.join(suffixes)})")
    return files


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a `.csv` or `.tsv` with a header line.

    Args:
        columns: those that must be there; others are left out.

    Raises:
        DatasetError: a column is missing, a row is short, a quote never ends, there are no rows, or the file is not
            UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = itertools.chain(file, [_END])  # a row of its own, unless a quote was never closed
            reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = [name for name in reader.fieldnames or () if name != _END]
            missing = [name for name in columns if name not in header]
            if missing:
                has = ", ".join(header) or "nothing; the file is empty"
                raise DatasetError(f"{path}: no column {', '.join(missing)} (its header has {has})")
            number, before, end = 0, 0, reader.line_num
            for row in reader:
                if row[header[0]] == _END:
                    break
                number, before, end = number + 1, end, reader.line_num
                if any(row[name] is None for name in columns):
                    raise DatasetError(f"{path}, line {reader.line_num}: fewer fields than the header")
                yield reader.line_num, {name: row[name] for name in columns}
            else:
                raise DatasetError(f"{path}, line {before + 1}: a quote opens here and is never closed")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise DatasetError(f"{path}: not a table ({error})") from error
    if number == 0:
        raise DatasetError(f"{path}: a header and no rows")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DatasetError: absent, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DatasetError(f"{path}: a folder; name the JSON file in it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: not JSON ({error})") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, object) of a JSONL file; empty lines are left out.

    Raises:
        DatasetError: absent, a line that is no JSON object, or no lines at all.
    """
    is_empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                is_empty = False
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DatasetError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(entry, Mapping):
                    raise DatasetError(f"{path}, line {number}: a {type(entry).__name__}, not an object")
                yield number, entry
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason})") from error
    if is_empty:
        raise DatasetError(f"{path}: the file is empty")


def required_text(entry: Any, key: str, where: str) -> str:
    """A text (or a number, as some files have for ids) that an annotation must have.

    Raises:
        DatasetError: the entry is no object, or the key is absent or of another type.
    """
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{where}: a {type(entry).__name__}, not an object")
    value = entry.get(key)
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DatasetError(f"{where}: {key!r} is {'missing' if key not in entry else f'{value!r}, not text'}")
    return str(value)


def required_list(entry: Any, key: str, where: str) -> list[Any]:
    """A list that an annotation must have, and that is not empty.

    Raises:
        DatasetError: the entry is no object, or the key is absent or something else.
    """
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {key!r} must be a list that is not empty")
    return value


def resolve_messages(messages: Sequence[Any], resolve: Callable[[str], Any], where: str) -> list[dict[str, Any]]:
    """Messages whose media items say where their file is.

    Args:
        messages: `{"role": …, "content": text or items}`.
        resolve: from the name that an item gives its file to where that is.

    Raises:
        DatasetError: a message or an item has another form, or a media item names no file.
    """
    return [_resolve_message(message, resolve, where) for message in messages]


def _resolve_message(message: Any, resolve: Callable[[str], Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DatasetError(f"{where}: a message is a {type(message).__name__}, not an object")
    content = message.get("content")
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, list):
        raise DatasetError(f"{where}: the content of a message must be text or a list of items, but is {content!r}")
    return {**message, "content": [_resolve_item(item, resolve, where) for item in content]}


def _resolve_item(item: Any, resolve: Callable[[str], Any], where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: a content item is a {type(item).__name__}, not an object")
    kind = item.get("type")
    if kind == "text":
        return {"type": kind, "text": required_text(item, "text", where)}
    if kind not in ("image", "video", "audio"):
        raise DatasetError(f"{where}: the type of a content item must be text, image, video or audio, not {kind!r}")
    name = next((item[key] for key in (kind, "path", "url") if isinstance(item.get(key), str)), None)
    if name is None:
        raise DatasetError(f"{where}: the {kind} item {dict(item)} names no file; give it as {kind!r} or 'path'")
    return {"type": kind, "path": resolve(name)}
