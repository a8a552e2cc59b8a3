"""Turn the inputs of a user (files, folders, patterns, lists, shards) into clips with ids."""

from __future__ import annotations

import csv
import glob
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from video_llama.constants import Modality
from video_llama.data.examples import SUFFIXES, MediaSource, ShardMember
from video_llama.data.remote import RemoteError, RemoteFile, is_remote, local_file
from video_llama.data.shards import Shard, find_shards
from video_llama.errors import ConfigError
from video_llama.media.sources import is_address

__all__ = ["Clip", "ShardMember", "find_clips", "take_shard"]

VIDEO_SUFFIXES = set(SUFFIXES["video"])
"""Of the files that a folder stands for; any other file can be named by itself."""

LIST_SUFFIXES = (".txt", ".csv")

PATH_COLUMNS = ("path", "video", "video_path", "file", "filename", "file_name")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """One file to caption.

    Args:
        id: its name in the results: its path as given, or `shard.tar#member`.
        source: the file; None if there is a problem.
        problem: why it cannot be read.
    """

    id: str
    source: str | ShardMember | RemoteFile | None
    problem: str = ""


def _ignore(path: Path) -> None:
    pass


def find_clips(inputs: Sequence[str], on_left_out: Callable[[Path], object] = _ignore) -> list[Clip]:
    """Return the clips of the inputs, each once, in their order; files of folders, patterns and shards are sorted.

    Args:
        inputs: files, addresses, folders (videos and shards in them, at any depth), patterns (`clips/**/*.mp4`), lists
            (.txt with one path a line, .csv with a column of paths; relative to the list or to the working folder),
            webdataset shards (`shards/{0000..0099}.tar`). A pattern leaves out folders without videos, and lists
            unless it ends like one.
        on_left_out: called with each file of a folder or pattern that is not among the clips, such as images.

    Raises:
        ConfigError: an input that is not there or matches nothing, or a list that cannot be read. A file of a list that
            is not there is a clip, for one line among thousands must not stop a run.
        DatasetError: shards that are absent.
    """
    # A file that is named in several ways is captioned once.
    clips: dict[str, Clip] = {}
    for name in inputs:
        for clip in _expand(name, on_left_out):
            clips.setdefault(clip.id if is_remote(clip.id) else os.path.abspath(clip.id), clip)
    return list(clips.values())


def take_shard(items: Sequence[Item], num_shards: int, shard_id: int) -> list[Item]:
    """Return every `num_shards`-th item, from item `shard_id` on.

    Raises:
        ConfigError: there is no such shard.
    """
    if not 0 <= shard_id < num_shards:
        raise ConfigError(f"there is no shard {shard_id} of {num_shards}; they are numbered from 0")
    return list(items[shard_id::num_shards])


def _expand(name: str, on_left_out: Callable[[Path], object] = _ignore) -> Iterator[Clip]:
    path = Path(name)
    # What is in an address is no pattern, but for the numbers of shards.
    if is_remote(name):
        yield from _expand_address(name)
    elif path.is_dir():
        found = _videos_in(path, on_left_out)
        if not found:
            advice = "images and audio files are named by a pattern, such as 'folder/*.jpg'"
            raise ConfigError(f"{path}: no videos in this folder (.mp4, .mkv, .webm, …); {advice}")
        for file in found:
            yield from _expand(str(file))
    elif path.suffix == ".tar":
        # A name that is no file may be a pattern with braces, which `find_shards` expands.
        for shard in [path] if path.is_file() else find_shards(name):
            yield from _members(shard)
    elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        yield from _listed(path)
    elif not path.exists() and glob.has_magic(name):
        yield from _expand_pattern(name, on_left_out)
    elif not os.path.exists(name):
        raise ConfigError(f"{name}: no such file or folder")
    else:
        yield Clip(name, name)


def _expand_pattern(pattern: str, on_left_out: Callable[[Path], object]) -> Iterator[Clip]:
    is_empty = True
    for match in sorted(glob.glob(pattern, recursive=True)):
        if _is_wanted(Path(match), Path(pattern).suffix):
            yield from _expand(match, on_left_out)
            is_empty = False
        elif Path(match).is_file():
            on_left_out(Path(match))
    if is_empty:
        raise ConfigError(f"{pattern}: no file matches this pattern")


