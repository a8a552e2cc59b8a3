"""The corpus on disk: the same from the same seed, in the layouts that training reads, as its ground truth says."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from examples.tiny_world.world import layouts
from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from examples.tiny_world.world.drawing import draw_clip
from examples.tiny_world.world.samples import SPLITS, STREAMS, random_sample
from examples.tiny_world.world.vocabulary import HELD_OUT_COLOURS, HELD_OUT_MOTIONS
from tests.tiny_world.conftest import SETTINGS, of_kind, read_lines
from video_llama.errors import NoAudioTrackError
from video_llama.media.kind import media_kind
from video_llama.media.video import decode_video
from video_llama.processor.resample import decode_audio

pytestmark = pytest.mark.slow

Truths = dict[str, list[dict[str, Any]]]


def digests(folder: Path) -> dict[str, str]:
    """What each file below a folder holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def by_id(truths: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {truth["id"]: truth for truth in of_kind(truths, kind)}


def test_the_same_arguments_give_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    settings = WorldSettings(num_clips=6, seed=11, image_size=32, splits=(1, 1, 1))
    make_corpus(tmp_path / "one", settings)
    make_corpus(tmp_path / "two", settings, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_sample_depends_on_seed_split_and_number_only(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "small", WorldSettings(num_clips=2, seed=SETTINGS.seed, image_size=64, splits=(0, 0, 1)))
    large, small = digests(corpus / "test"), digests(tmp_path / "small/test")
    media = [file for file in small if Path(file).suffix in (".mp4", ".jpg", ".m4a", ".wav")]
    assert len(media) == 2 + 2 + 1
    assert all(small[file] == large[file] for file in media)


def test_other_seeds_splits_and_streams_give_other_samples() -> None:
    args = [(seed, split, stream) for seed in (0, 1) for split in SPLITS for stream in STREAMS if stream != "sound"]
    scenes = {random_sample(seed, split, stream, 0).scene for seed, split, stream in args}
    assert len(scenes) == len(args)


def test_every_split_has_its_size_and_ids_of_its_own(corpus: Path, truths: Truths) -> None:
    sizes = {split: len(of_kind(truths[split], "clip")) for split in SPLITS}
    assert sizes == {"train": 40, "validation": 10, "test": 10}
    assert json.loads((corpus / "corpus.json").read_text())["clips"] == sizes
    ids = [truth["id"] for split in SPLITS for truth in of_kind(truths[split], "clip")]
    assert len(set(ids)) == 60
    assert {truth["kind"]: 0 for truth in truths["test"]}.keys() == {"clip", "image", "sound", "image in shard"}


def test_training_holds_no_held_out_combination_and_the_other_splits_name_theirs(truths: Truths) -> None:
    visible = {split: [truth for truth in truths[split] if "shape" in truth] for split in SPLITS}
    for split in SPLITS:
        for truth in visible[split]:
            shapes, colours = ({truth[name], truth.get(f"later_{name}", truth[name])} for name in ("shape", "colour"))
            coloured = {(shape, colour) for shape in shapes for colour in colours} & HELD_OUT_COLOURS
            moving = {(shape, truth.get("motion")) for shape in shapes} & HELD_OUT_MOTIONS
            assert truth["combination"] == ("unseen" if coloured | moving else "seen")
    assert {truth["combination"] for truth in visible["train"]} == {"seen"}
    assert {truth["combination"] for truth in visible["test"]} == {"seen", "unseen"}


def test_clips_have_the_frames_and_the_sound_track_that_the_truth_says(corpus: Path, truths: Truths) -> None:
    for number, truth in enumerate(of_kind(truths["train"], "clip")):
        path = corpus / "train" / truth["file"]
        sample = random_sample(SETTINGS.seed, "train", "clip", number)
        video = decode_video(path, sample.num_frames, 64, 64)
        assert (video.num_source_frames, video.fps) == (sample.num_frames, sample.fps)
        assert video.num_source_frames / video.fps == pytest.approx(truth["seconds"], abs=0.001)
        assert 2 <= truth["seconds"] <= 4
        assert sample.scene is not None
        drawn = draw_clip(sample.scene, sample.num_frames, 64)
        assert np.abs(video.frames.astype(int) - drawn).mean() < 6  # what compression changes
        if truth["has_sound_track"]:
            sound = decode_audio(path)
            assert sound.samples.shape[-1] / sound.sample_rate_hz == pytest.approx(truth["seconds"], abs=0.15)
        else:
            assert truth["sound"] is None
            with pytest.raises(NoAudioTrackError):
                decode_audio(path)
        assert path.stat().st_size < 40_000


def test_some_clips_have_no_sound_track_but_most_have(truths: Truths) -> None:
    tracks = [random_sample(0, "train", "clip", index).sound is not None for index in range(400)]
    assert 0.82 < np.mean(tracks) < 0.92


def test_every_file_of_the_ground_truth_is_there_and_of_its_kind(corpus: Path, truths: Truths) -> None:
    kinds = {"clip": "video", "image": "image", "sound": "audio"}
    for truth in truths["validation"]:
        if truth["kind"] in kinds:
            assert media_kind(corpus / "validation" / truth["file"]) == kinds[truth["kind"]]
    files = [truth["file"] for truth in truths["validation"]]
    assert {Path(file).suffix for file in files} == {".mp4", ".jpg", ".wav", ".m4a"}


def test_each_question_of_the_ground_truth_asks_for_one_attribute_and_knows_its_value(truths: Truths) -> None:
    for truth in truths["train"]:
        for question in truth["questions"]:
            known = truth.get(question["attribute"], question["value"])
            assert question["value"] == ("no sound track" if known is None else known)
        firsts = [question["attribute"] for question in truth["questions"] if question["turn"] == 1]
        assert set(firsts) >= {q["attribute"] for q in truth["questions"]}
        dialogues = [(question["dialogue"], question["turn"]) for question in truth["questions"]]
        assert dialogues == sorted(set(dialogues))
        assert max(turn for _, turn in dialogues) <= 2
    seconds = {q["attribute"] for truth in truths["train"] for q in truth["questions"] if q["turn"] == 2}
    assert {"sound", "shape", "colour", "motion", "count"} <= seconds


def test_the_attribute_that_changes_is_asked_about_as_order_only(truths: Truths) -> None:
    changing = [truth for truth in of_kind(truths["train"], "clip") if truth["changes"]]
    assert changing
    for truth in changing:
        asked = {question["attribute"] for question in truth["questions"]}
        assert truth["changes"] not in asked
        assert "order" in asked
        assert truth[f"later_{truth['changes']}"] != truth[truth["changes"]]


def test_webvid_has_half_its_rows_in_a_csv_and_half_in_a_tsv(corpus: Path, truths: Truths) -> None:
    clips = by_id(truths["train"], "clip")
    tables = [read_table(path) for path in sorted((corpus / "train/webvid/annotations").iterdir())]
    assert [len(rows) for rows in tables] == [20, 20]
    for row in (row for rows in tables for row in rows):
        assert list(row) == ["videoid", "contentUrl", "duration", "page_dir", "name"]
        truth = clips.pop(row["videoid"])
        assert truth["file"] == f"webvid/videos/{row['page_dir']}/{row['videoid']}.mp4"
        assert row["name"] == truth["caption"]
        assert row["duration"] == f"PT00H00M{round(truth['seconds']):02d}S"
    assert not clips


@pytest.mark.parametrize("file", ["webvid_instruct/instruct.json", "webvid_instruct_zh/instruct.json"])
def test_the_instructions_talk_about_what_can_be_seen_in_several_turns(corpus: Path, file: str) -> None:
    entries = json.loads((corpus / "train" / file).read_text(encoding="utf-8"))
    assert len(entries) == 40
    for entry in entries:
        assert (corpus / "train/webvid/videos" / entry["video"]).is_file()
        assert len(entry["QA"]) >= 2
        assert all(set(turn) == {"q", "a"} for turn in entry["QA"])
        talk = " ".join(turn["q"] + turn["a"] for turn in entry["QA"])
        assert "hear" not in talk
        assert "sound" not in talk


def test_the_instructions_on_sound_are_of_the_clips_that_have_some(corpus: Path, truths: Truths) -> None:
    entries = json.loads((corpus / "train/webvid_instruct/instruct_sound.json").read_text(encoding="utf-8"))
    sounds = {
        t["file"].removeprefix("webvid/videos/"): t["sound"] for t in of_kind(truths["train"], "clip") if t["sound"]
    }
    assert [entry["video"] for entry in entries] == list(sounds)
    for entry in entries:
        answers = " ".join(turn["a"] for turn in entry["QA"])
        assert sounds[entry["video"]] in answers.lower() or "pitch" in answers


def test_aligned_pictures_have_their_captions(corpus: Path, truths: Truths) -> None:
    content = json.loads((corpus / "test/cc_sbu_align/filter_cap.json").read_text(encoding="utf-8"))
    captions = {entry["image_id"]: entry["caption"] for entry in content["annotations"]}
    assert captions == {truth["id"]: truth["caption"] for truth in of_kind(truths["test"], "image")}
    for image_id in captions:
        with Image.open(corpus / f"test/cc_sbu_align/image/{image_id}.jpg") as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 64))


