"""Captions on disk: one line of JSON for each clip or window, written whole."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from video_llama.errors import ConfigError, translate_foreign
from video_llama.utils.files import write_whole
from video_llama.utils.jsonl import append_jsonl, drop_cut_line, read_jsonl
from video_llama.utils.locks import OutputLock

__all__ = ["CaptionFile", "file_of_shard"]


def file_of_shard(output: Path, num_shards: int, shard_id: int) -> Path:
    """Return where one of several processes writes: `captions-00001-of-00004.jsonl`; a single one writes `output`."""
    if num_shards == 1:
        return output
    return output.with_name(f"{output.stem}-{shard_id:05}-of-{num_shards:05}{output.suffix}")


class CaptionFile:
    """Keep the results of a run, written as they come, and those of earlier runs.

    Args:
        output: the name for the whole run.
        num_shards, shard_id: which part of the run writes here.
        settings: what the captions depend on; kept beside the file, so that no run continues with others.
        resume: continue what is there; a last line that was cut off is removed.

    While it is open no other process can write there. It is a context manager; `close` ends it.

    Raises:
        ConfigError: the file exists without `resume`, holds something else, was begun with other settings, cannot be
            written, or another process writes it.
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
        self._errors: dict[str, str] = {}
        if self.path.is_dir():
            raise ConfigError(f"{self.path}: a folder; name the file for the captions")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = OutputLock(self.path.with_name(f".{self.path.name}.lock"), self.path)
            try:
                self._begin(output, num_shards, settings or {}, resume)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); name another file") from error

    def _begin(self, output: Path, num_shards: int, settings: Mapping[str, Any], resume: bool) -> None:
        if self.path.exists() and self.path.stat().st_size and not resume:
            raise ConfigError(f"{self.path}: already exists; use --resume to continue it, or choose another --output")
        _check_settings(output, settings, resume)
        if resume:
            self._read_earlier(output, num_shards)
        # An output that cannot be written must be an error now, not after the model is loaded.
        self.path.open("ab").close()
        self._size = self.path.stat().st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; the operating system has all of it when this returns.

        Raises:
            ConfigError: it cannot be written, for instance because the disk is full, or what was written before is
                gone.
        """
        self._check_is_there()
        try:
            append_jsonl(self.path, {key: _without_surrogates(key, value) for key, value in record.items()})
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); continue with --resume") from error
        self._size = self.path.stat().st_size
        self._note(record)

    def close(self) -> None:
        """Let other processes write the file.

        Raises:
            ConfigError: it is gone.
        """
        try:
            self._check_is_there()
        finally:
            self._lock.release()

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        # After another error the file's own would hide it.
        if kind is None:
            self.close()
        else:
            self._lock.release()

    def _check_is_there(self) -> None:
        self._lock.check()
        if not self.path.is_file() or self.path.stat().st_size < self._size:
            raise ConfigError(
                f"{self.path}: was removed or cut while captions were written to it; they are gone. Begin again, "
                "or restore the file and continue with --resume"
            )

    def has(self, clip_id: str, window: int) -> bool:
        """Return whether there is a record of this window."""
        return window in self._done.get(clip_id, ())

    def is_complete(self, clip_id: str) -> bool:
        """Return whether there is a record of every window of the clip."""
        return clip_id in self._done and len(self._done[clip_id]) >= self._num_windows[clip_id]

    def has_failed(self, clip_id: str) -> bool:
        """Return whether the clip, or a part of it, could not be captioned."""
        return clip_id in self._errors

    def error_of(self, clip_id: str) -> str:
        """Return why a clip that has failed could not be captioned; of several windows, the first reason."""
        return self._errors[clip_id]

    def _read_earlier(self, output: Path, num_shards: int) -> None:
        """Note what this run and earlier ones have written, in whatever number of parts.

        Raises:
            ConfigError: a line is not a caption.
        """
        # An earlier run may have had another number of processes.
        own = f"-of-{num_shards:05}"
        parts = sorted(output.parent.glob(f"{glob.escape(output.stem)}-[0-9]*-of-[0-9]*{glob.escape(output.suffix)}"))
        for path in [output, *parts]:
            # Other processes of this run may be writing their files now; those of other numbers of parts are done.
            is_of_this_run = path == output if num_shards == 1 else path != output and path.stem.endswith(own)
            if not path.is_file():
                continue
            if path == self.path or not is_of_this_run:
                drop_cut_line(path)
            what = "caption; the file is damaged or of something else"
            for number, record in enumerate(read_jsonl(path, ConfigError, what), start=1):
                if not isinstance(record.get("id"), str):
                    raise ConfigError(f"{path}, line {number}: not a {what}")
                self._note(record)

    def _note(self, record: Mapping[str, Any]) -> None:
        clip_id = record["id"]
        self._done.setdefault(clip_id, set()).add(record.get("segment", 0))
        # A record without a segment number is that of a whole clip, which counts as one window with the number 0.
        self._num_windows[clip_id] = max(self._num_windows.get(clip_id, 1), record.get("num_segments", 1))
        if "error" in record:
            self._errors.setdefault(clip_id, str(record["error"]))


def _without_surrogates(key: str, value: Any) -> Any:
    # JSON can hold half of a surrogate pair, which strict readers refuse. An id is a file name that may not be UTF-8:
    # it stays as it is, for a resumed run must find it again.
    if isinstance(value, str) and key != "id":
        return value.encode("utf-8", "replace").decode()
    return value


def _check_settings(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Write the settings beside the output, or compare them with those of the run that is continued.

    Raises:
        ConfigError: they differ, or the file is damaged.
    """
    path = output.with_name(output.name + ".settings.json")
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    if not resume or not path.exists():
        write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))
        return
    with translate_foreign(ConfigError, path, "remove it if you know the settings of the run"):
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    # Compare both in the form that JSON gives them, since it turns tuples into lists.
    now = json.loads(text)
    for key in sorted({*begun, *now}):
        if begun.get(key) != now.get(key):
            raise ConfigError(
                f"{output}: was begun with {key} {begun.get(key)!r}, not {settings.get(key)!r}; "
                "give the same settings or name another file"
            )