def _expand_address(address: str) -> Iterator[Clip]:
    """Yield the clips of an address: of a file, a list, a shard, or the shards in a folder (with / at its end).

    Files of the web are left to the reader, which downloads them where that is allowed.
    """
    suffix = Path(address).suffix.lower()
    if suffix in LIST_SUFFIXES:
        folder = address.rpartition("/")[0]
        with local_file(address) as path:
            names = _names_of_list(Path(path), suffix)
        for name in names:
            if not is_remote(name) and not name.startswith(("/", "~")):
                name = f"{folder}/{name}"
            yield from _line_of_list(name)
    elif suffix == ".tar" or address.endswith("/"):
        for shard in find_shards(address):
            yield from _members(shard)
    else:
        yield _clip_at(address)


def _clip_at(name: str) -> Clip:
    if is_remote(name) and not is_address(name):
        return Clip(name, RemoteFile(name))
    return Clip(name, name)


def _videos_in(folder: Path, on_left_out: Callable[[Path], object] = _ignore) -> list[Path]:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix.lower() in VIDEO_SUFFIXES or path.suffix == ".tar":
            found.append(path)
        else:
            on_left_out(path)
    return found


def _is_wanted(match: Path, suffix: str) -> bool:
    """Return whether to caption what a pattern with this suffix matches: not folders without videos, nor lists."""
    if match.is_dir():
        return bool(_videos_in(match))
    return match.suffix.lower() not in LIST_SUFFIXES or suffix.lower() in LIST_SUFFIXES


def _members(shard: Shard) -> Iterator[Clip]:
    """Yield the videos in a shard; without any, its images; without these, its audio files."""
    clips: dict[Modality, list[Clip]] = {"video": [], "image": [], "audio": []}
    problem = ""
    try:
        with local_file(str(shard)) as local, tarfile.open(local, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                source = MediaSource(str(shard), member.name, member.offset_data, member.size)
                # Suffixes such as .mp4 are in the table for video and for audio, so a member may be noted under both.
                for kind, suffixes in SUFFIXES.items():
                    if member.name.lower().endswith(suffixes):
                        clips[kind].append(Clip(f"{shard}#{member.name}", ShardMember(source)))
    except RemoteError as error:
        problem = error.reason
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = f"not a whole tar file ({error}); copy it again"
    # A GIF file is an image or an animation: among images it does not push the others aside.
    videos = clips["video"]
    if all(clip in clips["image"] for clip in videos):
        videos = []
    # A shard of training data holds images or audio files beside its annotations.
    found = videos or clips["image"] or clips["audio"]
    yield from found
    if problem or not found:
        yield Clip(str(shard), None, problem or "no videos in this shard")


def _listed(path: Path) -> Iterator[Clip]:
    """Yield the clips of a list; a relative path is looked for beside the list first; errors as of `_names_of_list`."""
    for name in _names_of_list(path, path.suffix.lower()):
        beside = path.parent / name
        if not name.startswith(("/", "~")) and not is_remote(name) and beside.exists():
            name = str(beside)
        yield from _line_of_list(name)


def _line_of_list(name: str) -> Iterator[Clip]:
    # A line of a list is one file. Only shards are expanded, so a list never contains itself.
    if name.endswith(".tar"):
        yield from _expand(name)
    else:
        yield _clip_at(name)


def _names_of_list(path: Path, suffix: str) -> list[str]:
    """Return the paths in a list (.txt or .csv).

    Raises:
        ConfigError: it holds no paths, or is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _paths_of_table(path, file) if suffix == ".csv" else file.read().splitlines()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a list of paths in UTF-8 ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{path}: no paths in this list")
    return names


def _paths_of_table(path: Path, file: Iterable[str]) -> list[str]:
    """Return the column of paths of a `.csv`.

    Raises:
        ConfigError: no column has one of the names `PATH_COLUMNS`.
    """
    rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    for name in PATH_COLUMNS:
        if name in header:
            column = header.index(name)
            return [row[column] for row in rows[1:] if len(row) > column]
    # Without a header, the first row is a path like the others, which has a suffix.
    if len(header) > 1 or not Path(header[0]).suffix:
        raise ConfigError(f"{path}: no column is called {', '.join(PATH_COLUMNS)}")
    return [row[0] for row in rows]
