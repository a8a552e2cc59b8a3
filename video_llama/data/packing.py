"""Pack a dataset into webdataset shards: a few large files in the place of many small ones.

The result depends on the examples and the limits alone. A shard appears under its name when it is complete, so a run
that was stopped continues at the first missing one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from video_llama.data.examples import SUFFIXES, Example, MediaSource, media_sources, read_media
from video_llama.errors import DatasetError
from video_llama.utils.files import INCOMPLETE, write_whole
from video_llama.utils.jsonl import append_jsonl

__all__ = ["PackedDataset", "pack_examples"]

# The date of all members: 2000-01-01.
_FIXED_TIME = 946_684_800
_PLAN_FILE = "packing.json"
# Absent files in an error message.
_SHOWN = 5

Advance = Callable[[int], object]


@dataclass(frozen=True)
class PackedDataset:
    """Describe the shards that were written.

    Args:
        shards: their paths, in order.
        num_examples: in all of them.
        absent: ids of examples that were left out because a file of theirs is absent.
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
    """Write `00000.tar`, `00001.tar`, … that the dataset `shards` reads back unchanged.

    Args:
        examples: from `build_examples`; their media are copied byte for byte.
        folder: new, empty, or of the same packing, which then continues where it was stopped.
        max_count: most examples of a shard.
        max_bytes: most bytes of a shard; a single larger example has a shard of its own.
        skip_absent: leave out examples whose files are absent, and list them in `absent.jsonl`.
        advance: called with the number of examples that were done.

    Raises:
        DatasetError: absent files, a file of a type that no shard holds, a folder with other files in it, or a
            shard that cannot be written.
    """
    if max_count < 1 or max_bytes < 1:
        raise DatasetError(f"a shard must hold at least one example and one byte, not {max_count} and {max_bytes}")
    sizes, absent, digest = _survey(examples)
    if absent and not skip_absent:
        shown = [*absent[:_SHOWN], "…"] if len(absent) > _SHOWN else absent
        raise DatasetError(f"files of {len(absent)} of {len(examples)} examples are absent ({', '.join(shown)})")
    if not sizes:
        raise DatasetError("there is no example to pack")
    _prepare(folder, {"examples": digest, "max_count": max_count, "max_bytes": max_bytes})
    shards = []
    for number, indices in enumerate(_divide(sizes, max_count, max_bytes)):
        # A shard under its final name is complete: an earlier run wrote it.
        shards.append(folder / f"{number:05d}.tar")
        if not shards[-1].exists():
            _write(shards[-1], partial(_write_shard, examples=examples, indices=indices))
        advance(len(indices))
    if absent:
        _write(folder / "absent.jsonl", partial(_write_ids, ids=absent))
    return PackedDataset(shards, len(sizes), absent)


