"""Captions of datasets in the layouts of research: what is asked, what is compared, and what is said of bad files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama import load_pretrained_model
from video_llama.data.examples import MediaSource
from video_llama.errors import ConfigError, DatasetError, MediaError
from video_llama.evaluation.captions import CaptionedFile, CaptionResult, caption_files, caption_metrics, load_captions
from video_llama.inference.engine import VideoLlama


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips, six pictures, three sounds and two shards of pictures, with their annotations."""
    folder = tmp_path_factory.mktemp("captions") / "corpus"
    make_corpus(folder, WorldSettings(num_clips=6, seed=11, image_size=64, splits=(0, 0, 1)))
    return folder / "test"


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)


def said(answer: str | None, *references: str, error: str = "") -> CaptionResult:
    return CaptionResult(CaptionedFile("set/1", MediaSource("a.mp4"), "video", None, list(references)), answer, error)


def test_captions_of_every_layout_are_found(split: Path) -> None:
    places = {
        "webvid": ("webvid/annotations", "webvid/videos", "video", 6),
        "webvid_instruct": ("webvid_instruct/instruct.json", "webvid/videos", "video", 6),
        "webvid_instruct_zh": ("webvid_instruct_zh/instruct.json", "webvid/videos", "video", 6),
        "cc_sbu_align": ("cc_sbu_align", None, "image", 6),
        "cc_sbu": ("cc_sbu", None, "image", 2),
        "llava_instruct": ("llava_instruct/llava_instruct_150k.json", "cc_sbu_align/image", "image", 6),
        "audio_caption": ("audio_caption", "audio_caption/audio", "audio", 3),
    }
    for name, (data, media, modality, count) in places.items():
        files = load_captions(name, split / data, None if media is None else split / media)
        assert [file.modality for file in files] == [modality] * count, name
        assert all(len(file.references) == 1 and file.references[0] for file in files)
        has_questions = "instruct" in name
        assert all((file.question is not None) == has_questions for file in files)
        assert not any("<image>" in (file.question or "") for file in files)


def test_captions_of_one_file_are_gathered_and_the_limit_counts_files(tmp_path: Path) -> None:
    rows = ["audio,caption", "a.wav,a tone", "b.wav,noise", "a.wav,a beep", "c.wav,nothing"]
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    files = load_captions("audio_caption", tmp_path, tmp_path, limit=2)
    assert [file.references for file in files] == [["a tone", "a beep"], ["noise"]]


def test_what_cannot_be_evaluated_is_said(split: Path) -> None:
    with pytest.raises(ConfigError, match="Known: webvid"):
        load_captions("messages", split / "messages", None)
    with pytest.raises(ConfigError, match="videos_dir"):
        load_captions("webvid", split / "webvid/annotations", None)
    with pytest.raises(DatasetError, match="no such file"):
        load_captions("webvid", split / "nowhere", split)


def test_perfect_answers_have_the_highest_metrics_and_foreign_ones_the_lowest() -> None:
    texts = ["Two red stars move up.", "A blue ring on black background.", "You can hear a whistle today."]
    perfect = caption_metrics([said(text.upper(), text, "something else entirely") for text in texts])
    assert perfect == pytest.approx({**dict.fromkeys(perfect, 1.0), "CIDEr": perfect["CIDEr"]}, abs=1e-3)
    assert list(perfect) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    swapped = caption_metrics([said(text, texts[number - 1]) for number, text in enumerate(texts)])
    assert swapped["CIDEr"] < 0.5 < perfect["CIDEr"]
    assert swapped["BLEU-4"] < 0.01


def test_files_that_could_not_be_read_are_left_out_of_the_metrics() -> None:
    good = [said("two red stars", "two red stars"), said("a blue ring", "a blue ring")]
    assert caption_metrics([*good, said(None, "a cross", error="damaged")]) == caption_metrics(good)
    with pytest.raises(MediaError, match=r"damaged; none of 1 files"):
        caption_metrics([said(None, "a cross", error="damaged")])


def test_a_damaged_file_is_named_and_the_others_keep_their_answers(split: Path, model: VideoLlama) -> None:
    files = load_captions(
        "llava_instruct", split / "llava_instruct/llava_instruct_150k.json", split / "cc_sbu_align/image"
    )
    whole = caption_files(model, files, "unused", batch_size=4)
    Path(files[1].source.path).write_bytes(b"no picture")
    partly = caption_files(model, files, "unused", batch_size=4)
    assert partly[1].answer is None
    assert "10000001" in partly[1].error or "30000001" in partly[1].error
    assert [result.answer for result in partly[:1] + partly[2:]] == [result.answer for result in whole[:1] + whole[2:]]
    assert all(result.answer for result in whole)


def test_the_script_writes_metrics_and_answers(split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module("video_llama.cli.evaluate")
    places = ["--data", str(split / "audio_caption"), "--media", str(split / "audio_caption/audio")]
    file = tmp_path / "figures.json"
    arguments = ["--model", "video-llama-tiny", "--dataset", "audio_caption", *places, "--json", str(file)]
    assert script.main(arguments) == 0
    report = json.loads(file.read_text())
    assert report["files"] == len(report["answers"]) == 3
    assert report["metrics"]["ROUGE-L"] > 0.3
    assert "| CIDEr |" in capsys.readouterr().out
    assert script.main([*arguments[:3], "nonsense", *places]) == 1
    assert "unknown dataset 'nonsense'. Known: audio_caption" in capsys.readouterr().err
