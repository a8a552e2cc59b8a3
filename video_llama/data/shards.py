"""Webdataset shards: plain tar files whose members belong together by the name up to the first dot.

A shard is indexed once (in `.index` beside it) and then read at random, so order, resuming and sharing among processes
are those of any other dataset. Annotations are JSON or text only: no pickles, no commands as addresses.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from video_llama.constants import Modality
from video_llama.data.annotations import KeyCheck, required_list, required_text, resolve_messages
from video_llama.data.examples import SUFFIXES, Example, MediaSource, build_example, fields_of
from video_llama.data.remote import RemoteFile, is_remote, list_shards, local_file
from video_llama.data.rows import read_row
from video_llama.errors import DatasetError
from video_llama.utils.extras import import_extra
from video_llama.utils.files import write_whole

__all__ = ["Shard", "find_shards", "index_shard", "read_shard"]

logger = logging.getLogger(__name__)

# Beside the shards.
_INDEX_FOLDER = ".index"
_INDEX_VERSION = 2


Shard = Path | RemoteFile


def find_shards(storage: str) -> list[Shard]:
    """Return the tar files of a folder, or of a pattern such as `data/{00000..00099}.tar`, here or at an address.

    Raises:
        DatasetError: there is none, one is absent, an address cannot be listed, or the pattern is a command.
        ConfigError: webdataset, which reads patterns, or what reads the address is not installed.
    """
    # fsspec would open chains of addresses, and webdataset lists of them.
    if "::" in storage and is_remote(storage.partition("::")[0]):
        raise DatasetError(f"{storage}: not an address of a file; `::` is not supported")
    if is_remote(storage):
        return [*map(RemoteFile, _remote_addresses(storage))]
    storage = os.path.expanduser(storage)
    # webdataset would run commands such as `pipe:`, so refuse everything else with a scheme.
    if re.match(r"[a-z][a-z0-9+.-]*:", storage):
        raise DatasetError(f"{storage}: shards are files, or at addresses of s3, gs, az, hf, http or https")
    folder = Path(storage)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
    elif "{" in storage or "::" in storage:
        shardlists = import_extra("webdataset.shardlists", f"the pattern of shards {storage}")
        paths = [Path(path) for path in shardlists.expand_urls(storage)]
    else:
        paths = [folder]
    if not paths:
        raise DatasetError(f"{storage}: no shards (*.tar) in it")
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise DatasetError(f"{storage}: {len(absent)} of {len(paths)} shards are absent, the first is {absent[0]}")
    return [*paths]


def _remote_addresses(storage: str) -> list[str]:
    if "{" in storage:
        shardlists = import_extra("webdataset.shardlists", f"the pattern of shards {storage}")
        return [str(address) for address in shardlists.expand_urls(storage)]
    if storage.endswith(".tar"):
        return [storage]
    addresses = list_shards(storage)
    if not addresses:
        raise DatasetError(f"{storage}: no shards (*.tar) in it")
    return addresses


def read_shard(path: Shard, kind: Modality, name: str) -> Iterator[Example]:
    """Yield the examples of one shard.

    Args:
        path: the tar file; one at an address is copied here first.
        kind: modality of the media file of each sample.
        name: of the dataset, for ids.

    Raises:
        DatasetError: not a tar file, truncated, or a sample without media or annotation.
    """
    for id_, fields, text in index_shard(path, kind):
        yield build_example(f"{name}/{id_}", kind, fields, text)


def index_shard(path: Shard, kind: Modality) -> list[Any]:
    """Return the samples of a shard from its index, which is written if it is absent or of another shard.

    Returns:
        (id, fields of the `MediaSource` or None, text) of each sample.

    Raises:
        DatasetError: as `read_shard`.
    """
    # A shard that was moved or written again has another identity, and is indexed anew.
    index, identity = _index_of(path, kind)
    rows = _load_index(index, identity)
    if rows is None:
        try:
            # "r:" accepts no compressed archives: members are read by their offset, which compression would hide.
            with local_file(str(path)) as local, tarfile.open(local, "r:") as shard:
                keys = KeyCheck()
                examples = [_example(shard, path, key, members, kind, keys) for key, members in _group(shard)]
        except (tarfile.TarError, EOFError) as error:
            raise DatasetError(f"{path}: not a whole tar file ({error}); copy it again") from error
        rows = [[example.id, fields_of(example.source), example.text] for example in examples]
        _save_index(index, identity, rows)
    return rows


def _index_of(path: Shard, kind: Modality) -> tuple[Path, list[Any]]:
    """Return where the index of a shard is, and what it is of."""
    if isinstance(path, RemoteFile):
        return path.index_stem.with_name(f"{path.index_stem.name}.{kind}.json"), [_INDEX_VERSION, *path.identity]
    stat = path.stat()
    index = path.parent / _INDEX_FOLDER / f"{path.name}.{kind}.json"
    return index, [_INDEX_VERSION, str(path), stat.st_size, stat.st_mtime_ns]


def _load_index(index: Path, identity: Sequence[Any]) -> list[Any] | None:
    """Return the rows of an index, None if it is absent or of another or changed shard."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("shard") != list(identity):
        return None
    return list(content["rows"])


