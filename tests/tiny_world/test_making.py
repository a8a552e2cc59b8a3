"""The command and its arguments; and that the package's own readers take what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from scripts.make_clipworld import main
from video_llama.config import BuildInfo, DatasetConfig
from video_llama.data.datasets import build_examples
from video_llama.errors import ConfigError, DatasetError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "clips must be at least 1, not 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"image_size": 63}, "image size must be an even number from 32 to 1024, not 63"),
        ({"image_size": 16}, "image size"),
        ({"splits": (1, -1, 1)}, "splits must be weights"),
        ({"splits": (0, 0, 0)}, "splits must be weights"),
        ({"splits": (float("nan"), 1, 1)}, "splits must be weights"),
        ({"num_clips": 2}, "2 clips do not fill 3 splits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldSettings(**{"num_clips": 10, "seed": 0, **arguments})  # type: ignore[arg-type]


def test_fewer_than_one_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, not 0"):
        make_corpus(tmp_path / "corpus", WorldSettings(3, 0), workers=0)


@pytest.mark.parametrize(
    ("num_clips", "splits", "sizes"),
    [
        (2000, (90, 5, 5), {"train": 1800, "validation": 100, "test": 100}),
        (3, (90, 5, 5), {"train": 1, "validation": 1, "test": 1}),
        (500, (0, 0, 1), {"test": 500}),
        (10, (1, 1, 1), {"train": 4, "validation": 3, "test": 3}),
    ],
)
def test_the_clips_are_shared_out_by_weight_and_no_split_stays_empty(
    num_clips: int, splits: tuple[float, float, float], sizes: dict[str, int]
) -> None:
    assert WorldSettings(num_clips, 0, splits=splits).split_sizes == sizes


def test_the_command_writes_a_corpus_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "corpus"
    assert (
        main(["--out", str(out), "--clips", "3", "--seed", "5", "--image-size", "32", "--splits", "2", "0", "1"]) == 0
    )
    assert "train 2, test 1 clips" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["corpus.json", "test", "train"]


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    assert main(["--out", str(out), "--clips", "3", "--seed", "5"]) == 1
    assert f"{out}: exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        out.name if content == "file" else "mine.txt"
    ]
    with pytest.raises(DatasetError):
        make_corpus(out, WorldSettings(3, 0))


def test_an_empty_folder_is_filled_and_progress_is_counted(tmp_path: Path) -> None:
    done: list[int] = []
    make_corpus(tmp_path, WorldSettings(4, 0, image_size=32), advance=done.append)
    assert sum(done) == 4
    assert (tmp_path / "corpus.json").is_file()


@pytest.mark.parametrize(
    ("name", "data_type", "places", "number"),
    [
        ("webvid", "video", {"anno_dir": "webvid/annotations", "videos_dir": "webvid/videos"}, 40),
        ("webvid_instruct", "video", {"anno_dir": "webvid_instruct/instruct.json", "videos_dir": "webvid/videos"}, 40),
        (
            "webvid_instruct_zh",
            "video",
            {"anno_dir": "webvid_instruct_zh/instruct.json", "videos_dir": "webvid/videos"},
            40,
        ),
        (
            "webvid_instruct:sound",
            "audio",
            {"anno_dir": "webvid_instruct/instruct_sound.json", "videos_dir": "webvid/videos"},
            33,
        ),
        ("cc_sbu_align", "images", {"storage": "cc_sbu_align"}, 40),
        ("cc_sbu", "images", {"storage": "cc_sbu"}, 10),
        ("laion", "images", {"storage": "laion"}, 10),
        (
            "llava_instruct",
            "images",
            {"anno_dir": "llava_instruct/llava_instruct_150k.json", "videos_dir": "cc_sbu_align/image"},
            40,
        ),
        ("audio_caption", "audio", {"anno_dir": "audio_caption", "videos_dir": "audio_caption/audio"}, 20),
        ("messages", "video", {"anno_dir": "messages"}, 100),
    ],
)
def test_the_training_data_readers_take_every_layout(
    corpus: Path, name: str, data_type: str, places: dict[str, str], number: int
) -> None:
    info = BuildInfo(**{key: str(corpus / "train" / value) for key, value in places.items()})
    examples = build_examples(name, DatasetConfig(data_type=data_type, build_info=info))
    assert len(examples) == number
    assert all(Path(example.source.path).is_file() for example in examples if example.source)
