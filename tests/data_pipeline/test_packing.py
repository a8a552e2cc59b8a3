"""Packing datasets into shards, and reading them back."""

from __future__ import annotations

import json
import os
import runpy
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from torch.testing import assert_close

from tests.data_pipeline.conftest import MakeEncoder, WriteText, captioned, write_picture
from tests.data_pipeline.test_datasets import LAYOUTS, build, layout
from video_llama.config import BuildInfo, DatasetConfig
from video_llama.data.build import holds_messages
from video_llama.data.examples import Example, media_sources, read_media
from video_llama.data.packing import pack_examples
from video_llama.errors import DatasetError, MediaError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Example]:
    """Seven captioned pictures."""
    paths = [write_picture(tmp_path / f"media/{number}.JPG", (number * 30, 9, 9)) for number in range(7)]
    return [captioned(path, f"caption {path.stem}", id_=f"set/{path.stem}") for path in paths]


def unpack(folder: Path, data_type: str = "images") -> list[Example]:
    return build("shards", BuildInfo(storage=str(folder)), data_type)


def contents(example: Example) -> list[bytes]:
    return [b"".join(read_media(source)) for source in media_sources(example)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_paths(text: Any) -> Any:
    """An annotation, with only the kinds of its media."""
    if isinstance(text, dict):
        return {key: without_paths(value) for key, value in text.items() if key != "path"}
    return [without_paths(item) for item in text] if isinstance(text, list) else text


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_dataset_comes_back_as_it_was(name: str, corpus: Path, make_encoder: MakeEncoder, tmp_path: Path) -> None:
    before = layout(name, corpus)
    packed = pack_examples(before, tmp_path / "shards", max_count=4)
    after = unpack(tmp_path / "shards", LAYOUTS[name][0])
    assert packed.num_examples == len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert without_paths(new.text) == without_paths(old.text)
        assert contents(new) == contents(old)
        assert new.kind == old.kind
    encoder = make_encoder(max_txt_len=300)
    first, second = encoder(before[0]), encoder(after[0])
    assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
    for old_item, new_item in zip(first.media, second.media, strict=True):
        assert_close(new_item.values, old_item.values, rtol=0, atol=0)
    section = DatasetConfig(data_type=LAYOUTS[name][0], build_info=BuildInfo(storage=str(tmp_path / "shards")))
    assert holds_messages(f"shards:{name}", section) == name.startswith("messages")


def test_a_file_that_messages_name_twice_is_packed_once(corpus: Path, tmp_path: Path) -> None:
    example = next(e for e in layout("messages", corpus) if len(media_sources(e)) == 2)  # a clip and its own sound
    pack_examples([example], tmp_path / "shards")
    with tarfile.open(tmp_path / "shards/00000.tar") as tar:
        assert tar.getnames() == ["000000000.json", "000000000.0.mp4"]


def test_shards_can_be_packed_anew(pictures: list[Example], tmp_path: Path) -> None:
    pack_examples(pictures, tmp_path / "small", max_count=2)
    pack_examples(unpack(tmp_path / "small"), tmp_path / "large")
    assert [contents(e) for e in unpack(tmp_path / "large")] == [contents(e) for e in pictures]


def test_webdataset_itself_reads_them(pictures: list[Example], tmp_path: Path) -> None:
    [shard] = pack_examples(pictures, tmp_path / "shards").shards
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [json.loads(sample["json"])["caption"] for sample in samples] == [e.text["caption"] for e in pictures]
    assert [sample["jpg"] for sample in samples] == [contents(e)[0] for e in pictures]
    assert json.loads(samples[3]["json"])["id"] == "set/3"


@pytest.mark.parametrize(("max_count", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_a_shard_holds_no_more_examples_than_it_may(
    max_count: int, expected: list[int], pictures: list[Example], tmp_path: Path
) -> None:
    advanced: list[int] = []
    packed = pack_examples(pictures, tmp_path / "shards", max_count=max_count, advance=advanced.append)
    assert advanced == expected
    assert [path.name for path in packed.shards] == [f"{number:05d}.tar" for number in range(len(expected))]


def test_a_shard_is_no_larger_than_it_may_be_unless_one_example_is(pictures: list[Example], tmp_path: Path) -> None:
    limit = 6 << 10
    large = write_picture(tmp_path / "large.jpg", size=(1500, 1500))
    assert large.stat().st_size > limit
    packed = pack_examples([*pictures, captioned(large)], tmp_path / "shards", max_bytes=limit)
    end = 1024
    assert len(packed.shards) > 3
    assert all(path.stat().st_size <= limit + end for path in packed.shards[:-1])
    assert all(path.stat().st_size > limit - 3000 for path in packed.shards[:-2])
    assert len(unpack(tmp_path / "shards")) == 8


def test_the_same_examples_and_limits_give_the_same_bytes(pictures: list[Example], tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_examples(pictures, tmp_path / name, max_count=3)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_stopped_run_leaves_whole_shards_and_goes_on(
    pictures: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "shards", tmp_path / "whole"
    pack_examples(pictures, whole, max_count=2)

    def stop(num_examples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_examples(pictures, folder, max_count=2, advance=stop)
    assert sorted(files(folder)) == ["00000.tar", "packing.json"]
    written = (folder / "00000.tar").stat().st_mtime_ns
    (folder / ".00001.tar.4711.incomplete").write_bytes(b"what a kill left")
    pack_examples(pictures, folder, max_count=2)
    assert files(folder) == files(whole)
    assert (folder / "00000.tar").stat().st_mtime_ns == written


def test_a_shard_that_cannot_be_finished_is_not_there(
    pictures: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        if any(tmp_path.glob("shards/packing.json")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DatasetError, match=r"00000\.tar: cannot be written \(No space left"):
        pack_examples(pictures, tmp_path / "shards")
    assert sorted(files(tmp_path / "shards")) == ["packing.json"]


@pytest.mark.parametrize("change", ["limits", "examples", "a file", "no packing"])
def test_a_folder_with_something_else_in_it_is_refused(change: str, pictures: list[Example], tmp_path: Path) -> None:
    folder, settings = tmp_path / "shards", {"max_count": 3}
    if change == "no packing":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    else:
        pack_examples(pictures, folder, **settings)
    if change == "limits":
        settings = {"max_count": 2}
    if change == "examples":
        pictures = pictures[:-1]
    if change == "a file":
        write_picture(tmp_path / "media/3.JPG", (0, 0, 255))
    before = files(folder)
    with pytest.raises(DatasetError, match="choose another folder"):
        pack_examples(pictures, folder, **settings)
    assert files(folder) == before


def test_absent_files_stop_before_anything_is_written(pictures: list[Example], tmp_path: Path) -> None:
    (tmp_path / "media/3.JPG").unlink()
    with pytest.raises(DatasetError, match=r"files of 1 of 7 examples are absent \(set/3\)"):
        pack_examples(pictures, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_absent_files_can_be_left_out_and_are_listed(pictures: list[Example], tmp_path: Path) -> None:
    (tmp_path / "media/3.JPG").unlink()
    packed = pack_examples(pictures, tmp_path / "shards", skip_absent=True)
    assert (packed.num_examples, packed.absent) == (6, ["set/3"])
    assert (tmp_path / "shards/absent.jsonl").read_text() == '{"id": "set/3"}\n'
    assert [e.text["caption"] for e in unpack(tmp_path / "shards")] == [f"caption {n}" for n in (0, 1, 2, 4, 5, 6)]


def test_a_file_that_a_shard_could_not_give_back_is_refused(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.jpg").rename(tmp_path / "a.xyz")
    with pytest.raises(DatasetError, match=r"called \.xyz; a shard holds image as \.jpg"):
        pack_examples([captioned(path)], tmp_path / "shards")


@pytest.mark.parametrize("limits", [{"max_count": 0}, {"max_bytes": 0}])
def test_limits_without_a_meaning_are_errors(limits: Any, pictures: list[Example], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="at least one"):
        pack_examples(pictures, tmp_path / "shards", **limits)


def run_script(*arguments: object) -> int:
    main: Any = runpy.run_path(str(ROOT / "scripts/make_shards.py"))["main"]
    return int(main([str(argument) for argument in arguments]))


def test_the_script_packs_a_dataset_by_its_paths(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split, out = corpus / "train", tmp_path / "out"
    where: Sequence[object] = ("--anno", split / "webvid/annotations", "--media", split / "webvid/videos")
    assert run_script("--dataset", "webvid", *where, "--out", out, "--max-count", 4, "--max-size", "1M") == 0
    printed = capsys.readouterr().out
    assert "10 examples in 3 shards" in printed
    assert f"shards:webvid:\n    data_type: video\n    build_info: {{storage: {out}}}" in printed
    assert len(unpack(out, "video")) == 10


def test_the_script_keeps_the_other_keys_of_a_section(
    write: WriteText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "a.png")
    write("rows.csv", "file_of_it,meaning,caption\na.png,a dog,not this\n")
    text = (
        "datasets: {table: {data_type: images, build_info: "
        "{anno_dir: rows.csv, media_column: file_of_it, text_column: meaning}},"
        " hf: {build_info: {storage: rows, streaming: True}}}"
    )
    config = write("train.yaml", text)
    wanted = ("--cfg-path", config, "--anno", tmp_path / "rows.csv", "--out", tmp_path / "out")
    assert run_script("--dataset", "table", *wanted) == 0
    assert [example.text for example in unpack(tmp_path / "out")] == [{"caption": "a dog"}]
    assert run_script("--dataset", "hf", "--cfg-path", config, "--out", tmp_path / "hf") != 0
    assert "a stream cannot be packed" in capsys.readouterr().err


def test_the_script_packs_a_section_of_a_configuration(
    corpus: Path, write: WriteText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "datasets: {{cc_sbu_align: {{data_type: images, valid_build_info: {{storage: {}}}}}}}"
    config = write("train.yaml", text.format(corpus / "validation/cc_sbu_align"))
    wanted = ("--cfg-path", config, "--split", "validation", "--out", tmp_path / "out")
    assert run_script("--dataset", "cc_sbu_align", *wanted) == 0
    assert len(unpack(tmp_path / "out")) == 3
    assert run_script("--dataset", "laion", *wanted) == 1
    assert "no dataset 'laion' (it has cc_sbu_align)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [(("--dataset", "webvids"), "did you mean 'webvid'"), (("--dataset", "webvid"), "videos_dir must be set")],
)
def test_the_script_says_in_one_line_what_is_wrong(
    arguments: Sequence[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert cause in error
    assert "Traceback" not in error
    with pytest.raises(SystemExit):
        run_script(*arguments, "--out", tmp_path / "out", "--max-size", "large")
    assert not (tmp_path / "out").exists()


def test_a_file_that_vanishes_while_it_is_packed_leaves_no_shard(pictures: list[Example], tmp_path: Path) -> None:
    def vanish(num_examples: int) -> None:
        (tmp_path / "media/5.JPG").unlink(missing_ok=True)

    with pytest.raises(MediaError, match="no such file"):
        pack_examples(pictures, tmp_path / "shards", max_count=4, advance=vanish)
    assert sorted(files(tmp_path / "shards")) == ["00000.tar", "packing.json"]