def _save_index(index: Path, identity: Sequence[Any], rows: Sequence[Any]) -> None:
    # Where no index can be written, every process reads the shards again.
    content = json.dumps({"shard": identity, "rows": rows}, ensure_ascii=False)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_whole(index, lambda partial: partial.write_text(content, encoding="utf-8"))
    except OSError as error:
        logger.info("%s cannot be written (%s)", index, error)


def _group(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield (key, members by suffix) of the samples, in order."""
    # The files of a sample are neighbours with one name up to the first dot, as webdataset has it.
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in shard:
        if not member.isfile():
            continue
        folder, _, file_name = member.name.rpartition("/")
        stem, _, suffix = file_name.partition(".")
        member_key = f"{folder}/{stem}" if folder else stem
        # A new name begins the next sample, so the one before it is complete.
        if member_key != key and members:
            yield key, members
            members = {}
        key = member_key
        members["." + suffix.lower()] = member
    if members:
        yield key, members


def _example(
    shard: tarfile.TarFile,
    path: Shard,
    key: str,
    members: Mapping[str, tarfile.TarInfo],
    kind: Modality,
    keys: KeyCheck,
) -> Example:
    where = f"{path}: {key}"
    text = dict(_read_text(shard, members, where, keys))
    if "messages" in text:
        resolve = partial(_member_fields, path, members, where)
        text["messages"] = resolve_messages(text["messages"], resolve, f"{where}.json", keys)
        return Example(f"{path.stem}/{key}", kind, None, text)
    # Of several media files in one sample, the one whose suffix comes first in the table counts.
    for suffix in SUFFIXES[kind]:
        if suffix in members:
            source = MediaSource(**_member_fields(path, members, where, suffix[1:]))
            return Example(f"{path.stem}/{key}", kind, source, text)
    raise DatasetError(f"{where} has no {kind} ({', '.join(SUFFIXES[kind])}) but only {', '.join(members)}")


def _member_fields(path: Shard, members: Mapping[str, tarfile.TarInfo], where: str, suffix: str) -> dict[str, Any]:
    """Return the fields of the `MediaSource` of a member by its suffix: "mp4", in messages "0.mp4"."""
    member = members.get(f".{suffix.lower()}")
    if member is None:
        raise DatasetError(f"{where}.json names {suffix!r}, but the sample has only {', '.join(members)}")
    return {"path": str(path), "name": member.name, "offset": member.offset_data, "size": member.size}


def _read_text(
    shard: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], where: str, keys: KeyCheck
) -> Mapping[str, Any]:
    if ".json" in members:
        try:
            entry = json.loads(_read(shard, members[".json"]))
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where}.json: not JSON ({error})") from error
        forms: Sequence[str] = ("messages", "conversations", "QA", "caption")
        for form in forms:
            if not isinstance(entry, Mapping) or form not in entry:
                continue
            if form == "messages":
                return read_row(entry, f"{where}.json", keys)
            if form == "caption":
                return {form: required_text(entry, form, f"{where}.json")}
            # The tools that write shards add what they know of a file, its name and size, so unknown keys are usual.
            keys.refuse(entry, "a sample", f"{where}.json")
            return {form: required_list(entry, form, f"{where}.json")}
        raise DatasetError(f"{where}.json: has none of {', '.join(forms)}")
    if ".txt" in members:
        return {"caption": _read(shard, members[".txt"]).decode("utf-8", errors="replace").strip()}
    raise DatasetError(f"{where}: no annotation (.json or .txt) beside {', '.join(members)}")


def _read(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None, "only files are grouped"
    return file.read()
