"""Captions on disk: one line of JSON for each clip or window, complete or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from video_llama.errors import ConfigError

__all__ = ["CaptionFile", "file_of_shard"]


def file_of_shard(output: Path, num_shards: int, shard_id: int) -> Path:
    """Where one of several processes writes: `captions-00001-of-00004.jsonl`; a single one writes to `output`."""
    if num_shards == 1:
        return output
    return output.with_name(f"{output.stem}-{shard_id:05}-of-{num_shards:05}{output.suffix}")


class CaptionFile:
    """The results of a run, written as they come, and those of earlier runs.

    Args:
        output: the name for the whole run.
        num_shards, shard_id: which part of the run writes here.
        settings: what the captions depend on; kept beside the file, so that a run is not continued with others.
        resume: continue what is there: a last line that was cut off is taken away, what is done is known.

    Raises:
        ConfigError: the file is there and `resume` is not asked for, it holds something else, or it was begun with
            other settings.
    """

    def __init__(
        self,
        output: Path,
        num_shards: int = 1,
        shard_id: int = 0,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.path = file_of_shard(output, num_shards, shard_id)
        self._done: dict[str, set[int]] = {}
        self._num_windows: dict[str, int] = {}
        self._failed: set[str] = set()
        try:
            self._open(output, num_shards, settings or {}, resume)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); name another file") from error

    def _open(self, output: Path, num_shards: int, settings: Mapping[str, Any], resume: bool) -> None:
        if self.path.is_dir():
            raise ConfigError(f"{self.path}: a folder; name the file that captions shall go to")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size and not resume:
            raise ConfigError(f"{self.path}: there are captions already; continue them with --resume or name another")
        _check_settings(output, settings, resume)
        if resume:
            for path in _all_files(output):
                if path == self.path or not _belongs_to(path, output, num_shards):
                    _drop_cut_line(path)  # nobody of this run is writing it
                for record in _read_records(path):
                    self._note(record)
        self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is the operating system's, whole, when this returns.

        Raises:
            ConfigError: it cannot be written, for instance because the disk is full.
        """
        line = _encode(record)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); --resume goes on from here") from error
        self._note(record)

    def has(self, clip_id: str, window: int) -> bool:
        """Whether there is a record of this window."""
        return window in self._done.get(clip_id, ())

    def is_complete(self, clip_id: str) -> bool:
        """Whether there is a record of every window of the clip."""
        return clip_id in self._done and len(self._done[clip_id]) >= self._num_windows[clip_id]

    def has_failed(self, clip_id: str) -> bool:
        """Whether a record says that the clip, or a part of it, could not be captioned."""
        return clip_id in self._failed

    def _note(self, record: Mapping[str, Any]) -> None:
        clip_id = record["id"]
        self._done.setdefault(clip_id, set()).add(record.get("segment", 0))
        self._num_windows[clip_id] = max(self._num_windows.get(clip_id, 1), record.get("num_segments", 1))
        if "error" in record:
            self._failed.add(clip_id)


def _encode(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8 is escaped, so that it is read back as the same name; a text is mended.
        mended = {
            key: value.encode("utf-8", "replace").decode() if isinstance(value, str) and key != "id" else value
            for key, value in record.items()
        }
        return (json.dumps(mended) + "\n").encode()


def _check_settings(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    path = output.with_name(output.name + ".settings.json")
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    if resume and path.exists():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error}); remove it if you know how the run was begun") from error
        differing = sorted(key for key in {*begun, *settings} if begun.get(key) != json.loads(text).get(key))
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{output}: was begun with {key} {begun.get(key)!r}, not {settings.get(key)!r}; "
                "give the same settings or name another file"
            )
        return
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _drop_cut_line(path: Path) -> None:
    """End a file after its last complete line."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)


def _all_files(output: Path) -> list[Path]:
    """What all processes of this run and of earlier ones have written, in whatever number of parts."""
    parts = sorted(output.parent.glob(f"{_escape(output.stem)}-[0-9]*-of-[0-9]*{output.suffix}"))
    return [path for path in [output, *parts] if path.is_file()]


def _belongs_to(path: Path, output: Path, num_shards: int) -> bool:
    """Whether a process of a run with so many parts writes there."""
    if num_shards == 1:
        return path == output
    return path != output and path.stem.endswith(f"-of-{num_shards:05}")


def _escape(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # another process is writing it
                return
            try:
                record = json.loads(line)
                known = isinstance(record["id"], str)
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise ConfigError(f"{path}: line {number} is no caption; this file is something else or damaged")
            yield record
