"""Read annotation files; any error in one is a `DatasetError` that names file and place."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from video_llama.constants import Modality
from video_llama.data.examples import SUFFIXES
from video_llama.errors import DatasetError, in_line, shown
from video_llama.utils.extras import import_extra

__all__ = [
    "KeyCheck",
    "find_files",
    "is_learnt",
    "read_entries",
    "read_json",
    "read_json_lines",
    "read_part",
    "read_table",
    "required_list",
    "required_text",
    "resolve_messages",
]

logger = logging.getLogger(__name__)

# Captions can be long; the default limit of the csv module is 128 KiB.
csv.field_size_limit(1 << 24)
_END = "\x1eend of file"
_PARQUET_ROWS = 256


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


def read_table(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a `.csv` or `.tsv` with a header line.

    Args:
        path: the file.
        columns: those that are required; others are left out. None takes all that there are.

    Raises:
        DatasetError: a column is missing or there twice, a row is short or too long, a quote never ends, there are no
            rows, or the file is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_rows(path, file, columns)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise DatasetError(f"{path}: not a table ({error})") from error


def _read_rows(path: Path, file: Iterator[str], columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, str]]]:
    # The appended line becomes a row of its own, unless a quote was never closed.
    lines = itertools.chain(file, [_END])
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header = [name for name in reader.fieldnames or () if name != _END]
    if columns is None:
        columns = header
    missing = [name for name in columns if name not in header]
    if missing:
        has = in_line(", ".join(header)) or "nothing; the file is empty"
        raise DatasetError(f"{path}: no column {', '.join(missing)} (its header has {has})")
    twice = sorted({name for name in columns if header.count(name) > 1})
    if twice:
        raise DatasetError(f"{path}: its header has {in_line(', '.join(twice))} more than once")
    if not header:
        raise DatasetError(f"{path}: the file is empty")
    is_empty, before, end = True, 0, reader.line_num
    # A row can span several lines: `end` is the last line of the current row, `before` that of the previous row.
    for row in reader:
        if row[header[0]] == _END:
            break
        is_empty, before, end = False, end, reader.line_num
        if any(row[name] is None for name in columns):
            raise DatasetError(f"{path}, line {end}: fewer fields than the header")
        # A comma in a caption would cut it off. An empty field is only a comma too many.
        if any(row.get(None, ())):
            raise DatasetError(f"{path}, line {end}: more fields than the header; a text with commas needs quotes")
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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{path}, line {number}: not JSON ({error})") from error
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({error.reason})") from error
    if is_empty:
        raise DatasetError(f"{path}: the file is empty")


def read_entries(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (place, number, object) of a JSONL file, of a JSON file that holds one list, or of a table.

    Tables are `.csv`, `.tsv` and `.parquet`.

    Raises:
        DatasetError: as `read_json_lines`, `read_json` and `read_table`; an entry of the list is not an object.
        ConfigError: a parquet file, and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        for line, row in read_table(path):
            yield f"{path}, line {line}", str(line), row
        return
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if path.suffix.lower() == ".json" and _holds_list(path):
        for number, entry in enumerate(read_json(path)):
            where = f"{path}, entry {number}"
            if not isinstance(entry, Mapping):
                raise DatasetError(f"{where}: a {type(entry).__name__}, not an object")
            yield where, str(number), entry
        return
    for line, entry in read_json_lines(path):
        yield f"{path}, line {line}", str(line), entry


def _read_parquet(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    parquet = import_extra("pyarrow.parquet", f"the table {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # A few rows at a time: a file may be larger than the memory.
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", str(number), row
                    number += 1
    except (OSError, ValueError) as error:
        # pyarrow's own errors are of these kinds.
        raise DatasetError(f"{path}: no table that can be read ({error})") from error


def _holds_list(path: Path) -> bool:
    """Return whether a file begins as a JSON list: some tools write lines of JSON to files called `.json`, too."""
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


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
        raise DatasetError(f"{where}: {key!r} is {shown(value)}, not text")
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


def read_part(entry: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    """Return `start` and `end` of an entry, in seconds; None where the part begins or ends with the file.

    Raises:
        DatasetError: they are no numbers, or no time is between them.
    """
    start, end = entry.get("start"), entry.get("end")
    for key, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
            raise DatasetError(f"{where}: {key!r} is {shown(value)}, not a number of seconds")
    if end is not None and end <= (start or 0):
        raise DatasetError(f"{where}: no time between 'start' {start} and 'end' {end}")
    return start, end


_MEDIA_KEYS = {name + ending for name in get_args(Modality) for ending in ("", "s", "_path", "_url")}
_MEDIA_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
# What would change the samples if it were honoured, so it must not be dropped.
_CUT = "a part of a file cannot be chosen; cut the clip (ffmpeg -ss START -to END) and name the new file"
_WEIGHED = "only answers have a weight: 'loss' or 'weight' of an assistant message, 0 or 1"
_REFUSED = {
    **dict.fromkeys(("start", "end", "start_time", "end_time", "video_start", "video_end"), _CUT),
    **dict.fromkeys(("loss", "weight", "loss_scale", "loss_mask", "train", "training"), _WEIGHED),
}


@dataclass
class KeyCheck:
    """Check that nothing in the entries of a dataset is left out without a word.

    Args:
        warned: unknown keys that were named; each is named once.
    """

    warned: set[tuple[str, str]] = field(default_factory=set)

    def check(self, entry: Mapping[str, Any], known: Collection[str], what: str, where: str) -> None:
        """Warn of unknown keys of an object; null counts as absent.

        Args:
            entry: the object.
            known: keys that are read.
            what: "an entry", "a message", …
            where: the file and the sample.

        Raises:
            DatasetError: an unknown key names media, or would change what is learnt.
        """
        unknown = {key: value for key, value in entry.items() if key not in known and value is not None}
        self.refuse(unknown, what, where)
        for key, value in unknown.items():
            if value != [] and (key in _MEDIA_KEYS or _names_media(value)):
                raise DatasetError(f"{where}: {key!r} of {what} names media that would not be used: {shown(value)}")
            if (what, key) not in self.warned:
                self.warned.add((what, key))
                logger.warning("%s: the key %r of %s is not used, here and in what follows", where, key, what)

    def refuse(self, entry: Mapping[str, Any], what: str, where: str) -> None:
        """Refuse keys that would change what is learnt; arguments as of `check`.

        Raises:
            DatasetError: there is one.
        """
        for key in _REFUSED:
            if entry.get(key) is not None:
                raise DatasetError(f"{where}: {key!r} of {what} is not supported: {_REFUSED[key]}")


def _names_media(value: Any) -> bool:
    """Return whether a value is the name of a media file, or a list that begins with one; addresses say where from."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and first.lower().endswith(_MEDIA_SUFFIXES) and "://" not in first


