"""From what a user names (files, folders, patterns, lists, shards) to clips with ids."""

from __future__ import annotations

import csv
import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from video_llama.data.examples import MediaSource, ShardMember
from video_llama.data.shards import SUFFIXES, find_shards
from video_llama.errors import ConfigError

__all__ = ["Clip", "ShardMember", "find_clips", "take_shard"]

VIDEO_SUFFIXES = {*SUFFIXES["video"], ".mpg", ".mpeg", ".ts", ".wmv", ".3gp", ".ogv"}
"""Of the files that are taken from a folder; any other file can be named by itself."""

LIST_SUFFIXES = (".txt", ".csv")

PATH_COLUMNS = ("path", "video", "video_path", "file", "filename", "file_name")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """One file to be captioned.

    Args:
        id: names it in the results: its path as given, or `shard.tar#member`.
        source: what is read; None if there is a problem.
        problem: why it cannot even be tried.
    """

    id: str
    source: str | ShardMember | None
    problem: str = ""


def find_clips(inputs: Sequence[str]) -> list[Clip]:
    """The clips that the inputs name, each once, in their order; files of folders, patterns and shards sorted.

    Args:
        inputs: files, folders (videos and shards in them, at any depth), patterns (`clips/**/*.mp4`), lists (.txt
            with one path a line, .csv with a column of paths; relative to the list or to here), webdataset shards
            (`shards/{0000..0099}.tar`). What a pattern finds beside clips is left out: folders without videos,
            and lists unless the pattern ends like one.

    Raises:
        ConfigError: an input that names nothing, or a list that cannot be read.
        DatasetError: shards that are absent.
    """
    clips: dict[str, Clip] = {}
    for name in inputs:
        for clip in _expand(name):
            clips.setdefault(os.path.abspath(clip.id), clip)
    return list(clips.values())


def take_shard(items: Sequence[Item], num_shards: int, shard_id: int) -> list[Item]:
    """Every `num_shards`-th item: all shards together are all items, each once.

    Raises:
        ConfigError: there is no such shard.
    """
    if not 0 <= shard_id < num_shards:
        raise ConfigError(f"there is no shard {shard_id} of {num_shards}; they are numbered from 0")
    return list(items[shard_id::num_shards])


def _expand(name: str) -> Iterator[Clip]:
    path = Path(name)
    if path.is_dir():
        yield from _walk(path)
    elif path.suffix == ".tar":
        for shard in find_shards(name):
            yield from _members(shard)
    elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        lines = _read_csv(path) if path.suffix.lower() == ".csv" else _read_lines(path)
        if not lines:
            raise ConfigError(f"{path}: no paths in this list")
        for line in lines:
            yield from _expand_line(line, path)
    elif not path.exists() and glob.has_magic(name):
        matches = [match for match in sorted(glob.glob(name, recursive=True)) if _is_meant(Path(match), path.suffix)]
        if not matches:
            raise ConfigError(f"{name}: no file is called like this")
        for match in matches:
            yield from _expand(match)
    else:
        yield Clip(name, name)


def _walk(folder: Path) -> Iterator[Clip]:
    found = _videos_in(folder)
    if not found:
        raise ConfigError(f"{folder}: no videos in this folder ({', '.join(sorted(VIDEO_SUFFIXES))})")
    for path in found:
        yield from _members(path) if path.suffix == ".tar" else [Clip(str(path), str(path))]


def _videos_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES or path.suffix == ".tar"]


def _is_meant(match: Path, suffix: str) -> bool:
    """Whether what a pattern with this suffix has found is to be captioned, and does not only lie there."""
    if match.is_dir():
        return bool(_videos_in(match))
    return match.suffix.lower() not in LIST_SUFFIXES or suffix.lower() in LIST_SUFFIXES


def _members(shard: Path) -> Iterator[Clip]:
    """The videos in a shard; without any, its images; without these, its sounds."""
    by_kind: dict[str, list[Clip]] = {kind: [] for kind in SUFFIXES}
    problem = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                for kind, suffixes in SUFFIXES.items():
                    if member.isfile() and member.name.lower().endswith(suffixes):
                        source = MediaSource(str(shard), member.name, member.offset_data, member.size)
                        by_kind[kind].append(Clip(f"{shard}#{member.name}", ShardMember(source)))
                        break
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = f"not a whole tar file ({error}); copy it again"
    clips = by_kind["video"] or by_kind["image"] or by_kind["audio"]
    yield from clips
    if problem or not clips:
        yield Clip(str(shard), None, problem or "no videos in this shard")


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a list of paths in UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _read_csv(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a table in UTF-8 ({error})") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    # Without a header the first row is a path like the others, which has a suffix.
    if column is None and (len(header) > 1 or (header and not Path(header[0]).suffix)):
        raise ConfigError(f"{path}: none of its columns is called {', '.join(PATH_COLUMNS)}")
    body = rows if column is None else rows[1:]
    cells = [row[column or 0].strip() for row in body if len(row) > (column or 0)]
    return [cell for cell in cells if cell]


def _expand_line(line: str, listed_in: Path) -> Iterator[Clip]:
    """One entry of a list; a relative path is looked for beside the list first."""
    beside = listed_in.parent / line
    name = line if re.match(r"[/~]", line) or not beside.exists() else str(beside)
    yield from _expand(name) if name.endswith(".tar") else [Clip(name, name)]
