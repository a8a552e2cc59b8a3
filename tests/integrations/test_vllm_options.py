"""What captioning with vLLM does without vLLM: options in its words, prompts of windows, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.cli import caption
from video_llama.errors import ConfigError
from video_llama.inference.generation import GenerationOptions
from video_llama.integrations.vllm.options import check_options, parse_engine_options, sampling_arguments
from video_llama.integrations.vllm.prompts import Marks, make_prompt, window_prompt
from video_llama.model import VideoLlamaProcessor
from video_llama.processor.clips import ClipReader, Window
from video_llama.processor.media_processor import VideoFrames
from video_llama.processor.transforms import normalize_pixels

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
QUESTION = "What <ImageHere> is in it?</s>"


@pytest.fixture(scope="module")
def processor() -> VideoLlamaProcessor:
    loaded: VideoLlamaProcessor = VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")
    return loaded


# Prompts


@pytest.mark.parametrize(("kind", "name"), [("video", "stars.mp4"), ("image", "cross.jpg"), ("audio", "tone.m4a")])
def test_a_window_is_asked_about_as_a_message_with_its_file(
    processor: VideoLlamaProcessor, kind: str, name: str
) -> None:
    path = str(SAMPLES / name)
    content = [{"type": kind, "path": path}, {"type": "text", "text": QUESTION}]
    expected = make_prompt(processor, [{"role": "user", "content": content}])
    num_windows, [window] = ClipReader(processor.media_processor)(path)
    assert num_windows == 1
    assert isinstance(window, Window)
    prompt = window_prompt(processor, window, QUESTION)
    marks = Marks.of(processor).ids
    as_video = {marks["image"]: marks["video"]}
    assert prompt["prompt_token_ids"] == [as_video.get(token, token) for token in expected["prompt_token_ids"]]
    media, wanted = prompt["multi_modal_data"], expected["multi_modal_data"]
    assert set(media) == {"video" if kind == "image" else kind for kind in wanted}
    if "audio" in wanted:
        assert torch.equal(media["audio"][0], wanted["audio"][0])
    if kind != "audio":
        # Bytes, a quarter of the numbers that they become in the branch.
        assert media["video"][0].dtype == torch.uint8
        assert isinstance(window.frames, VideoFrames)
        numbers = normalize_pixels(media["video"][0], window.frames.mean, window.frames.std)
        torch.testing.assert_close(numbers, wanted[kind][0])


# Options


def test_options_are_said_in_vllms_words() -> None:
    greedy = sampling_arguments(GenerationOptions(max_new_tokens=20), [], [2])
    assert greedy == {
        "max_tokens": 20,
        "min_tokens": 1,
        "temperature": 0.0,
        "stop_token_ids": [2],
        "stop": [],
        "detokenize": False,
    }
    sampled = sampling_arguments(GenerationOptions(temperature=0.5, top_p=0.8), ["###"], [])
    assert (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (0.5, 0.8, 50)
    assert (sampled["stop"], sampled["detokenize"]) == (["###"], True)
    assert sampling_arguments(GenerationOptions(temperature=1.0, top_k=0), [], [2])["top_k"] == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 2}, "--num-beams"),
        ({"repetition_penalty": 1.2}, "--repetition-penalty"),
        ({"static_cache": True}, "--static-cache"),
        ({"static_cache": False}, "--no-static-cache"),
        ({"compile": True}, "--compile"),
    ],
)
def test_what_vllm_answers_otherwise_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine vllm cannot take .*{name}"):
        check_options(GenerationOptions(**options))


def test_options_of_the_engine_are_a_json_object_without_those_of_the_command() -> None:
    assert parse_engine_options(None) == {}
    assert parse_engine_options('{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"dtype": "half"}', "cannot set dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_engine_options(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launcher", "ray"], "cannot be used with --launcher ray: use --num-shards"),
        (["--device", "cuda:1"], "cannot be used with --device"),
        (["--model-base", "base"], "cannot be used with --model-base"),
        (["--load-in-8bit"], "cannot be used with --load-in-8bit: quantization is vLLM's"),
        (["--load-in-4bit"], "cannot be used with --load-in-4bit: quantization is vLLM's"),
        (["--num-beams", "3"], "cannot take --num-beams"),
        (["--engine-options", "3"], "must be a JSON object"),
        ([], 'vllm is not installed: pip install "video_llama[vllm]"'),
    ],
)
def test_the_command_refuses_before_it_writes(
    arguments: list[str],
    message: str,
    make_video: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    options = ["--engine", "vllm", "--model", "video-llama-tiny", "--output", str(tmp_path / "out" / "captions.jsonl")]
    assert caption.main([str(make_video("clip.mp4")), *options, *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --engine")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--engine", "vllm", "--model", "video-llama-tiny", "--output", str(tmp_path / "captions.jsonl")]
    assert caption.main(["clip.mp4", *options]) == 1
    assert "cannot be used with torchrun: vLLM starts its processes itself" in capsys.readouterr().err


def test_options_of_an_engine_need_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine-options", "{}", "--model", "video-llama-tiny", "--output", str(tmp_path / "captions.jsonl")]
    assert caption.main(["clip.mp4", *options]) == 1
    assert capsys.readouterr().err == "error: --engine-options belongs to --engine vllm\n"
