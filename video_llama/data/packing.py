"""Pack a dataset into webdataset shards: few large files in the place of many small ones.

What comes out depends on the examples and the limits alone. A shard appears under its name when it is whole, so a
run that was stopped goes on at the first one that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.data.examples import Example, MediaSource, media_sources, read_media
from video_llama.data.shards import SUFFIXES
from video_llama.errors import DatasetError
from video_llama.utils.files import INCOMPLETE, write_whole

__all__ = ["PackedDataset", "pack_examples"]

_FIXED_TIME = 946_684_800  # 2000-01-01: the date of all members
_BLOCK_BYTES = 512  # of a tar file; each member has one more as its header
_PLAN_FILE = "packing.json"
_SHOWN = 5  # absent files in an error message

Advance = Callable[[int], object]


@dataclass(frozen=True)
class PackedDataset:
    """What was written.

    Args:
        shards: their paths, in order.
        num_examples: in all of them.
        absent: ids of examples that were left out because a file of theirs is not there.
    """

    shards: list[Path]
    num_examples: int
    absent: list[str]


def pack_examples(
    examples: Sequence[Example],
    folder: Path,
    *,
    max_count: int = 1000,
    max_bytes: int = 1 << 30,
    skip_absent: bool = False,
    advance: Advance = lambda num_examples: None,
) -> PackedDataset:
    """Write `00000.tar`, `00001.tar`, … that the dataset `shards` reads back as they were.

    Args:
        examples: from `build_examples`; their media are copied byte for byte.
        folder: new, empty, or that of the same packing, which goes on where it was stopped.
        max_count: most examples of a shard.
        max_bytes: most bytes of a shard; a single larger example has one of its own.
        skip_absent: leave out examples whose files are not there, and list them in `absent.jsonl`.
        advance: called with the number of examples that were done.

    Raises:
        DatasetError: absent files, a file of a kind that no shard holds, a folder with other things in it, or a
            shard that cannot be written.
    """
    if max_count < 1 or max_bytes < 1:
        raise DatasetError(f"a shard must hold at least one example and one byte, not {max_count} and {max_bytes}")
    sizes, digest = _survey(examples)
    there = [index for index, size in enumerate(sizes) if size is not None]
    absent = [examples[index].id for index, size in enumerate(sizes) if size is None]
    if absent and not skip_absent:
        shown = ", ".join(absent[:_SHOWN]) + (", …" if len(absent) > _SHOWN else "")
        raise DatasetError(f"files of {len(absent)} of {len(examples)} examples are absent ({shown})")
    if not there:
        raise DatasetError("there is no example to pack")
    _prepare(folder, {"examples": digest, "max_count": max_count, "max_bytes": max_bytes})
    shards = []
    for number, indices in enumerate(_divide(there, [size or 0 for size in sizes], max_count, max_bytes)):
        shards.append(folder / f"{number:05d}.tar")
        if not shards[-1].exists():
            _write_whole(shards[-1], _shard(examples, indices))
        advance(len(indices))
    if absent:
        lines = "".join(json.dumps({"id": id_}, ensure_ascii=False) + "\n" for id_ in absent)
        _write_whole(folder / "absent.jsonl", [lines.encode()])
    return PackedDataset(shards, len(there), absent)


def _survey(examples: Sequence[Example]) -> tuple[list[int | None], str]:
    """The size of each example in a shard, None if a file is absent, and a digest of what would be packed."""
    digest = hashlib.blake2b(digest_size=16)
    sizes: list[int | None] = []
    for example in examples:
        text, sources = _annotation(example), _suffixes(example)
        stats = [_stat(source) for source in sources]
        digest.update(text + repr(stats).encode())
        lengths = [len(text), *(stat[0] for stat in stats if stat is not None)]
        size = sum(_BLOCK_BYTES * (1 + -(-length // _BLOCK_BYTES)) for length in lengths)
        sizes.append(None if None in stats else size)
    return sizes, digest.hexdigest()


def _stat(source: MediaSource) -> tuple[int, int] | None:
    """(bytes, time of change) of a media file, None if it is absent."""
    try:
        stat = os.stat(source.path)
    except OSError:
        return None
    return (stat.st_size if source.name is None else source.size), stat.st_mtime_ns


def _divide(indices: Sequence[int], sizes: Sequence[int], max_count: int, max_bytes: int) -> Iterator[list[int]]:
    """The examples of each shard: as many as fit, in order."""
    shard: list[int] = []
    filled = 0
    for index in indices:
        if shard and (len(shard) == max_count or filled + sizes[index] > max_bytes):
            yield shard
            shard, filled = [], 0
        shard.append(index)
        filled += sizes[index]
    if shard:
        yield shard


def _prepare(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or see that it is that of the same packing.

    Raises:
        DatasetError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*{INCOMPLETE}"):  # by a run that was killed
        left.unlink()
    file, text = folder / _PLAN_FILE, json.dumps(plan)
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    if any(folder.iterdir()):
        why = "of other examples or limits" if file.exists() else "that are none of its shards"
        raise DatasetError(f"{folder}: holds files {why}; choose another folder or remove it")
    _write_whole(file, [text.encode()])


def _shard(examples: Sequence[Example], indices: Sequence[int]) -> Iterator[bytes]:
    """A tar file, piece by piece."""
    for index in indices:
        example, key = examples[index], f"{index:09d}"
        suffixes = _suffixes(example)
        yield from _member(f"{key}.json", [_annotation(example)])
        for source, suffix in suffixes.items():
            yield from _member(f"{key}.{suffix}", read_media(source))
    yield bytes(2 * _BLOCK_BYTES)  # the end of a tar file


def _member(name: str, pieces: Any) -> Iterator[bytes]:
    content = b"".join(pieces)
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = len(content), _FIXED_TIME, 0o444
    yield header.tobuf(tarfile.GNU_FORMAT)
    yield content
    yield bytes(-len(content) % _BLOCK_BYTES)


def _annotation(example: Example) -> bytes:
    """The JSON of an example, with its id for people; items of messages name members by their suffix."""
    text = dict(example.text)
    if example.source is None:
        suffixes = _suffixes(example)
        sources = iter(media_sources(example))
        text["messages"] = [
            {
                **message,
                "content": message["content"]
                if isinstance(message["content"], str)
                else [
                    item if item["type"] == "text" else {"type": item["type"], "path": suffixes[next(sources)]}
                    for item in message["content"]
                ],
            }
            for message in text["messages"]
        ]
    return json.dumps({"id": example.id, **text}, ensure_ascii=False).encode()


def _distinct(example: Example) -> list[MediaSource]:
    return list(dict.fromkeys(media_sources(example)))


def _suffixes(example: Example) -> dict[MediaSource, str]:
    """What each file of an example is called behind the example's key: `mp4`, in messages `0.mp4`, `1.wav`, …

    Raises:
        DatasetError: a file that could not be found again in a shard.
    """
    suffixes = {}
    for number, source in enumerate(_distinct(example)):
        suffix = Path(source.name or source.path).suffix.lower().removeprefix(".")
        if example.source is not None and f".{suffix}" not in SUFFIXES[example.kind]:
            known = ", ".join(SUFFIXES[example.kind])
            raise DatasetError(
                f"{example.id}: {source.path} is called .{suffix}; a shard holds {example.kind} as {known}"
            )
        suffixes[source] = suffix if example.source is not None else f"{number}.{suffix or 'bin'}"
    return suffixes


def _write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file of pieces.

    Raises:
        DatasetError: it cannot be written.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.writelines(pieces)

    try:
        write_whole(path, write)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written ({error.strerror or error})") from error