def test_llava_conversations_hold_the_picture_once_and_take_turns(corpus: Path) -> None:
    entries = json.loads((corpus / "test/llava_instruct/llava_instruct_150k.json").read_text(encoding="utf-8"))
    assert len(entries) == 10
    for entry in entries:
        assert (corpus / "test/cc_sbu_align/image" / entry["image"]).is_file()
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
    starts = {entry["conversations"][0]["value"].startswith("<image>\n") for entry in entries}
    assert starts == {True, False}


@pytest.mark.parametrize("name", ["cc_sbu", "laion"])
def test_shards_are_read_by_webdataset(corpus: Path, truths: Truths, name: str) -> None:
    path = corpus / f"train/{name}/00000.tar"
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json")
    read = {f"{name}/00000.tar#{key}.jpg": (picture.size, text["caption"]) for key, picture, text in dataset}
    shown = [truth for truth in of_kind(truths["train"], "image in shard") if truth["file"].startswith(name)]
    assert read == {truth["file"]: ((64, 64), truth["caption"]) for truth in shown}
    assert len(read) == 10


def test_many_pictures_fill_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.tiny_world.world import corpus as corpus_module

    monkeypatch.setattr(corpus_module, "SHARD_SIZE", 2)
    make_corpus(tmp_path / "corpus", WorldSettings(num_clips=12, seed=0, image_size=32, splits=(1, 0, 0)))
    shards = sorted((tmp_path / "corpus/train/laion").iterdir())
    assert [path.name for path in shards] == ["00000.tar", "00001.tar"]
    truths = read_lines(tmp_path / "corpus/train/ground_truth.jsonl")
    assert [t["file"][:15] for t in truths if t["file"].startswith("laion")] == ["laion/00000.tar"] * 2 + [
        "laion/00001.tar"
    ]


