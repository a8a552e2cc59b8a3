"""The compact table of examples, and files on disk and in shards."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from video_llama.data.examples import Example, ExampleTable, MediaSource, open_media, read_media
from video_llama.errors import DatasetError, MediaError

EXAMPLES = [
    Example("a/1", "video", MediaSource("videos/1.mp4"), {"caption": "zwei Hunde, 两只狗"}),
    Example("a/2", "image", MediaSource("0.tar", "2.jpg", 512, 90), {"QA": [{"q": "What?", "a": "A dog."}]}),
    Example("a/3", "audio", None, {"messages": [{"role": "user", "content": "hello"}]}),
]


def test_a_table_gives_back_what_it_was_made_of() -> None:
    table = ExampleTable(iter(EXAMPLES))
    assert len(table) == 3
    assert list(table) == EXAMPLES
    assert table[-1] == EXAMPLES[2]
    assert table[1:] == EXAMPLES[1:]
    assert table[::-2] == EXAMPLES[::-2]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_the_table_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        ExampleTable(EXAMPLES)[index]


def test_a_table_may_be_empty_and_travels_to_other_processes() -> None:
    assert len(ExampleTable([])) == 0
    assert list(pickle.loads(pickle.dumps(ExampleTable(EXAMPLES)))) == EXAMPLES


def test_a_table_has_no_python_object_for_each_example() -> None:
    examples = (Example(f"a/{n}", "video", MediaSource(f"{n}.mp4"), {"caption": "x" * 100}) for n in range(1000))
    assert len(pickle.dumps(ExampleTable(examples))) < 1000 * 200


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    [example] = ExampleTable([Example("a", "image", None, {"caption": "dog \ud83d!"})])
    assert example.text == {"caption": "dog ?!"}


def test_a_file_of_its_own_is_opened_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    with open_media(MediaSource(str(path))) as opened:
        assert opened == str(path)
    assert path.exists()
    assert b"".join(read_media(MediaSource(str(path)))) == b"content"


def test_a_file_in_a_shard_is_copied_out_under_its_suffix_and_removed_again(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"....content....")
    source = MediaSource(str(shard), "folder/7.jpg", 4, 7)
    with open_media(source) as opened:
        assert opened.endswith(".jpg")
        assert Path(opened).read_bytes() == b"content"
    assert not os.path.exists(opened)
    assert b"".join(read_media(source)) == b"content"


def test_the_copy_is_removed_when_its_reader_fails(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"content")
    with pytest.raises(ZeroDivisionError), open_media(MediaSource(str(shard), "a.jpg", 0, 7)) as opened:
        raise ZeroDivisionError
    assert not os.path.exists(opened)


def test_a_shard_shorter_than_its_index_is_a_dataset_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, scratch = tmp_path / "0.tar", tmp_path / "scratch"
    shard.write_bytes(b"....con")
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(DatasetError, match=r"a\.jpg is cut off"), open_media(MediaSource(str(shard), "a.jpg", 4, 7)):
        pass
    assert not list(scratch.iterdir())


def test_an_absent_shard_is_an_unreadable_sample(tmp_path: Path) -> None:
    source = MediaSource(str(tmp_path / "0.tar"), "a.jpg", 0, 7)
    with pytest.raises(MediaError, match="no such file"):
        list(read_media(source))
