"""Annotation files, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import WriteText
from video_llama.data.annotations import (
    find_files,
    read_json,
    read_json_lines,
    read_table,
    required_list,
    required_text,
    resolve_messages,
)
from video_llama.errors import DatasetError


def test_a_folder_gives_its_annotation_files_in_order_and_no_others(write: WriteText, tmp_path: Path) -> None:
    for name in ("b.tsv", "a.csv", "c.CSV", "readme.txt"):
        write(name, "x")
    assert [path.name for path in find_files(tmp_path, (".csv", ".tsv"))] == ["a.csv", "b.tsv", "c.CSV"]


def test_a_file_may_have_any_name(write: WriteText) -> None:
    path = write("captions.txt", "x")
    assert find_files(path, (".csv",)) == [path]


@pytest.mark.parametrize(("name", "cause"), [("absent", "no such file or folder"), (".", "no annotation file in it")])
def test_a_folder_without_annotations_is_an_error_that_names_it(name: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=cause) as caught:
        find_files(tmp_path / name, (".csv", ".tsv"))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("name", "separator"), [("clips.csv", ","), ("clips.tsv", "\t")])
def test_a_table_gives_the_columns_it_is_asked_for_with_their_lines(
    name: str, separator: str, write: WriteText
) -> None:
    rows = [["id", "other", "name"], ["1", "x", '"two, or\nthree"'], ["2", "y", ""]]
    path = write(name, "\n".join(separator.join(row) for row in rows) + "\n")
    assert list(read_table(path, ("name", "id"))) == [
        (3, {"name": "two, or\nthree", "id": "1"}),
        (4, {"name": "", "id": "2"}),
    ]


def test_quotes_may_hold_line_breaks_and_the_last_line_may_lack_one(write: WriteText) -> None:
    path = write("clips.csv", 'videoid,name\n1,"two\nlines"\n2,last')
    assert list(read_table(path, ("name",))) == [(3, {"name": "two\nlines"}), (4, {"name": "last"})]


def test_a_byte_order_mark_is_no_part_of_the_first_column(write: WriteText) -> None:
    assert list(read_table(write("a.csv", "\ufeffid\n1\n"), ("id",))) == [(2, {"id": "1"})]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "no column videoid, name .*empty"),
        ("videoid,title\n1,x\n", r"no column name \(its header has videoid, title\)"),
        ("videoid,name\n", "a header and no rows"),
        ("videoid,name\n1,x\n2\n", "line 3: fewer fields"),
        ("videoid,name\n1,a dog, and a cat\n", "line 2: more fields than the header; a text with commas needs quotes"),
        ("videoid,name,name\n1,x,y\n", "its header has name more than once"),
        ('videoid,name\n1,x\n2,"y\n3,z\n', "line 3: a quote opens here and is never closed"),
    ],
)
def test_a_table_that_lacks_something_says_what_and_where(content: str, cause: str, write: WriteText) -> None:
    path = write("clips.csv", content)
    with pytest.raises(DatasetError, match=cause) as caught:
        list(read_table(path, ("videoid", "name")))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["latin.csv", "latin.json", "latin.jsonl"])
def test_text_that_is_not_utf8_is_a_dataset_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'name\n"caf\xe9"\n')
    read: Any = {
        ".csv": lambda: list(read_table(path, ("name",))),
        ".json": lambda: read_json(path),
        ".jsonl": lambda: list(read_json_lines(path)),
    }[path.suffix]
    with pytest.raises(DatasetError, match=name):
        read()


def test_json_files_are_read_and_lines_are_numbered(write: WriteText) -> None:
    assert read_json(write("a.json", [{"a": "ü"}])) == [{"a": "ü"}]
    lines = '{"a": 1}\n\n{"a": "\u2028"}\n'
    assert list(read_json_lines(write("a.jsonl", lines))) == [(1, {"a": 1}), (3, {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("name", "cause"),
    [("a.json", "not JSON"), ("deep.json", "not JSON"), ("absent.json", "no such file"), (".", "folder")],
)
def test_what_is_no_json_file_is_a_dataset_error(name: str, cause: str, write: WriteText, tmp_path: Path) -> None:
    write("a.json", "[1, ")
    write("deep.json", "[" * 99_999)
    with pytest.raises(DatasetError, match=cause):
        read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ('{"a": 1}\n{"a"\n', "line 2: not JSON"),
        ("[1]\n", "line 1: a list"),
        ("[" * 99_999, "line 1: not JSON"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(content: str, cause: str, write: WriteText) -> None:
    with pytest.raises(DatasetError, match=cause):
        list(read_json_lines(write("a.jsonl", content)))


def test_absent_lines_are_a_dataset_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_a_required_text_may_be_a_number() -> None:
    assert [required_text({"id": value}, "id", "here") for value in ("a", 7)] == ["a", "7"]


@pytest.mark.parametrize(
    ("entry", "cause"),
    [({}, "missing"), ({"id": None}, "not text"), ({"id": True}, "not text"), ({"id": 1.5}, "not text"), ([], "list")],
)
def test_a_required_text_that_is_none_says_where(entry: Any, cause: str) -> None:
    with pytest.raises(DatasetError, match=f"file.json, entry 3.*{cause}"):
        required_text(entry, "id", "file.json, entry 3")


@pytest.mark.parametrize("entry", [{}, {"QA": []}, {"QA": "text"}, {"QA": {"q": "a"}}, ["QA"]])
def test_a_required_list_must_hold_something(entry: Any) -> None:
    assert required_list({"QA": [1]}, "QA", "here") == [1]
    with pytest.raises(DatasetError, match="here: 'QA' must be a list"):
        required_list(entry, "QA", "here")


def test_media_items_are_resolved_however_they_name_their_file() -> None:
    items = [
        {"type": "video", "path": "a.mp4"},
        {"type": "image", "image": "b.jpg"},
        {"type": "audio", "url": "c.wav"},
        {"type": "text", "text": "path"},
    ]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": "a.mp4"}]
    resolved = resolve_messages(messages, str.upper, "here")
    assert resolved == [
        {
            "role": "user",
            "content": [
                {"type": "video", "path": "A.MP4"},
                {"type": "image", "path": "B.JPG"},
                {"type": "audio", "path": "C.WAV"},
                {"type": "text", "text": "path"},
            ],
        },
        {"role": "assistant", "content": "a.mp4"},
    ]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("hello", "a message is a str"),
        ({"role": "user"}, "content of a message"),
        ({"role": "user", "content": 5}, "content of a message"),
        ({"role": "user", "content": ["hello"]}, "item is a str"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text' is missing"),
        ({"role": "user", "content": [{"type": "film", "path": "a"}]}, "not 'film'"),
        ({"role": "user", "content": [{"type": "video"}]}, "names no file"),
        ({"role": "user", "content": [{"type": "video", "path": {"path": "a"}}]}, "names no file"),
    ],
)
def test_a_message_of_another_form_is_a_dataset_error(message: Any, cause: str) -> None:
    with pytest.raises(DatasetError, match=f"line 4: .*{cause}"):
        resolve_messages([message], str, "line 4")


@pytest.mark.parametrize("content", ["", "\n", "\n\n", "\n\nvideo,caption\na,b"])
def test_a_table_without_a_header_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"empty|header"):
        list(read_table(path))


def test_a_header_of_several_lines_is_named_in_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('video,"cap\ntion"\na,b\n')
    with pytest.raises(DatasetError, match=r"no column caption \(its header has video, cap tion"):
        list(read_table(path, ["caption"]))
