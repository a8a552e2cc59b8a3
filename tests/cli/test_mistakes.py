"""The mistakes of the first hour: each is one line that says what is wrong and what to do, before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from video_llama.cli import main

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
CONFIG = "model: {ckpt: video-llama-tiny}\ndatasets: {messages: {build_info: {anno_dir: mine.jsonl}}}\n"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no clip")
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "mine.jsonl").write_text("")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("chat empty What?", "empty: a folder, not a file (give the files in it; video-llama caption takes folders)"),
        ("chat notes.txt What?", "notes.txt: a text file, not a video or audio file"),
        ("chat notes.txt What? --device cuda:99", "notes.txt: a text file"),
        ("chat http://a.b/c.mp4 What?", "http://a.b/c.mp4: an address, not a file (add --allow-urls"),
        ("train --cfg-path empty", "empty: a folder; give a YAML file"),
        ("train --cfg-path absent.yaml", "absent.yaml: no such file"),
        (
            "train --cfg-path mine.yaml --options run.max_epochs=1",
            "mine.yaml: unknown key run.max_epochs (did you",
        ),
        ("check-data mine.yaml --bad empty", "--bad: empty is a folder; name a file"),
        ("check-data mine.yaml --bad notes.txt/bad.jsonl", "--bad: the folder notes.txt cannot be made"),
        ("evaluate --model x --data empty --json empty", "--json: empty is a folder; name a file"),
        ("evaluate --model x --data empty", "empty: no ground_truth.jsonl in this folder; give a split of what"),
        ("caption mine.yaml --model x --output o.jsonl --profile empty", "--profile: empty is a folder; name a file"),
        ("convert video-llama-tiny out", "video-llama-tiny: a folder for transformers already; --to original"),
        ("convert absent out", "absent: no such file or folder; it should be a folder with VL_*.pth"),
        ("memory 70b", "70b: neither one of 7b, 13b nor a folder"),
        ("download Video-LLaMA-2-7B", "Video-LLaMA-2-7B: not a published model; did you mean Video-LLaMA-2-7B-Fin"),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line[: 7 + len(message)] == f"error: {message}"


def test_a_device_that_is_not_there_says_which_is(capsys: pytest.CaptureFixture[str]) -> None:
    (Path.cwd() / "cross.jpg").write_bytes((SAMPLES / "cross.jpg").read_bytes())
    assert main(["chat", "cross.jpg", "What?", "--device", "cuda:99"]) == 1
    assert "error: device cuda:99 is not available: torch " in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("GPU(s); use cpu, or install torch for your GPU")


def test_files_are_not_given_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", "clip.mp4"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: clip.mp4: files are added on the page (video-llama chat")


def test_a_folder_without_weights_is_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--verify", "empty"]) == 1
    assert capsys.readouterr().out.startswith("empty: no weights in this folder (")


def test_the_data_of_a_run_on_the_small_model_is_checked_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    question = '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}\n'
    (Path.cwd() / "mine.jsonl").write_text(question)
    assert main(["check-data", "mine.yaml", "--workers", "0"]) == 0
    assert capsys.readouterr().out.startswith("datasets.messages: 1 example, 1 of them read\n")