def resolve_messages(
    messages: Sequence[Any], resolve: Callable[[Any], Any], where: str, keys: KeyCheck | None = None
) -> list[dict[str, Any]]:
    """Return messages whose media items name their file as `{"type": …, "path": …}`.

    An answer that is not to be learnt (`"loss": false` or `"weight": 0`) keeps `"loss": False`.

    Args:
        messages: `{"role": …, "content": text or items}`.
        resolve: from the file name in an item to its place.
        where: the file and the sample, for error messages.
        keys: warns of keys that are not used.

    Raises:
        DatasetError: a message or an item is malformed, or a media item names no file or several.
    """
    keys = keys or KeyCheck()
    resolved = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DatasetError(f"{where}: a message is a {type(message).__name__}, not an object")
        known = ("role", "content", "loss", "weight") if message.get("role") == "assistant" else ("role", "content")
        # Questions are never learnt, so a weight of zero changes nothing there.
        ignored = [key for key in ("loss", "weight") if message.get(key) in (False, 0)]
        keys.check(message, (*known, *ignored), "a message", where)
        content = message.get("content")
        if isinstance(content, list):
            content = [_resolve_item(item, resolve, where, keys) for item in content]
        elif not isinstance(content, str):
            raise DatasetError(
                f"{where}: the content of a message must be text or a list of items, but is {shown(content)}"
            )
        clean: dict[str, Any] = {"role": message.get("role"), "content": content}
        if not is_learnt(message, where):
            clean["loss"] = False
        resolved.append(clean)
    return resolved


def is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """Return whether an answer counts for the loss.

    Raises:
        DatasetError: a weight between, which no loss of this package has.
    """
    weights = {key: message[key] for key in ("loss", "weight") if message.get(key) is not None}
    for key, value in weights.items():
        if value not in (0, 1):
            raise DatasetError(f"{where}: {key!r} of a message is {shown(value)}; it can be true (1) or false (0)")
    return message.get("role") != "assistant" or all(weights.values())


def _resolve_item(item: Any, resolve: Callable[[Any], Any], where: str, keys: KeyCheck) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: a content item is a {type(item).__name__}, not an object")
    kind = item.get("type")
    if kind == "text":
        keys.check(item, ("type", "text"), "a text item", where)
        return {"type": kind, "text": required_text(item, "text", where)}
    if kind not in get_args(Modality):
        raise DatasetError(
            f"{where}: the type of a content item must be text, image, video or audio, not {shown(kind)}"
        )
    # Chat formats differ in the key that holds the file, so accept the usual ones.
    names = (str(kind), "path", "url")
    keys.check(item, ("type", *names), f"a {kind} item", where)
    found: list[Any] = []
    for value in (item.get(key) for key in names):
        is_file = isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes))
        if is_file and value not in found:
            found.append(value)
    if len(found) > 1:
        raise DatasetError(f"{where}: the {kind} item {shown(dict(item))} names several files; make an item of each")
    if not found:
        raise DatasetError(f"{where}: the {kind} item {shown(dict(item))} names no file; give it as {kind!r} or 'path'")
    return {"type": kind, "path": resolve(found.pop())}