def _survey(examples: Sequence[Example]) -> tuple[dict[int, int], list[str], str]:
    """Return the size in a shard of each example by its index, ids of absent ones, and a digest of what is packed."""
    digest = hashlib.blake2b(digest_size=16)
    sizes: dict[int, int] = {}
    absent = []
    # The digest identifies the packing, so that a stopped run continues only with the same annotations and files.
    for index, example in enumerate(examples):
        text = _annotation(example)
        stats = [_stat(source) for source in _suffixes(example)]
        digest.update(text + repr(stats).encode())
        if None in stats:
            absent.append(example.id)
            continue
        lengths = [len(text), *(stat[0] for stat in stats if stat is not None)]
        # Each member is a header of one block and its content in whole blocks.
        sizes[index] = sum(tarfile.BLOCKSIZE * (1 + -(-length // tarfile.BLOCKSIZE)) for length in lengths)
    return sizes, absent, digest.hexdigest()


def _stat(source: MediaSource) -> tuple[int, int] | None:
    """Return (bytes, time of change or checksum) of a media file, None if it is absent."""
    if source.content is not None:
        return len(source.content), zlib.crc32(source.content)
    try:
        stat = os.stat(source.path)
    except OSError:
        return None
    size = source.size if source.name is not None else stat.st_size
    return size, stat.st_mtime_ns


def _divide(sizes: dict[int, int], max_count: int, max_bytes: int) -> Iterator[list[int]]:
    """Yield the examples of each shard: as many as fit, in order."""
    shard: list[int] = []
    filled = 0
    for index, size in sizes.items():
        # Close the shard before the example that would exceed a limit. An empty shard takes an example of any size.
        if shard and (len(shard) == max_count or filled + size > max_bytes):
            yield shard
            shard, filled = [], 0
        shard.append(index)
        filled += size
    if shard:
        yield shard


def _prepare(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or check that it is that of the same packing.

    Raises:
        DatasetError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Of a run that was killed.
    for left in folder.glob(f".*{INCOMPLETE}"):
        left.unlink()
    file, text = folder / _PLAN_FILE, json.dumps(plan)
    # The same plan means that this packing was stopped before. Its complete shards stay.
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    if any(folder.iterdir()):
        why = "of other examples or limits" if file.exists() else "that are none of its shards"
        raise DatasetError(f"{folder}: holds files {why}; choose another folder or remove it")
    _write(file, lambda path: path.write_text(text, encoding="utf-8"))


def _write_shard(path: Path, examples: Sequence[Example], indices: Sequence[int]) -> None:
    with tarfile.TarFile(path, "w", format=tarfile.GNU_FORMAT, copybufsize=1 << 20) as tar:
        for index in indices:
            example, key = examples[index], f"{index:09d}"
            _add(tar, f"{key}.json", _annotation(example))
            for source, suffix in _suffixes(example).items():
                _add(tar, f"{key}.{suffix}", b"".join(read_media(source)))
        end = tar.offset + 2 * tarfile.BLOCKSIZE
    # Two empty blocks end a tar file; tarfile pads to 20 blocks, which would go beyond `max_bytes`.
    os.truncate(path, end)


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    for id_ in ids:
        append_jsonl(path, {"id": id_})


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # Time and rights are fixed, so that the same examples always give the same bytes.
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = len(content), _FIXED_TIME, 0o444
    tar.addfile(header, io.BytesIO(content))


def _annotation(example: Example) -> bytes:
    """Return the JSON of an example, with its id for people; items of messages name members by their suffix."""
    text = dict(example.text)
    if example.source is None:
        suffixes = _suffixes(example)
        sources = iter(media_sources(example))
        text["messages"] = [_rename_media(message, suffixes, sources) for message in text["messages"]]
    return json.dumps({"id": example.id, **text}, ensure_ascii=False).encode()


def _rename_media(
    message: dict[str, Any], suffixes: dict[MediaSource, str], sources: Iterator[MediaSource]
) -> dict[str, Any]:
    """Return a message whose media items name the members of a shard, in the order of `sources`."""
    if isinstance(message["content"], str):
        return message
    items = []
    for item in message["content"]:
        if item["type"] != "text":
            item = {"type": item["type"], "path": suffixes[next(sources)]}
        items.append(item)
    return {**message, "content": items}


def _suffixes(example: Example) -> dict[MediaSource, str]:
    """Return the names of an example's files behind its key: `mp4`; of messages `0.mp4`, `1.wav`, …

    Raises:
        DatasetError: a file that could not be found again in a shard.
    """
    suffixes = {}
    # `fromkeys` drops repeated files and keeps the order, so each file is stored once.
    for number, source in enumerate(dict.fromkeys(media_sources(example))):
        suffix = Path(source.name or source.path).suffix.lower().removeprefix(".")
        if example.source is None:
            suffixes[source] = f"{number}.{suffix or 'bin'}"
            continue
        if source.is_part:
            raise DatasetError(f"{example.id}: a part of {source.path}; cut the clip before (ffmpeg -ss START -to END)")
        if f".{suffix}" not in SUFFIXES[example.kind]:
            known = ", ".join(SUFFIXES[example.kind])
            raise DatasetError(
                f"{example.id}: {source.path} is called .{suffix}; a shard holds {example.kind} as {known}"
            )
        suffixes[source] = suffix
    return suffixes


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole.

    Raises:
        DatasetError: it cannot be written.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written ({error.strerror or error})") from error
