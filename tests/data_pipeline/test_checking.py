"""What is said about a dataset before a run meets it."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeVideo
from tests.data_pipeline.conftest import MakeEncoder, WriteText, captioned, write_picture
from video_llama.cli import check_data
from video_llama.config import BuildInfo, Config, DatasetConfig, ModelConfig, load_config
from video_llama.constants import IGNORE_INDEX
from video_llama.data.checking import (
    DatasetCheck,
    SampleCheck,
    check_datasets,
    check_sample,
    describe_tokens,
    share_of_bad_samples,
)
from video_llama.data.examples import Example
from video_llama.data.sample_processor import ProcessedSample
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.load import build_model, build_model_processor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(write: WriteText, tmp_path: Path) -> Path:
    """Ten pictures in the layout of `llava_instruct`, five of which are bad or long."""
    entries = []
    for number in range(10):
        write_picture(tmp_path / f"{number}.jpg", (number * 20, 0, 0))
        entries.append(entry(number, "What is it?", "A dog."))
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:-300])
    entries[5] = entry(5, "What is it?", "It is a dog. " * 60)
    entries[6] = entry(6, "What is it? " * 60, "A dog.")
    entries[8]["conversations"] = entries[8]["conversations"][:1]
    write("llava.json", entries)
    write(
        "train.yaml",
        f"""
model: {{max_txt_len: 100, llama_model: nowhere}}
datasets:
  llava_instruct:
    data_type: images
    build_info: {{anno_dir: {tmp_path}/llava.json, videos_dir: {tmp_path}}}
