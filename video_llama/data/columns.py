"""Rows of tables as examples: a media column and a text column, or a conversation with its media columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from video_llama.config import BuildInfo
from video_llama.constants import Modality
from video_llama.data.annotations import KeyCheck, required_text, resolve_messages
from video_llama.data.examples import Example, source_of
from video_llama.data.rows import FORMS, read_row
from video_llama.errors import DatasetError, in_line

__all__ = ["RowReader", "without_nulls"]

# Usual names of columns, the first of which is taken.
_MEDIA_COLUMNS = ("path", "file", "file_name", "filename", "file_path")
_TEXT_COLUMNS = ("caption", "text", "description", "sentence", "answer")
# Columns that hold a list or an object; a table of text holds them as JSON.
_STRUCTURED = ("messages", "conversations", "history", "videos", "images", "audios")


@dataclass(frozen=True)
class RowReader:
    """Turn the rows of one dataset into examples.

    Args:
        name: of the dataset.
        kind: modality of the media column.
        info: its keys `media_column`, `text_column` and `question_column`; usual names by default.
        resolve: from what a media cell holds to the path, or the fields of the `MediaSource`, of its file.
        keys: warns of columns that are not used.
    """

    name: str
    kind: Modality
    info: BuildInfo
    resolve: Callable[[Any], Any]
    keys: KeyCheck = field(default_factory=KeyCheck)

    def example(self, row: Mapping[str, Any], where: str, number: str) -> Example:
        """Return the example of a row: of a conversation if it holds one and no `text_column` is set.

        Args:
            row: cells by column; null and empty cells count as absent.
            where: the file and the row, for error messages.
            number: of the row, its id if there is no column "id".

        Raises:
            DatasetError: a column or a cell is missing, or a column with media would not be used.
        """
        cells = {column: value for column, value in without_nulls(row).items() if value not in (None, "")}
        id_ = f"{self.name}/{cells.get('id', number)}"
        if self.info.text_column is None and any(form in cells for form in FORMS):
            structured = {column: _parse(value, column, where) for column, value in cells.items()}
            text = read_row(structured, where, self.keys)
            text["messages"] = resolve_messages(text["messages"], self.resolve, where, self.keys)
            return Example(id_, self.kind, None, text)
        media, text_column = self._columns(row, where)
        question = self.info.question_column
        if question is None and text_column == "answer" and "question" in cells:
            question = "question"
        self.keys.check(cells, ("id", media, text_column, str(question)), "a row", where)
        # What the model learns may be empty by mistake, in one row of many: then it is a bad sample.
        answer = required_text({text_column: "", **cells}, text_column, where)
        source = self.resolve(_only_file(cells.get(media), media, where))
        if question is None:
            return Example(id_, self.kind, source_of(source), {"caption": answer})
        asked = [{"type": self.kind, "path": source}, {"type": "text", "text": required_text(cells, question, where)}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Example(id_, self.kind, None, {"messages": messages})

    def _columns(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """Return the columns of media and text: those that are set, or usual ones."""
        usual = {
            "media_column": (self.kind, f"{self.kind}_path", f"{self.kind}s", *_MEDIA_COLUMNS),
            "text_column": _TEXT_COLUMNS,
        }
        found = []
        for key, names in usual.items():
            wanted = getattr(self.info, key)
            there = [name for name in ((wanted,) if wanted else names) if name in row]
            if not there:
                others = in_line(", ".join(map(str, row)))
                raise DatasetError(
                    f"{where}: no column {wanted or ' or '.join(names)} (there are {others}); "
                    f"name it as build_info.{key}"
                )
            found.append(there[0])
        return found[0], found[1]


def _only_file(cell: Any, column: str, where: str) -> Any:
    """Return the one file that a cell names: a text, an object of Hugging Face's, or a list of one."""
    files = cell if isinstance(cell, list) else [cell]
    file = files[0] if len(files) == 1 else None
    if isinstance(file, Mapping) and file.get("bytes") is None:
        file = file.get("path")
    if not isinstance(file, (str, Mapping)):
        raise DatasetError(f"{where}: the column {column!r} must name one file, but holds {str(cell)[:60]!r}")
    return file


def without_nulls(value: Any) -> Any:
    """Return a row or cell without the keys that are null: columnar files give every item the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _parse(value: Any, column: str, where: str) -> Any:
    """Return what a cell of text holds as JSON, in columns that hold more than text."""
    if column not in _STRUCTURED or not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: the column {column!r} holds no JSON ({error}): {value[:60]!r}") from error
