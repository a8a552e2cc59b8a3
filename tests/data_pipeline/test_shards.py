"""Webdataset shards: what is read from them, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeVideo
from video_llama.data.examples import Example, MediaSource, open_media
from video_llama.data.shards import find_shards, read_shard
from video_llama.errors import DatasetError

MakeShard = Callable[..., Path]
CAPTION = b'{"caption": "a dog"}'


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Write members, given as name and bytes, to a tar file."""

    def make(members: dict[str, bytes], name: str = "00000.tar", mode: Any = "w") -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode) as tar:
            for member, content in members.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        return path

    return make


def read(path: Path, kind: Any = "image") -> list[Example]:
    return list(read_shard(path, kind, "set"))


def content(source: MediaSource | None) -> bytes:
    assert source is not None
    with open_media(source) as path:
        return Path(path).read_bytes()


def test_members_belong_together_by_their_name_up_to_the_first_dot(make_shard: MakeShard) -> None:
    members = {"a/1.jpg": b"one", "a/1.json": CAPTION, "b/1.txt": b"two dogs \n", "b/1.PNG": b"two", "b/1.md5": b"x"}
    first, second = read(make_shard(members))
    assert (first.id, second.id) == ("set/00000/a/1", "set/00000/b/1")
    assert (first.text, second.text) == ({"caption": "a dog"}, {"caption": "two dogs"})
    assert (content(first.source), content(second.source)) == (b"one", b"two")
    assert {first.kind, second.kind} == {"image"}


@pytest.mark.parametrize(
    "text",
    [
        {"QA": [{"q": "What?", "a": "A dog."}]},
        {"conversations": [{"from": "human", "value": "<image>"}]},
        {"caption": "a dog"},
    ],
)
def test_every_form_of_annotation_is_read_and_other_keys_are_left_out(text: Any, make_shard: MakeShard) -> None:
    [example] = read(make_shard({"1.jpg": b"x", "1.json": json.dumps({**text, "url": "…"}).encode()}))
    assert example.text == text


def test_videos_and_sounds_are_found_by_the_kind_that_is_asked_for(
    make_video: MakeVideo, make_shard: MakeShard
) -> None:
    clip = make_video().read_bytes()
    path = make_shard({"1.jpg": b"thumbnail", "1.mp4": clip, "1.wav": b"sound", "1.txt": b"a dog"})
    assert content(read(path, "video")[0].source) == clip
    assert content(read(path, "audio")[0].source) == b"sound"
    assert content(read(path, "image")[0].source) == b"thumbnail"
    with open_media(read(path, "video")[0].source) as opened:  # type: ignore[arg-type]
        assert opened.endswith(".mp4")


def test_messages_name_members_by_their_suffix(make_shard: MakeShard) -> None:
    items = [{"type": "video", "path": "0.mp4"}, {"type": "audio", "path": "1.wav"}, {"type": "text", "text": "0.mp4"}]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": "A dog."}]
    members = {"7.json": json.dumps({"messages": messages}).encode(), "7.0.mp4": b"clip", "7.1.wav": b"sound"}
    [example] = read(make_shard(members), "video")
    assert example.source is None
    video, sound, text = example.text["messages"][0]["content"]
    assert content(MediaSource(**video["path"])) == b"clip"
    assert content(MediaSource(**sound["path"])) == b"sound"
    assert text == {"type": "text", "text": "0.mp4"}


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"1.json": CAPTION}, r"has no image \(.jpg, .* but only .json"),
        ({"1.jpg": b"x"}, "no annotation .* beside .jpg"),
        ({"1.jpg": b"x", "1.json": b"{"}, "json: not JSON"),
        ({"1.jpg": b"x", "1.json": b"\xff"}, "json: not JSON"),
        ({"1.jpg": b"x", "1.json": b"[1]"}, "none of messages, conversations, QA, caption"),
        ({"1.jpg": b"x", "1.json": b'{"caption": null}'}, "'caption' is None, not text"),
        ({"1.jpg": b"x", "1.json": b'{"QA": "text"}'}, "'QA' must be a list"),
        ({"1.json": b'{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}]}]}'}, "a.jpg"),
        ({"1.jpg": b"x", "1.pickle": b"cos\nsystem\n(S'touch /tmp/x'\ntR."}, "no annotation"),
    ],
)
def test_a_sample_that_lacks_something_is_named(members: dict[str, bytes], cause: str, make_shard: MakeShard) -> None:
    good = {"0.jpg": b"x", "0.txt": b"a dog"}
    with pytest.raises(DatasetError, match=rf"00000\.tar: 1.*{cause}"):
        read(make_shard({**good, **members}))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_a_truncated_shard_is_a_dataset_error(share: float, make_shard: MakeShard) -> None:
    path = make_shard({f"{n}.{end}": b"x" * 700 for n in range(5) for end in ("jpg", "txt")})
    whole = 10 * (512 + 1024)
    path.write_bytes(path.read_bytes()[: round(whole * share)])
    with pytest.raises(DatasetError, match=r"not a whole tar file|no annotation"):
        read(path)


