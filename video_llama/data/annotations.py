"""Read annotation files; any error in one is a `DatasetError` that names file and place."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from video_llama.constants import Modality
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

# Captions can be long; the default limit of the csv module is 128 KiB.
csv.field_size_limit(1 << 24)
_END = "\x1eend of file"


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the file itself, or all files of a folder with one of the suffixes, sorted.

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
    """Yield (line, row) of a `.csv` or `.tsv` with a header line.

    Args:
        path: the file.
        columns: those that are required; others are left out.

    Raises:
        DatasetError: a column is missing, a row is short, a quote never ends, there are no rows, or the file is not
            UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_rows(path, file, columns)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise DatasetError(f"{path}: not a table ({error})") from error


def _read_rows(path: Path, file: Iterator[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    # The appended line becomes a row of its own, unless a quote was never closed.
    lines = itertools.chain(file, [_END])
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header = [name for name in reader.fieldnames or () if name != _END]
    missing = [name for name in columns if name not in header]
    if missing:
        has = ", ".join(header) or "nothing; the file is empty"
        raise DatasetError(f"{path}: no column {', '.join(missing)} (its header has {has})")
    is_empty, before, end = True, 0, reader.line_num
    # A row can span several lines: `end` is the last line of the current row, `before` that of the previous row.
    for row in reader:
        if row[header[0]] == _END:
            break
        is_empty, before, end = False, end, reader.line_num
        if any(row[name] is None for name in columns):
            raise DatasetError(f"{path}, line {end}: fewer fields than the header")
        yield end, {name: row[name] for name in columns}
    else:
        raise DatasetError(f"{path}, line {before + 1}: a quote opens here and is never closed")
    if is_empty:
        raise DatasetError(f"{path}: a header and no rows")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DatasetError: it is absent or not JSON.
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
    """Yield (line, object) of an annotation file in JSONL; empty lines are left out.

    Raises:
        DatasetError: the file is absent or has no lines, or a line is not a JSON object.
    """
    # Not `utils.jsonl.read_jsonl`: it leaves out a last line that was cut off, which must be an error in annotations,
    # and ids are made of line numbers.
    is_empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                is_empty = False
                entry = json.loads(line)
                if not isinstance(entry, Mapping):
                    raise DatasetError(f"{path}, line {number}: a {type(entry).__name__}, not an object")
                yield number, entry
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {number}: not JSON ({error})") from error
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason})") from error
    if is_empty:
        raise DatasetError(f"{path}: the file is empty")


def required_text(entry: Any, key: str, where: str) -> str:
    """Return a text (or a number, as some files have for ids) that an annotation must have.

    Raises:
        DatasetError: the entry is not an object, or the key is absent or of another type.
    """
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{where}: a {type(entry).__name__}, not an object")
    if key not in entry:
        raise DatasetError(f"{where}: {key!r} is missing")
    value = entry[key]
    # `bool` is a subclass of `int`, but true and false are no ids.
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DatasetError(f"{where}: {key!r} is {value!r}, not text")
    return str(value)


def required_list(entry: Any, key: str, where: str) -> list[Any]:
    """Return a list that an annotation must have, and that is not empty.

    Raises:
        DatasetError: the entry is not an object, or the key is absent or something else.
    """
    value = isinstance(entry, Mapping) and entry.get(key)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {key!r} must be a list that is not empty")
    return value


def resolve_messages(messages: Sequence[Any], resolve: Callable[[str], Any], where: str) -> list[dict[str, Any]]:
    """Return messages whose media items name their file as `{"type": …, "path": …}`.

    Args:
        messages: `{"role": …, "content": text or items}`.
        resolve: from the file name in an item to its place.
        where: the file and the sample, for error messages.

    Raises:
        DatasetError: a message or an item is malformed, or a media item names no file.
    """
    resolved = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DatasetError(f"{where}: a message is a {type(message).__name__}, not an object")
        content = message.get("content")
        if isinstance(content, list):
            content = [_resolve_item(item, resolve, where) for item in content]
        elif not isinstance(content, str):
            raise DatasetError(f"{where}: the content of a message must be text or a list of items, but is {content!r}")
        resolved.append({**message, "content": content})
    return resolved


def _resolve_item(item: Any, resolve: Callable[[str], Any], where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: a content item is a {type(item).__name__}, not an object")
    kind = item.get("type")
    if kind == "text":
        return {"type": kind, "text": required_text(item, "text", where)}
    if kind not in get_args(Modality):
        raise DatasetError(f"{where}: the type of a content item must be text, image, video or audio, not {kind!r}")
    # Chat formats differ in the key that holds the file, so accept the usual ones.
    for key in (kind, "path", "url"):
        if isinstance(item.get(key), str):
            return {"type": kind, "path": resolve(item[key])}
    raise DatasetError(f"{where}: the {kind} item {dict(item)} names no file; give it as {kind!r} or 'path'")
