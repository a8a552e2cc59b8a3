"""Read the datasets that configurations name, from files on disk to a table of examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from video_llama.config import BuildInfo, DatasetConfig
from video_llama.constants import Modality
from video_llama.data.annotations import (
    KeyCheck,
    find_files,
    read_entries,
    read_json,
    read_part,
    read_table,
    required_list,
    required_text,
    resolve_messages,
)
from video_llama.data.columns import RowReader
from video_llama.data.examples import Example, ExampleTable, MediaSource
from video_llama.data.hf_rows import RowTable, open_rows, resolve_cell
from video_llama.data.rows import read_row
from video_llama.data.shards import find_shards, read_shard
from video_llama.errors import ConfigError, DatasetError
from video_llama.registry import DATASETS

__all__ = ["MODALITIES", "build_examples", "first_example"]

MODALITIES: dict[str, Modality] = {"video": "video", "images": "image", "audio": "audio"}
"""By the `data_type` of a section."""

Reader = Callable[["_Place"], Iterable[Example]]


@dataclass(frozen=True)
class _Place:
    """One split of one dataset, for its reader."""

    name: str
    kind: Modality
    info: BuildInfo

    def folder(self, key: str) -> Path:
        """Return one of the paths of `build_info`.

        Raises:
            ConfigError: it is not set.
        """
        return Path(self.text(key)).expanduser()

    def text(self, key: str) -> str:
        """Return one of the paths of `build_info` as it is written; errors as of `folder`."""
        value = getattr(self.info, key)
        if value is None:
            raise ConfigError(f"datasets.{self.name}.build_info.{key} must be set: the place of the dataset")
        return str(value)

    def media_folder(self, file: Path) -> Path:
        """Return the folder that paths in an annotation file are relative to."""
        return file.parent if self.info.videos_dir is None else self.folder("videos_dir")


def build_examples(name: str, config: DatasetConfig, info: BuildInfo | None = None) -> ExampleTable | RowTable:
    """Return all examples of one dataset of a configuration.

    Args:
        name: in the registry `DATASETS`; a suffix behind a colon distinguishes several of one type:
            `messages:cooking`.
        config: its section.
        info: its paths; by default those of the training split.

    Raises:
        ConfigError: an unknown name, or a path that is not set.
        DatasetError: annotations are absent, empty or malformed.
    """
    # "webvid:first" is a dataset of the type "webvid".
    reader: Reader = DATASETS.get(name.partition(":")[0])
    place = _Place(name, MODALITIES[config.data_type], info or config.build_info)
    try:
        examples = reader(place)
        # Rows at random places are read when they are needed.
        table = examples if isinstance(examples, RowTable) else ExampleTable(examples)
    except DatasetError as error:
        # Several datasets of a configuration may name the same file.
        raise DatasetError(f"datasets.{name}: {error}") from error
    if not len(table):
        raise DatasetError(f"datasets.{name}: no examples in its files")
    return table


def first_example(name: str, config: DatasetConfig) -> Example:
    """Return the first example of a dataset, without reading the others; errors as of `build_examples`."""
    info = config.build_info
    if info == BuildInfo():
        info = config.valid_build_info
    for example in DATASETS.get(name.partition(":")[0])(_Place(name, MODALITIES[config.data_type], info)):
        return example
    raise DatasetError(f"datasets.{name}: no examples in its files")


@DATASETS.register("webvid")
def read_webvid(place: _Place) -> Iterator[Example]:
    """Read WebVid: tables `videoid, page_dir, name` and `videos_dir/page_dir/videoid.mp4`."""
    videos = place.folder("videos_dir")
    for file in find_files(place.folder("anno_dir"), (".csv", ".tsv")):
        for line, row in read_table(file, ("videoid", "page_dir", "name")):
            path = videos / row["page_dir"] / f"{row['videoid']}.mp4"
            if not row["videoid"]:
                raise DatasetError(f"{file}, line {line}: no videoid")
            yield _captioned(place, row["videoid"], path, row["name"])


@DATASETS.register("audio_caption")
def read_audio_caption(place: _Place) -> Iterator[Example]:
    """Read captions of audio files: tables `audio, caption`, with file names relative to `videos_dir`."""
    folder = place.folder("videos_dir")
    for file in find_files(place.folder("anno_dir"), (".csv", ".tsv")):
        for _, row in read_table(file, ("audio", "caption")):
            yield _captioned(place, row["audio"], folder / row["audio"], row["caption"])


@DATASETS.register("cc_sbu_align")
def read_cc_sbu_align(place: _Place) -> Iterator[Example]:
    """Read MiniGPT-4's stage 2 set: `filter_cap.json` and `image/IMAGE_ID.jpg` in one folder."""
    folder = place.folder("storage")
    file = folder / "filter_cap.json"
    content = read_json(file)
    entries = content.get("annotations") if isinstance(content, dict) else None
    keys = KeyCheck()
    for number, entry in enumerate(_entries(entries, file, "'annotations'")):
        where = f"{file}, annotation {number}"
        image_id = required_text(entry, "image_id", where)
        keys.check(entry, ("image_id", "caption"), "an annotation", where)
        yield _captioned(place, image_id, folder / "image" / f"{image_id}.jpg", required_text(entry, "caption", where))