def test_a_compressed_or_foreign_file_is_a_dataset_error(make_shard: MakeShard, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a whole tar file"):
        read(make_shard({"1.jpg": b"x", "1.txt": b"a dog"}, mode="w:gz"))
    path = tmp_path / "other.tar"
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DatasetError, match="not a whole tar file"):
        read(path)


def test_links_and_folders_in_a_shard_are_left_out(make_shard: MakeShard) -> None:
    path = make_shard({"1.jpg": b"x", "1.txt": b"a dog"})
    with tarfile.open(path, "a") as tar:
        link, folder = tarfile.TarInfo("2.jpg"), tarfile.TarInfo("more")
        link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
        tar.addfile(link)
        tar.addfile(folder)
    assert [example.id for example in read(path)] == ["set/00000/1"]


def test_shards_are_found_by_folder_by_file_and_by_pattern(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [make_shard({}, f"{number:05d}.tar") for number in (1, 0)][::-1]
    assert find_shards(str(tmp_path)) == paths
    assert find_shards(str(tmp_path / "{00000..00001}.tar")) == paths
    assert find_shards(str(paths[1])) == paths[1:]


def test_absent_shards_are_a_dataset_error(make_shard: MakeShard, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no shards"):
        find_shards(str(tmp_path))
    make_shard({})
    with pytest.raises(DatasetError, match=r"2 of 3 shards are absent, the first is .*00001\.tar"):
        find_shards(str(tmp_path / "{00000..00002}.tar"))


@pytest.mark.parametrize(
    "storage",
    [
        "pipe:touch ran",
        "pipe:touch ran; cat {0..3}.tar",
        "file:///0.tar",
        "ftp://host/0.tar",
        "simplecache::s3://bucket/0.tar",
    ],
)
def test_commands_and_other_addresses_are_refused_and_never_run(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"shards are files, or at addresses|are absent"):
        find_shards(storage)
    with pytest.raises(DatasetError, match="absent"):
        find_shards(f"0.tar::{storage}")
    for address in (f"s3://bucket/0.tar::{storage}", f"s3://bucket/{{0..1}}.tar::{storage}"):
        with pytest.raises(DatasetError, match="not an address of a file"):
            find_shards(address)
    assert not (tmp_path / "ran").exists()


def test_a_shard_is_indexed_once_and_again_when_it_has_changed(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_shard({"a.jpg": b"one", "a.txt": b"first"})
    first = list(read_shard(path, "image", "laion"))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", pytest.fail)
        assert list(read_shard(path, "image", "laion")) == first
        assert [example.id for example in read_shard(path, "image", "other")] == [f"other/{path.stem}/a"]
    (path.parent / ".index" / f"{path.name}.image.json").write_text("damaged")
    assert list(read_shard(path, "image", "laion")) == first
    changed = make_shard({"a.jpg": b"one more", "a.txt": b"second"})
    assert [example.text for example in read_shard(changed, "image", "laion")] == [{"caption": "second"}]


def test_shards_in_a_folder_that_cannot_be_written_are_read_all_the_same(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "read-only")

    path = make_shard({"a.jpg": b"one", "a.txt": b"first"})
    monkeypatch.setattr("video_llama.data.shards.write_whole", refuse)
    assert len(list(read_shard(path, "image", "laion"))) == 1
    assert not list((path.parent / ".index").iterdir())
