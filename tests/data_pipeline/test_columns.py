"""Tables that people own: a media column and a text column, or a conversation, in any of the usual formats."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import WriteText
from video_llama.config import BuildInfo, Config, DatasetConfig
from video_llama.data.build import build_datasets, holds_messages
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, MediaSource
from video_llama.errors import DatasetError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "caption": 'Dr. Smith says: "STOP!", at 3:15'},
    {"video": "b/ü.mp4", "caption": "zwei\nZeilen"},
]


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as the standard library or pyarrow writes them."""
    path = folder / f"rows.{suffix}"
    if suffix == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path, data_type: str = "video", **info: str) -> list[Example]:
    section = DatasetConfig(data_type=data_type, build_info=BuildInfo(anno_dir=str(path), **info))
    return list(build_examples("table", section))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_media_column_and_a_text_column_are_captions(suffix: str, tmp_path: Path) -> None:
    examples = read(write_rows(tmp_path, suffix, ROWS))
    assert [(example.kind, example.source, example.text) for example in examples] == [
        ("video", MediaSource(str(tmp_path / row["video"])), {"caption": row["caption"]}) for row in ROWS
    ]
    assert len({example.id for example in examples}) == 2


def test_columns_may_have_any_name_and_paths_another_folder(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "csv", [{"id": "7", "clip": "a.wav", "says": "a dog"}])
    columns = {"media_column": "clip", "text_column": "says"}
    [example] = read(path, "audio", videos_dir="/media", **columns)
    assert example == Example("table/7", "audio", MediaSource("/media/a.wav"), {"caption": "a dog"})
    with pytest.raises(DatasetError, match=r"line 2: no column audio or .*there are id, clip, says.*media_column"):
        read(path, "audio")
    with pytest.raises(DatasetError, match=r"no column speech .*name it as build_info.text_column"):
        read(path, media_column="clip", text_column="speech")


def test_a_question_column_makes_dialogues(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "csv", [{"image": "a.jpg", "question": "What?", "answer": "A dog."}])
    [example] = read(path, "images", question_column="question")
    assert read(path, "images") == [example]
    asked, answered = example.text["messages"]
    assert asked["content"] == [
        {"type": "image", "path": str(tmp_path / "a.jpg")}, {"type": "text", "text": "What?"}
    ]  # fmt: skip
    assert (answered["content"], example.source) == ("A dog.", None)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_of_conversations_are_read_as_messages_are(suffix: str, tmp_path: Path) -> None:
    talk: Any = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Rings."}]
    videos: Any = ["a.mp4"]
    if suffix == "csv":
        talk, videos = json.dumps(talk), json.dumps(videos)
    path = write_rows(tmp_path, suffix, [{"conversations": talk, "videos": videos}])
    [example] = read(path)
    assert example.text["messages"] == [
        {"role": "user", "content": [
            {"type": "video", "path": str(tmp_path / "a.mp4")}, {"type": "text", "text": "What?"},
        ]},
        {"role": "assistant", "content": "Rings."},
    ]  # fmt: skip
    section = DatasetConfig(build_info=BuildInfo(anno_dir=str(path)))
    assert holds_messages("table:mine", section)
    captions = DatasetConfig(build_info=BuildInfo(anno_dir=str(write_rows(tmp_path, "tsv", ROWS))))
    assert not holds_messages("table", captions)


def test_what_is_not_used_is_told_and_media_that_are_not_used_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(write_rows(tmp_path, "csv", [{**row, "views": "3"} for row in ROWS]))
    assert caplog.text.count("the key 'views' of a row is not used") == 1
    with pytest.raises(DatasetError, match=r"line 2: 'audio' of a row names media that would not be used: 'a.wav'"):
        read(write_rows(tmp_path, "csv", [{**row, "audio": "a.wav"} for row in ROWS]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "video,caption\n,a dog\n", r"line 2: the column 'video' must name one file, but holds 'None'"),
        ("a.jsonl", '{"video": ["a", "b"], "caption": "c"}', r"line 1: the column 'video' must name one file"),
        ("a.csv", 'conversations\n"[1"\n', r"line 2: the column 'conversations' holds no JSON"),
        ("a.csv", "video,caption\n", r"a header and no rows"),
    ],
)
def test_a_malformed_row_is_named(name: str, content: str, message: str, write: WriteText) -> None:
    with pytest.raises(DatasetError, match=message):
        read(write(name, content))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(DatasetError, match=r"a\.parquet: no table that can be read"):
        read(tmp_path / "a.parquet")


def test_a_table_trains_as_any_other_dataset(
    tmp_path: Path, corpus: Path, processor: VideoLlamaProcessor, write: WriteText
) -> None:
    clip = next((corpus / "train/webvid/videos").rglob("*.mp4"))
    table = write("captions.csv", f"path,text\n{clip},Two Rings.\n{clip},\n")
    section = DatasetConfig(build_info=BuildInfo(anno_dir=str(table)), clean_captions=False)
    [dataset] = build_datasets(Config(datasets={"table": section}), processor, training=True)
    sample = dataset.encoder(dataset.examples[0])
    learnt = processor.tokenizer.decode([label for label in sample.labels if label >= 0])
    assert learnt.startswith("Two Rings.")
    assert sample.media[0].name == "pixel_values"
    # An empty text among many is a bad sample, not the end of the run.
    with pytest.raises(DatasetError, match="is empty"):
        dataset.encoder(dataset.examples[1])