def test_sounds_have_captions(corpus: Path, truths: Truths) -> None:
    rows = read_table(corpus / "train/audio_caption/captions.csv")
    truth = {Path(truth["file"]).name: truth for truth in of_kind(truths["train"], "sound")}
    assert {row["audio"]: row["caption"] for row in rows} == {name: one["caption"] for name, one in truth.items()}
    assert all(one["sound"] in one["caption"] for one in truth.values())


def test_messages_name_their_media_and_give_a_sound_only_where_there_is_one(corpus: Path, truths: Truths) -> None:
    path = corpus / "train/messages/messages.jsonl"
    entries = {entry["id"]: entry["messages"] for entry in read_lines(path)}
    assert len(entries) == 40 + 40 + 20
    expected = {"image": ["image"], "sound": ["audio"]}
    for truth in (truth for truth in truths["train"] if truth["kind"] != "image in shard"):
        messages = entries[f"{truth['kind']}/{truth['id']}"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        first, *others = [message["content"] for message in messages]
        kinds = expected.get(truth["kind"], ["video", "audio"] if truth.get("has_sound_track") else ["video"])
        assert [item["type"] for item in first] == [*kinds, "text"]
        assert all([item["type"] for item in content] == ["text"] for content in others)
        for item in first[:-1]:
            assert (path.parent / item["path"]).resolve() == (corpus / "train" / truth["file"]).resolve()
        if truth["kind"] == "clip":
            answers = " ".join(message["content"][0]["text"] for message in messages[1::2])
            assert (truth["sound"] or "no sound track") in answers


def test_the_page_of_a_clip_counts_within_its_split() -> None:
    pages = [layouts.media_file(random_sample(0, "test", "clip", index)) for index in (0, 99, 100)]
    assert [page.split("/")[2] for page in pages] == ["000000_000099", "000000_000099", "000100_000199"]
