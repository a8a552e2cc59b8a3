"""Rows of Hugging Face `datasets` at random places: saved folders, local files and the hub; or streamed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from video_llama.config import BuildInfo
from video_llama.data.columns import RowReader
from video_llama.data.examples import Example
from video_llama.data.streams import RowStream, StreamedRow
from video_llama.errors import DatasetError
from video_llama.utils.extras import import_extra

__all__ = ["RowTable", "StreamTable", "open_rows", "resolve_cell"]

# Files that `save_to_disk` writes for a dataset, and for one of several splits.
_SAVED = ("state.json", "dataset_dict.json")
# Rows of a stream that are looked at before a run, and that replace bad ones.
_NUM_FIRST_ROWS = 100


class RowTable(Sequence[Example]):
    """Rows as examples, each read when it is needed.

    Args:
        rows: a `datasets.Dataset`.
        reader: makes an example of a row.
        name: of the rows, for error messages.
    """

    def __init__(self, rows: Any, reader: RowReader, name: str) -> None:
        # The library's identity of the content; it has no public name.
        self._fingerprint = str(rows._fingerprint)
        # As Arrow stores them: an image or a sound stays the bytes of its file, and is decoded as any other file.
        self._rows, self._reader, self._name = rows.with_format("arrow"), reader, name

    def __len__(self) -> int:
        return len(self._rows)

    def digest(self) -> str:
        """Return a short digest of all rows and their order."""
        return self._fingerprint[:16]

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        [row] = self._rows[place].to_pylist()
        return self._reader.example(row, f"{self._name}, row {place}", str(place))


class StreamTable(RowTable):
    """The first rows of a stream as a table, and the stream.

    Args:
        stream: a `datasets.IterableDataset`.
        reader, name: as of `RowTable`.
        shuffle_buffer: rows that are shuffled at a time.
    """

    def __init__(self, stream: Any, reader: RowReader, name: str, shuffle_buffer: int) -> None:
        library = import_extra("datasets", name)
        self.rows, self.name, self.shuffle_buffer = stream.with_format("arrow"), name, shuffle_buffer
        tables = list(self.rows.take(_NUM_FIRST_ROWS))
        if not tables:
            raise DatasetError(f"{name}: the stream has no rows")
        first = library.concatenate_datasets([library.Dataset(table) for table in tables])
        super().__init__(first, reader, name)

    def stream(self, seed: Sequence[int], rank: int, world_size: int) -> RowStream:
        """Return one process's share of all rows."""
        return RowStream(
            self.rows,
            self.name,
            block_size=self.shuffle_buffer,
            seed=seed,
            digest=self.digest(),
            rank=rank,
            world_size=world_size,
        )

    def example(self, row: StreamedRow) -> Example:
        """Return the example of a row of the stream; errors as of `RowReader.example`."""
        return self._reader.example(*row)


def open_rows(info: BuildInfo, reader: RowReader, name: str) -> RowTable:
    """Open the rows that a section names.

    Args:
        info: its `storage` (a folder that `save_to_disk` wrote, another folder of files, or a hub id), `subset` and
            `split`.
        reader: makes an example of a row.
        name: of the dataset.

    Raises:
        DatasetError: there is nothing of the kind.
        ConfigError: `datasets` is not installed.
    """
    library = import_extra("datasets", f"datasets.{name}")
    folder = Path(str(info.storage)).expanduser()
    try:
        is_saved = any((folder / file).exists() for file in _SAVED)
        if is_saved and info.streaming:
            raise DatasetError("a folder of save_to_disk is read at random places: leave build_info.streaming out")
        if is_saved:
            loaded = library.load_from_disk(str(folder))
            # A folder holds one split, or several by name.
            rows = loaded[info.split] if isinstance(loaded, Mapping) else loaded
        else:
            source = str(folder) if folder.exists() else info.storage
            rows = library.load_dataset(source, name=info.subset, split=info.split, streaming=info.streaming)
        if info.streaming:
            return StreamTable(rows, reader, f"{info.storage} ({info.split})", info.shuffle_buffer)
    except Exception as error:
        # The library raises what its many readers raise.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DatasetError(
            f"{info.storage} cannot be loaded by the library datasets, split {info.split!r} ({reason})"
        ) from error
    return RowTable(rows, reader, f"{info.storage} ({info.split})")


def resolve_cell(folder: str, name: str, cell: Any) -> Any:
    """Return the path of a media cell, or the fields of the `MediaSource` of one that holds its file.

    Args:
        folder: that paths are relative to.
        name: of the rows, for error messages.
        cell: a path, or `{"bytes": …, "path": …}` as `datasets` stores images, audio and videos.
    """
    if isinstance(cell, str):
        return os.path.join(folder, cell)
    content = cell.get("bytes")
    if content is None:
        return os.path.join(folder, str(cell["path"]))
    return {"path": name, "name": os.path.basename(cell.get("path") or "") or "row", "content": content}
