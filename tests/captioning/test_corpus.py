"""A corpus: what the inputs name, what is written and when, and how a run goes on after a kill."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import load_checkpoint
from video_llama.captioning import (
    CaptionFile,
    Clip,
    CorpusSettings,
    ShardMember,
    caption_corpus,
    file_of_shard,
    find_clips,
    take_shard,
)
from video_llama.errors import ConfigError, DatasetError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions

SETTINGS = CorpusSettings(options=GenerationOptions(max_new_tokens=6), num_workers=0, batch_size=2)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture
def videos(make_video: Callable[..., Path], tmp_path: Path) -> list[Path]:
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    names = ["clips/b.mp4", "clips/a.mp4", "clips/deep/c.MKV"]
    return [make_video(name, num_frames=4 + 3 * number) for number, name in enumerate(names)]


def make_shard(path: Path, members: dict[str, Path | bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            scratch = path.with_name("member")
            scratch.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            tar.add(scratch, name)
    return path


def ids(clips: list[Clip]) -> list[str]:
    return [clip.id for clip in clips]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clips_of(paths: list[Path]) -> list[Clip]:
    return [Clip(str(path), str(path)) for path in paths]


# What the inputs name


def test_a_folder_means_its_videos_at_any_depth_in_order(videos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "clips" / "notes.txt").write_text("no video")
    clips = find_clips([str(tmp_path / "clips")])
    assert ids(clips) == [str(videos[1]), str(videos[0]), str(videos[2])]
    assert [clip.source for clip in clips] == ids(clips)


def test_a_pattern_means_what_it_matches_and_each_clip_is_taken_once(videos: list[Path], tmp_path: Path) -> None:
    pattern = f"{tmp_path}/clips/**/*.[mM][pPkK]*"
    assert sorted(ids(find_clips([pattern]))) == sorted(map(str, videos))
    assert ids(find_clips([str(videos[0]), pattern, str(videos[0])]))[0] == str(videos[0])
    assert len(find_clips([str(videos[0]), pattern])) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "clips/b.mp4\n\n  clips/deep/c.MKV \nabsent.mp4\n"),
        ("list.csv", "clips/b.mp4\nclips/deep/c.MKV\nabsent.mp4\n"),
        ("table.csv", '\ufeffid,Video,caption\n1,clips/b.mp4,"x, y"\n2,clips/deep/c.MKV,\n3,absent.mp4,z\n'),
    ],
)
def test_a_list_names_files_beside_it(videos: list[Path], tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert ids(find_clips([str(tmp_path / name)])) == [str(videos[0]), str(videos[2]), "absent.mp4"]


def test_shards_mean_the_videos_in_them(videos: list[Path], tmp_path: Path, model: VideoLlama) -> None:
    first = make_shard(tmp_path / "s0.tar", {"x/1.mp4": videos[0], "x/1.json": b"{}", "x/1.wav": b"RIFF"})
    make_shard(tmp_path / "s1.tar", {"1.jpg": b"picture", "1.txt": b"words"})
    clips = find_clips([f"{tmp_path}/s{{0..1}}.tar"])
    assert ids(clips) == [f"{first}#x/1.mp4", f"{tmp_path}/s1.tar#1.jpg"]
    member = clips[0].source
    assert isinstance(member, ShardMember)
    with member.open() as path:
        assert Path(path).read_bytes() == videos[0].read_bytes()
    assert not Path(path).exists()
    assert model.caption([member], max_new_tokens=4) == model.caption([videos[0]], max_new_tokens=4)


def test_files_of_cameras_discs_and_animations_are_videos_too(videos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    names = ["a.m2ts", "b.MTS", "c.vob", "d.gif", "e.h264", "f.264", "g.hevc", "h.H265", "i.m2v", "j.3g2", "k.mxf"]
    for name in [*names, "cover.jpg", "notes.txt"]:
        (folder / name).write_bytes(b"x")
    assert [Path(clip.id).name for clip in find_clips([str(folder)])] == names
    shard = make_shard(tmp_path / "s.tar", {"1.mts": videos[0], "2.gif": b"GIF89a", "3.vob": b"x", "4.jpg": b"x"})
    assert ids(find_clips([str(shard)])) == [f"{shard}#{name}" for name in ("1.mts", "2.gif", "3.vob")]


def test_a_gif_among_images_of_a_shard_is_one_of_them(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"1.jpg": b"x", "2.gif": b"GIF89a", "3.png": b"x"})
    assert ids(find_clips([str(shard)])) == [f"{shard}#{name}" for name in ("1.jpg", "2.gif", "3.png")]


def test_a_cut_off_shard_gives_what_is_whole_and_one_error(videos: list[Path], tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"1.mp4": videos[0], "2.mp4": videos[1]})
    shard.write_bytes(shard.read_bytes()[: 512 + videos[0].stat().st_size // 512 * 512 + 512 + 100])
    *whole, broken = find_clips([str(shard)])
    assert ids(whole) == [f"{shard}#1.mp4"]
    assert (broken.id, broken.source) == (str(shard), None)
    assert broken.problem.startswith("not a whole tar file")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("empty", "no videos"),
        ("*.mp4", "no file matches"),
        ("columns.csv", "no column is called"),
        ("header.csv", r"no column is called path, video"),
        ("blank.txt", "no paths in this list"),
        ("only_header.csv", "no paths in this list"),
        ("latin.txt", "UTF-8"),
        ("absent.mp4", "absent.mp4: no such file or folder"),
        ("absent/", "absent: no such file or folder"),
    ],
)
def test_inputs_that_name_nothing_are_errors(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("name,url\na,b\n")
    (tmp_path / "header.csv").write_text("clips\na.mp4\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "only_header.csv").write_text("path,label\n")
    (tmp_path / "latin.txt").write_bytes("é.mp4".encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        find_clips([str(tmp_path / given)])


def test_absent_shards_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent"):
        find_clips([f"{tmp_path}/s{{0..1}}.tar"])


@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_shards_are_a_partition(num_shards: int) -> None:
    parts = [take_shard(list(range(5)), num_shards, number) for number in range(num_shards)]
    assert sorted(item for part in parts for item in part) == list(range(5))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ConfigError, match="numbered from 0"):
        take_shard([1], num_shards, num_shards)


# What is written


def test_every_clip_gets_one_line_with_its_caption_or_its_error(
    model: VideoLlama, videos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 200)
    clips = [*clips_of([*videos, tmp_path / "bad.mp4"]), Clip("s.tar", None, "not a whole tar file")]
    seen: list[int] = []
    file = CaptionFile(tmp_path / "out.jsonl")
    assert caption_corpus(model, clips, file, SETTINGS, seen.append) == 2
    by_id = {record["id"]: record for record in records(tmp_path / "out.jsonl")}
    assert sorted(by_id) == sorted(ids(clips))
    expected = model.caption(videos, max_new_tokens=6)
    assert [by_id[str(path)]["caption"] for path in videos] == expected
    assert by_id[str(videos[0])].keys() == {"id", "caption", "sound"}
    assert by_id["s.tar"] == {"id": "s.tar", "error": "not a whole tar file"}
    assert "bad.mp4" not in by_id[str(tmp_path / "bad.mp4")]["error"]
    assert seen == [0] * 5


def test_windows_are_lines_with_their_times(model: VideoLlama, make_video: Callable[..., Path], tmp_path: Path) -> None:
    path = make_video("long.mp4", num_frames=50, fps=5, audio=True)
    new: list[int] = []
    settings = CorpusSettings(options=SETTINGS.options, num_workers=0, window_seconds=4.0)
    file = CaptionFile(tmp_path / "out.jsonl")
    caption_corpus(model, clips_of([path]), file, settings, new.append)
    lines = sorted(records(tmp_path / "out.jsonl"), key=lambda record: record["segment"])
    assert [(line["segment"], line["num_segments"]) for line in lines] == [(0, 3), (1, 3), (2, 3)]
    assert [(line["start_seconds"], line["end_seconds"]) for line in lines] == [(0.0, 4.0), (4.0, 8.0), (8.0, 10.0)]
    assert all(line["caption"] and line["sound"] == "heard" for line in lines)
    assert new == [2, 0, 0]


def test_a_line_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    file = CaptionFile(tmp_path / "out.jsonl")
    file.write({"id": "a", "caption": "Bär \ud800"})
    assert records(tmp_path / "out.jsonl") == [{"id": "a", "caption": "Bär ?"}]


def test_parts_have_files_of_their_own() -> None:
    assert file_of_shard(Path("x/c.jsonl"), 1, 0) == Path("x/c.jsonl")
    assert file_of_shard(Path("x/c.jsonl"), 4, 1) == Path("x/c-00001-of-00004.jsonl")


# Going on


def test_a_run_goes_on_where_it_stopped(model: VideoLlama, videos: list[Path], tmp_path: Path) -> None:
    clips, out = clips_of(videos), tmp_path / "out.jsonl"
    file = CaptionFile(out)
    caption_corpus(model, clips, file, SETTINGS)
    lines = out.read_bytes().splitlines(keepends=True)
    # A line that lacks nothing but its line break is a whole record.
    cuts = [
        (1, b"", 1),
        (1, lines[1][:-1], 2),
        (1, lines[1][:-2], 1),
        (2, b'{"id', 2),
        (0, b'{"id": "x', 0),
        (3, b"", 3),
    ]
    for kept, cut, num_complete in cuts:
        out.write_bytes(b"".join(lines[:kept]) + cut)
        file = CaptionFile(out, resume=True)
        assert [file.is_complete(clip.id) for clip in clips].count(True) == num_complete
        assert caption_corpus(model, clips, file, SETTINGS) == 0
        assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)
        assert out.read_bytes().startswith(b"".join(lines[:kept]))


def test_only_the_missing_windows_of_a_video_are_captioned(
    model: VideoLlama, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    clips, out = clips_of([make_video("long.mp4", num_frames=50, fps=5)]), tmp_path / "out.jsonl"
    settings = CorpusSettings(options=SETTINGS.options, num_workers=0, window_seconds=2.0)
    file = CaptionFile(out)
    caption_corpus(model, clips, file, settings)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[3] + lines[1] + lines[2][:9])
    new: list[int] = []
    file = CaptionFile(out, resume=True)
    assert not file.is_complete(clips[0].id)
    assert file.has(clips[0].id, 3)
    caption_corpus(model, clips, file, settings, new.append)
    assert file.is_complete(clips[0].id)
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert new == [2, 0, 0]


def test_what_other_numbers_of_processes_wrote_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = CaptionFile(out)
    file.write({"id": "a", "caption": "x"})
    file = CaptionFile(out, 2, 1, resume=True)
    file.write({"id": "b", "error": "x"})
    other = file_of_shard(out, 3, 0)
    other.write_bytes(b'{"id": "c", "caption": ""}\n{"id": "d"')  # another process is writing
    file = CaptionFile(out, 3, 2, resume=True)
    assert [file.is_complete(name) for name in "abcd"] == [True, True, True, False]
    assert [file.has_failed(name) for name in "abc"] == [False, True, False]
    assert other.read_bytes().endswith(b'{"id": "d"')


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_line_that_a_process_of_another_number_has_cut_is_dropped(tmp_path: Path, num_shards: int) -> None:
    out = tmp_path / "out.jsonl"
    other = file_of_shard(out, 2, 0)
    other.write_bytes(b'{"id": "c", "caption": ""}\n{"id": "d"')
    file = CaptionFile(out, num_shards, 0, resume=True)
    assert not file.is_complete("d")
    assert other.read_bytes() == b'{"id": "c", "caption": ""}\n'


def test_a_name_that_is_not_utf8_is_done_once(tmp_path: Path) -> None:
    out, name = tmp_path / "out.jsonl", os.fsdecode(b"caf\xe9.mp4")
    file = CaptionFile(out)
    file.write({"id": name, "caption": "x"})
    file = CaptionFile(out, resume=True)
    assert file.is_complete(name)
    assert out.read_bytes() == b'{"id": "caf\\udce9.mp4", "caption": "x"}\n'


def test_an_output_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output, message in ((tmp_path / "file" / "x.jsonl", "cannot be written"), (tmp_path, "a folder; name the")):
        with pytest.raises(ConfigError, match=message):
            CaptionFile(output)


def test_a_disk_that_fills_up_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, record: object) -> None:
        raise OSError(28, "No space left on device")

    file = CaptionFile(tmp_path / "out.jsonl")
    monkeypatch.setattr("video_llama.captioning.records.append_jsonl", fail)
    with pytest.raises(ConfigError, match=r"No space left on device.*continue with --resume"):
        file.write({"id": "a", "caption": "x"})
    assert not file.is_complete("a")


def test_a_file_named_in_several_ways_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    found = find_clips(["clips", "./clips/a.mp4", str(tmp_path / "clips/a.mp4"), "clips/../clips/*.mp4"])
    assert [clip.id for clip in found] == ["clips/a.mp4"]


def test_a_pattern_leaves_out_what_only_lies_beside_the_clips(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt", "meta.csv", "more/b.mp4", "empty/readme.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("a man walks on a beach\n")
    found = find_clips([str(tmp_path / "*")])
    assert [clip.id for clip in found] == [str(tmp_path / "a.mp4"), str(tmp_path / "more/b.mp4")]
    lists = find_clips([str(tmp_path / "*.txt")])
    assert [clip.id for clip in lists] == ["a man walks on a beach"]


def test_what_folders_and_patterns_leave_out_is_reported(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt", "b.JPG", "more/c.wav", "more/d.mkv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("a man walks on a beach\n")
    left_out: list[Path] = []
    assert len(find_clips([str(tmp_path)], left_out.append)) == 2
    assert [path.name for path in left_out] == ["a.txt", "b.JPG", "c.wav"]
    left_out.clear()
    found = find_clips([str(tmp_path / "*"), str(tmp_path / "a.mp4")], left_out.append)
    # A pattern names images itself; what it leaves out are lists, and what its folders leave out.
    assert [Path(clip.id).name for clip in found] == ["a.mp4", "b.JPG", "d.mkv"]
    assert [path.name for path in left_out] == ["a.txt", "c.wav"]


def test_an_empty_cell_of_a_table_is_no_clip(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\n,y\n")
    assert [clip.id for clip in find_clips([str(tmp_path / "list.csv")])] == ["a.mp4"]


def test_errors_count_in_a_continued_run(model: VideoLlama, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 200)
    clips, out = clips_of([tmp_path / "bad.mp4"]), tmp_path / "out.jsonl"
    for resume in (False, True):
        file = CaptionFile(out, resume=resume)
        assert caption_corpus(model, clips, file, SETTINGS) == 1
    assert len(records(out)) == 1


def test_captions_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ConfigError, match="already exists; use --resume to continue it"):
        CaptionFile(tmp_path / "out.jsonl")


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"caption": "x"}', '{"id": 3}'])
def test_a_file_of_something_else_is_not_continued(tmp_path: Path, line: str) -> None:
    (tmp_path / "out.jsonl").write_text(f'{{"id": "a"}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2: not a caption"):
        CaptionFile(tmp_path / "out.jsonl", resume=True)


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    begun = CorpusSettings(prompt="What?")
    CaptionFile(out, settings=begun.of_captions())
    CaptionFile(out, settings=begun.of_captions(), resume=True)
    batched = CorpusSettings(prompt="What?", batch_size=99, num_workers=5)
    CaptionFile(out, settings=batched.of_captions(), resume=True)
    for other in (CorpusSettings(prompt="Why?"), CorpusSettings(prompt="What?", window_seconds=3.0)):
        with pytest.raises(ConfigError, match=r"was begun with (prompt 'What|window_seconds None)"):
            CaptionFile(out, settings=other.of_captions(), resume=True)