@DATASETS.register("cc_sbu")
@DATASETS.register("laion")
@DATASETS.register("shards")
def read_shards(place: _Place) -> Iterator[Example]:
    """Read webdataset shards of images or (data_type: video, audio) others; `scripts/make_shards.py` packs them."""
    for path in find_shards(place.text("storage")):
        yield from read_shard(path, place.kind, place.name)


@DATASETS.register("llava_instruct")
def read_llava_instruct(place: _Place) -> Iterator[Example]:
    """Read LLaVA-Instruct-150K: a list of `{"id", "image", "conversations"}`."""
    folder, file = place.folder("videos_dir"), place.folder("anno_dir")
    keys = KeyCheck()
    for number, entry in enumerate(_entries(read_json(file), file)):
        where = f"{file}, entry {number}"
        image = required_text(entry, "image", where)
        keys.check(entry, ("id", "image", "conversations"), "an entry", where)
        text = {"conversations": required_list(entry, "conversations", where)}
        yield Example(f"{place.name}/{entry.get('id', number)}", place.kind, MediaSource(str(folder / image)), text)


@DATASETS.register("webvid_instruct")
@DATASETS.register("webvid_instruct_zh")
def read_webvid_instruct(place: _Place) -> Iterator[Example]:
    """Read VideoChat's instructions: a list of `{"video", "QA": [{"q", "a"}, …]}`.

    VideoChat2's entries may name a part of the file (`start`, `end`), and their pairs an instruction `i`.
    """
    folder, file = place.folder("videos_dir"), place.folder("anno_dir")
    keys = KeyCheck()
    for number, entry in enumerate(_entries(read_json(file), file)):
        where = f"{file}, entry {number}"
        video = required_text(entry, "video", where)
        keys.check(entry, ("video", "QA", "start", "end"), "an entry", where)
        text = {"QA": required_list(entry, "QA", where)}
        for pair in text["QA"]:
            if isinstance(pair, Mapping):
                keys.check(pair, ("i", "q", "a"), "a question", where)
        start, end = read_part(entry, where)
        source = MediaSource(str(folder / video), start_seconds=start, end_seconds=end)
        if source.is_part and place.kind == "image":
            raise DatasetError(f"{where}: 'start' and 'end' of an image (data_type: images)")
        yield Example(f"{place.name}/{number}:{video}", place.kind, source, text)


@DATASETS.register("messages")
def read_messages(place: _Place) -> Iterator[Example]:
    """Read conversations with image, video and audio: messages, or rows of fine-tuning tools (docs/own_data.md).

    Paths are relative to `videos_dir`, or to the file itself.
    """
    keys = KeyCheck()
    for file in find_files(place.folder("anno_dir"), (".jsonl",)):
        folder = place.media_folder(file)
        for where, number, entry in read_entries(file):
            text = read_row(entry, where, keys)
            text["messages"] = resolve_messages(text["messages"], partial(os.path.join, folder), where, keys)
            id_ = entry.get("id", f"{file.stem}:{number}")
            yield Example(f"{place.name}/{id_}", place.kind, None, text)


@DATASETS.register("table")
def read_table_rows(place: _Place) -> Iterator[Example]:
    """Read tables (`.csv`, `.tsv`, `.parquet`) or lines of JSON, by the names of their columns (docs/data.md).

    Paths are relative to `videos_dir`, or to the file itself.
    """
    keys = KeyCheck()
    for file in find_files(place.folder("anno_dir"), (".csv", ".tsv", ".parquet", ".jsonl")):
        reader = RowReader(place.name, place.kind, place.info, partial(os.path.join, place.media_folder(file)), keys)
        for where, number, row in read_entries(file):
            yield reader.example(row, where, f"{file.stem}:{number}")


@DATASETS.register("hf")
def read_hf(place: _Place) -> RowTable:
    """Open a Hugging Face dataset: a folder of `save_to_disk`, one of other files, or a hub id (docs/data.md)."""
    storage = place.folder("storage")
    folder = place.folder("videos_dir") if place.info.videos_dir else storage
    resolve = partial(resolve_cell, str(folder), str(storage))
    return open_rows(place.info, RowReader(place.name, place.kind, place.info, resolve), place.name)


def _captioned(place: _Place, id_: str, path: Path, caption: str) -> Example:
    return Example(f"{place.name}/{id_}", place.kind, MediaSource(str(path)), {"caption": caption})


def _entries(content: Any, file: Path, what: str = "the file") -> list[Any]:
    if not isinstance(content, list):
        raise DatasetError(f"{file}: {what} must be a list, but is {type(content).__name__}")
    return content
