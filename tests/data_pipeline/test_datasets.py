"""Every layout of a dataset on disk, and what is wrong with broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import NUM_CLIPS, WriteText
from video_llama.config import BuildInfo, DatasetConfig
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, open_media
from video_llama.errors import ConfigError, DatasetError

FIRST = "10000000"  # the id of the corpus's first clip, picture and sound

BuildInfoOf = Callable[[Path], BuildInfo]
LAYOUTS: dict[str, tuple[str, BuildInfoOf]] = {
    "webvid": ("video", lambda split: info(split / "webvid/annotations", split / "webvid/videos")),
    "webvid_instruct": ("video", lambda split: info(split / "webvid_instruct/instruct.json", split / "webvid/videos")),
    "webvid_instruct_zh": (
        "video",
        lambda split: info(split / "webvid_instruct_zh/instruct.json", split / "webvid/videos"),
    ),
    "llava_instruct": (
        "images",
        lambda split: info(split / "llava_instruct/llava_instruct_150k.json", split / "cc_sbu_align/image"),
    ),
    "audio_caption": ("audio", lambda split: info(split / "audio_caption", split / "audio_caption/audio")),
    "cc_sbu_align": ("images", lambda split: BuildInfo(storage=str(split / "cc_sbu_align"))),
    "cc_sbu": ("images", lambda split: BuildInfo(storage=str(split / "cc_sbu"))),
    "laion": ("images", lambda split: BuildInfo(storage=str(split / "laion" / "{00000..00000}.tar"))),
    "shards": ("images", lambda split: BuildInfo(storage=str(split / "laion"))),
    "messages": ("video", lambda split: info(split / "messages")),
    "messages:mine": ("video", lambda split: info(split / "messages/messages.jsonl")),
}
KINDS = {"video": "video", "images": "image", "audio": "audio"}


def info(annotations: Path, media: Path | None = None) -> BuildInfo:
    return BuildInfo(anno_dir=str(annotations), videos_dir=None if media is None else str(media))


def build(name: str, where: BuildInfo, data_type: str = "video") -> list[Example]:
    return list(build_examples(name, DatasetConfig(data_type=data_type, build_info=where)))


def layout(name: str, corpus: Path) -> list[Example]:
    data_type, where = LAYOUTS[name]
    return build(name, where(corpus / "train"), data_type)


def test_an_error_about_a_file_names_the_dataset_that_asked_for_it(tmp_path: Path) -> None:
    where = BuildInfo(anno_dir=str(tmp_path / "nowhere"), videos_dir=str(tmp_path))
    with pytest.raises(DatasetError, match=r"^datasets\.webvid:cooking: .*nowhere: no such file or folder"):
        build("webvid:cooking", where)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_names_examples_whose_files_are_there(name: str, corpus: Path) -> None:
    examples = layout(name, corpus)
    assert len({example.id for example in examples}) == len(examples) > 0
    for example in examples:
        assert example.id.startswith(f"{name}/")
        assert example.kind == KINDS[LAYOUTS[name][0]]
        if example.source is not None:
            with open_media(example.source) as path:
                assert Path(path).stat().st_size > 100


@pytest.mark.parametrize("name", ["webvid", "webvid_instruct", "llava_instruct", "cc_sbu_align"])
def test_no_annotation_is_left_out(name: str, corpus: Path) -> None:
    assert len(layout(name, corpus)) == NUM_CLIPS


def test_webvid_reads_csv_and_tsv_files_with_a_folder_for_each_page(corpus: Path) -> None:
    examples = {example.id: example for example in layout("webvid", corpus)}
    first, second = examples[f"webvid/{FIRST}"], examples["webvid/10000001"]  # one from each file
    assert first.source is not None
    assert first.source.path == str(corpus / f"train/webvid/videos/000000_000099/{FIRST}.mp4")
    assert first.text["caption"] == truth(corpus, "clip", FIRST)["caption"]
    assert second.text["caption"] == truth(corpus, "clip", "10000001")["caption"]


def test_captions_of_pictures_and_sounds_belong_to_their_files(corpus: Path) -> None:
    picture = next(example for example in layout("cc_sbu_align", corpus) if example.id.endswith(FIRST))
    sound = next(example for example in layout("audio_caption", corpus) if example.id.endswith(f"{FIRST}.wav"))
    assert picture.source is not None
    assert picture.source.path.endswith(f"cc_sbu_align/image/{FIRST}.jpg")
    assert picture.text["caption"] == truth(corpus, "image", FIRST)["caption"]
    assert sound.source is not None
    assert sound.source.path.endswith(f"audio/{FIRST}.wav")
    assert sound.text["caption"] == truth(corpus, "sound", FIRST)["caption"]


def test_instructions_keep_all_their_turns(corpus: Path) -> None:
    written = json.loads((corpus / "train/webvid_instruct_zh/instruct.json").read_text(encoding="utf-8"))
    assert [example.text["QA"] for example in layout("webvid_instruct_zh", corpus)] == [
        entry["QA"] for entry in written
    ]
    llava = json.loads((corpus / "train/llava_instruct/llava_instruct_150k.json").read_text())
    read = [example.text["conversations"] for example in layout("llava_instruct", corpus)]
    assert read == [entry["conversations"] for entry in llava]


def test_one_video_may_have_several_instructions(write: WriteText, tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "QA": [{"q": "What?", "a": "A dog."}]}
    examples = build("webvid_instruct", info(write("instruct.json", [entry, entry]), tmp_path))
    assert len({example.id for example in examples}) == 2


def test_paths_of_messages_are_relative_to_the_file_or_to_the_folder_that_is_named(
    write: WriteText, tmp_path: Path
) -> None:
    item = {"type": "video", "path": "../a.mp4"}
    absolute = {"type": "image", "path": "/data/b.jpg"}
    message = {"role": "user", "content": [item, absolute, {"type": "text", "text": "../a.mp4"}]}
    path = write("notes/mine.jsonl", {"messages": [message]})
    [beside] = build("messages", info(path))
    [elsewhere] = build("messages", info(path, Path("/media/clips")))
    assert beside.id == "messages/mine:1"
    assert beside.source is None
    assert paths(beside) == [str(tmp_path / "notes/../a.mp4"), "/data/b.jpg", None]
    assert paths(elsewhere) == ["/media/clips/../a.mp4", "/data/b.jpg", None]
    assert elsewhere.text["messages"][0]["content"][2]["text"] == "../a.mp4"


def test_messages_have_the_ids_that_they_are_given(corpus: Path) -> None:
    assert layout("messages:mine", corpus)[0].id == f"messages:mine/clip/{FIRST}"


def test_an_unknown_dataset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build("webvids", BuildInfo())
    assert "unknown dataset 'webvids'; did you mean 'webvid'?" in str(caught.value)
    for name in LAYOUTS:
        assert name.partition(":")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"), [("webvid", "videos_dir"), ("llava_instruct", "videos_dir"), ("laion", "storage")]
)
def test_a_path_that_is_not_set_is_named(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"datasets\.{name}\.build_info\.{key} must be set"):
        build(name, BuildInfo())


@pytest.mark.parametrize(
    ("name", "file", "content", "cause"),
    [
        ("webvid", "a.csv", "videoid,name\n1,a dog\n", "no column page_dir"),
        ("webvid", "a.csv", "", "no column videoid, page_dir, name"),
        ("webvid", "a.tsv", "videoid\tpage_dir\tname\n", "no rows"),
        ("webvid", "a.csv", "videoid,page_dir,name\n,p,a dog\n", "line 2: no videoid"),
        ("audio_caption", "a.csv", "file,caption\na.wav,beeps\n", "no column audio"),
        ("webvid_instruct", "a.json", {"video": "a.mp4"}, "the file must be a list, but is dict"),
        ("webvid_instruct", "a.json", [{"QA": []}], "entry 0: 'video' is missing"),
        ("webvid_instruct", "a.json", [{"video": "a.mp4", "QA": []}], "entry 0: 'QA' must be a list"),
        ("webvid_instruct_zh", "a.json", "[", "not JSON"),
        ("webvid_instruct", "a.json", [], "no examples"),
        ("llava_instruct", "a.json", "{}", "must be a list"),
        ("llava_instruct", "a.json", ["x"], "entry 0: a str, not an object"),
        ("llava_instruct", "a.json", [{"image": "a.jpg"}], "'conversations' must be a list"),
        ("messages", "a.jsonl", "", "empty"),
        ("messages", "a.jsonl", {"messages": []}, "line 1: 'messages' must be a list"),
        ("messages", "a.jsonl", {"messages": ["hello"]}, "line 1: a message is a str"),
        ("messages", "a.jsonl", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "names 0 video"),
    ],
)
def test_annotations_of_another_form_are_dataset_errors_that_name_the_file(
    name: str, file: str, content: Any, cause: str, write: WriteText, tmp_path: Path
) -> None:
    path = write(file, content)
    with pytest.raises(DatasetError, match=cause) as caught:
        build(name, info(path, tmp_path))
    assert name in str(caught.value) if cause == "no examples" else str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([{"image_id": "1", "caption": "x"}], "'annotations' must be a list, but is NoneType"),
        ({"annotations": {"1": "x"}}, "'annotations' must be a list, but is dict"),
        ({"annotations": [{"image_id": "1"}]}, "annotation 0: 'caption' is missing"),
        ({"annotations": [{"caption": "x"}]}, "annotation 0: 'image_id' is missing"),
    ],
)
def test_an_aligned_set_of_another_form_is_a_dataset_error(
    content: Any, cause: str, write: WriteText, tmp_path: Path
) -> None:
    write("filter_cap.json", content)
    with pytest.raises(DatasetError, match=cause):
        build("cc_sbu_align", BuildInfo(storage=str(tmp_path)), "images")


def test_an_absent_folder_is_a_dataset_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file or folder"):
        build("webvid", info(tmp_path / "absent", tmp_path))
    with pytest.raises(DatasetError, match=r"filter_cap\.json: no such file"):
        build("cc_sbu_align", BuildInfo(storage=str(tmp_path)), "images")


def truth(corpus: Path, kind: str, id_: str) -> dict[str, Any]:
    lines = (corpus / "train/ground_truth.jsonl").read_text(encoding="utf-8").splitlines()
    return next(entry for entry in map(json.loads, lines) if (entry["kind"], entry["id"]) == (kind, id_))


def paths(example: Example) -> list[str | None]:
    return [item.get("path") for item in example.text["messages"][0]["content"]]