""",
    )
    return tmp_path


def entry(number: int, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": turns}


def check(folder: Path, processor: VideoLlamaProcessor, *options: str, **settings: Any) -> DatasetCheck:
    [found] = check_datasets(load_config(folder / "train.yaml", options), processor, **settings)
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_kind_of_bad_sample_is_found(num_workers: int, folder: Path, processor: VideoLlamaProcessor) -> None:
    found = check(folder, processor, num_workers=num_workers)
    assert {bad.id: bad.outcome for bad in found.bad} == {
        "llava_instruct/1": "absent",
        "llava_instruct/3": "undecodable",
        "llava_instruct/6": "masked",
        "llava_instruct/8": "malformed",
    }
    assert (found.num_examples, found.num_decoded) == (10, 9)
    assert found.num_cut == 2
    assert found.longest > 200
    assert found.share_of_bad == pytest.approx(0.4)
    assert found.bad[0].reason == str(folder / "1.jpg")
    assert any(failure.reason.startswith("a file cannot be decoded: ") for failure in found.failures())


def test_some_samples_stand_for_the_others(folder: Path, processor: VideoLlamaProcessor) -> None:
    found = check(folder, processor, num_decoded=4)
    assert found.num_decoded == 4
    decoded_bad = len(found.bad) - 1
    assert found.share_of_bad == pytest.approx((1 + 9 * decoded_bad / 4) / 10)
    assert check(folder, processor, num_decoded=4).bad == found.bad
    others = [check(folder, processor, f"run.seed={seed}", num_decoded=4).bad for seed in range(6)]
    assert any(bad != found.bad for bad in others)


def test_without_decoding_absent_files_are_still_found(folder: Path, processor: VideoLlamaProcessor) -> None:
    found = check(folder, processor, num_decoded=0)
    assert [bad.outcome for bad in found.bad] == ["absent"]
    assert found.share_of_bad == pytest.approx(0.1)


def test_media_of_all_samples_are_counted(picture: Path, processor: VideoLlamaProcessor, write: WriteText) -> None:
    sure = {"role": "assistant", "content": "Sure."}

    def row(question: str, **columns: list[str]) -> str:
        return json.dumps({"messages": [{"role": "user", "content": question}, sure], **columns})

    rows = [row("<image><image>?", images=[str(picture)] * 2), row("<image>?", images=[str(picture)]), row("Hello?")]
    path = write("rows.jsonl", "\n".join(rows))
    config = write("train.yaml", f"datasets: {{messages: {{build_info: {{anno_dir: {path}}}}}}}")
    [found] = check_datasets(load_config(config), processor, num_decoded=1)
    assert found.media == {"image": 2, "none": 1}
    report = check_data.report
    assert "2 with image; 1 without any media\n" in report(found, processor, 100)


def test_words_that_a_cleaner_changes_are_counted(processor: VideoLlamaProcessor, write: WriteText) -> None:
    write_picture(write("1", "").with_name("image") / "1.jpg")
    caption = "A dog (3) runs. " + "and on " * 30
    storage = write("filter_cap.json", {"annotations": [{"image_id": "1", "caption": caption}]}).parent
    section = f"{{data_type: images, build_info: {{storage: {storage}}}}}"
    config = write("train.yaml", f"model: {{max_txt_len: 200}}\ndatasets: {{cc_sbu_align: {section}}}")
    report = check_data.report
    # "A", "(3)" and "runs." change, and of 64 words the last 14 are cut off.
    for key, changed in (("False", 0), ("True", 17)):
        [found] = check_datasets(load_config(config, [f"datasets.cc_sbu_align.clean_captions={key}"]), processor)
        assert (found.num_words, found.num_changed) == (64, changed)
        assert ("17 of 64 words of captions changed" in report(found, processor, 200)) is bool(changed)


@pytest.mark.parametrize("skips", [True, False])
def test_clips_without_audio_track_are_counted(
    skips: bool, processor: VideoLlamaProcessor, write: WriteText, make_video: MakeVideo, tmp_path: Path
) -> None:
    for name in ("heard.mp4", "silent.mp4", "still.mp4"):
        make_video(name, audio=name == "heard.mp4")
    table = write("captions.csv", "audio,caption\nheard.mp4,a\nsilent.mp4,b\nstill.mp4,c\n")
    section = DatasetConfig(data_type="audio", build_info=BuildInfo(str(table), str(tmp_path)), skip_silent=skips)
    [found] = check_datasets(Config(datasets={"audio_caption": section}), processor)
    assert (found.num_silent, len(found.bad)) == (2, 0 if skips else 2)


def test_progress_is_told(folder: Path, processor: VideoLlamaProcessor) -> None:
    done: dict[str, list[int]] = {}

    def start(task: str, total: int) -> Callable[[int], object]:
        done[task] = [total]
        return done[task].append

    check(folder, processor, start=start)
    assert done == {"llava_instruct: files": [10] + [1] * 10, "llava_instruct: samples": [9] + [1] * 9}


def test_samples_to_look_at_are_good_ones(folder: Path, processor: VideoLlamaProcessor) -> None:
    found = check(folder, processor, num_shown=3)
    assert len(found.samples) == 3
    assert {sample.id for sample in found.samples} <= {f"llava_instruct/{number}" for number in (0, 2, 4, 5, 7, 9)}
    assert found.samples[0].media[0].values.shape == (1, 3, 28, 28)


@pytest.mark.parametrize(("length", "is_cut"), [(4, True), (60, False)])
def test_a_cut_caption_is_no_bad_one(length: int, is_cut: bool, picture: Path, make_encoder: MakeEncoder) -> None:
    prompts = ["<ImageHere> a long prompt that does not count: ", "<ImageHere>"]
    encoder = make_encoder(max_txt_len=length, prompts=prompts)
    for seed in range(4):
        torch.manual_seed(seed)
        found = check_sample(encoder, captioned(picture, "two brown dogs jump over a fence"))
        assert (found.outcome, found.is_cut) == ("good", is_cut)


def test_a_file_is_decoded_once_for_both_looks_at_its_text(
    picture: Path, make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    encoder = make_encoder()
    process = type(encoder.media).process_image
    monkeypatch.setattr(type(encoder.media), "process_image", lambda *a: (read.append(a), process(*a))[1])
    assert check_sample(encoder, captioned(picture)).outcome == "good"
    item = {"type": "image", "path": str(picture)}
    talk = {"messages": [{"role": "user", "content": [item]}, {"role": "assistant", "content": "A dog."}]}
    assert check_sample(encoder, Example("1", "image", None, talk)).outcome == "good"
    assert len(read) == 2


def test_a_mistake_in_a_program_is_no_bad_sample(picture: Path, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(caption_processor=lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_sample(encoder, captioned(picture))


def test_the_share_of_a_run_follows_the_mixture() -> None:
    config = Config()
    checks = []
    for name, ratio, num_bad in (("webvid", 3.0, 1), ("laion", 1.0, 5)):
        config.datasets[name] = DatasetConfig(sample_ratio=ratio)
        checks.append(DatasetCheck(name, 10, 10, [SampleCheck("x", "masked")] * num_bad))
    assert share_of_bad_samples(config, checks) == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    config.datasets["laion"].sample_ratio = -1
    with pytest.raises(ConfigError, match="sample_ratio"):
        share_of_bad_samples(config, checks)


def test_the_text_shows_media_and_marks_what_is_learnt(processor: VideoLlamaProcessor) -> None:
    tokenizer, media = processor.tokenizer, {processor.image_token_id: "frames", processor.audio_token_id: "sound"}
    question, answer, more = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (" What is it?", "A dog. 狗", "And then?")
    )
    ids = [1, *[processor.image_token_id] * 5, *[processor.audio_token_id] * 3, *question, *answer, *more]
    start = 9 + len(question)
    labels = [token if start <= place < start + len(answer) else IGNORE_INDEX for place, token in enumerate(ids)]
    text = describe_tokens(ProcessedSample("1", ids, labels, []), tokenizer, media)
    assert text.startswith("<s><frames x 5><sound x 3>")
    assert text.endswith("What is it?⟦ A dog. 狗⟧ And then?")


def test_the_processor_is_that_of_the_model_and_needs_no_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    original = shutil.copytree(checkpoints["original"], tmp_path / "original")
    config = ModelConfig(
        llama_model=str(original / "language_model"),
        vit_ckpt=str(original / "eva_vit_g.pth"),
        q_former_model=str(original / "blip2_pretrained_flant5xxl.pth"),
        imagebind_ckpt_path=str(original),
    )
    expected = build_model(config, device="cpu", for_training=True).processor
    for path in [*original.rglob("*.pth"), *original.rglob("*.safetensors"), *original.rglob("*.bin")]:
        path.unlink()
    alone = build_model_processor(config)
    assert alone.to_dict() == expected.to_dict()
    assert alone.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    config.equip_audio_branch = False
    assert not build_model_processor(config).use_audio


def test_the_processor_of_a_saved_folder_is_the_one_saved_with_it(checkpoints: dict[str, Path]) -> None:
    saved = build_model_processor(ModelConfig(ckpt=str(checkpoints["hf"])))
    assert saved.to_dict() == VideoLlamaProcessor.from_pretrained(checkpoints["hf"]).to_dict()


def test_a_processor_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.llama_model must name"):
        build_model_processor(ModelConfig())
    with pytest.raises(CheckpointError, match="absent"):
        build_model_processor(ModelConfig(llama_model=str(tmp_path / "absent")))


@pytest.fixture
def run_script(folder: Path, checkpoints: dict[str, Path]) -> Callable[..., int]:
    """Run scripts/check_dataset.py on the ten pictures."""
    main: Any = runpy.run_path(str(ROOT / "scripts/check_dataset.py"))["main"]
    model = f"model.ckpt={checkpoints['hf']}"
    return lambda *arguments: int(main([str(folder / "train.yaml"), "--options", model, *map(str, arguments)]))


def test_the_script_reports_and_fails_if_too_many_samples_are_bad(
    run_script: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--decode", "all", "--workers", 1, "--show", 1, "--bad", folder / "bad.jsonl")
    assert run_script(*arguments) == 1
    printed = capsys.readouterr().out
    assert "datasets.llava_instruct: 10 examples, 9 of them read" in printed
    assert "1 bad: a file is absent" in printed
    assert "cut at model.max_txt_len: 100; the longest" in printed
    assert "pixel_values (1, 3, 56, 56)" in printed
    assert "<frames x 32>" in printed
    assert re.search(r"What is it\?.*\[/INST\]⟦.* dog\..*⟧", printed)
    assert "40.00% of the samples of a run are bad; run.max_bad_samples allows 1.00%" in printed
    lines = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"llava_instruct/{number}" for number in (1, 3, 6, 8)}


def test_the_script_succeeds_if_the_run_would_go_on(
    run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("run.max_bad_samples=0.5", "--decode", "all", "--workers", 0, "--show", 0) == 0
    assert run_script("--split", "validation") == 1
    assert "no dataset has a validation split" in capsys.readouterr().err
    assert run_script("datasets.llava.data_type=images") == 1
    assert "unknown dataset 'llava'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script("--decode", "some")
