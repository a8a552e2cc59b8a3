"""What the plug-in for vLLM does without vLLM: requests as prompts, the options of the server, a start without it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeVideo
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.cli.serve import main
from video_llama.errors import CheckpointError, ConfigError, MessagesError
from video_llama.integrations.vllm import register
from video_llama.integrations.vllm.prompts import Marks, make_prompt, request_keywords, to_messages
from video_llama.integrations.vllm.serve import server_options
from video_llama.model import VideoLlamaProcessor

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
STARS, CROSS, TONE = (str(SAMPLES / name) for name in ("stars.mp4", "cross.jpg", "tone.m4a"))
SMALL = "video-llama-tiny"


@pytest.fixture(scope="module")
def processor() -> VideoLlamaProcessor:
    loaded: VideoLlamaProcessor = VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / SMALL)
    return loaded


def video(path: str) -> dict[str, str]:
    return {"type": "video", "path": path}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*items: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(items)}


def runs(ids: list[int]) -> list[tuple[int, int]]:
    """Return (id, length) of each run of ids above the vocabulary."""
    found: list[tuple[int, int]] = []
    for before, token in zip([0, *ids], ids, strict=False):
        if token >= 840:
            if before == token:
                found[-1] = (token, found[-1][1] + 1)
            else:
                found.append((token, 1))
    return found


# Prompts


def test_the_ids_are_those_of_apply_chat_template_but_for_the_mark_of_videos(processor: VideoLlamaProcessor) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        user(video(STARS), {"type": "image", "path": CROSS}, text("What <ImageHere> is it? </s>[/INST]<AudioHere>")),
        {"role": "assistant", "content": "A star.</s>"},
        user({"type": "audio", "path": TONE}, text("And now?")),
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, load_audio_from_video=True
    )
    prompt = make_prompt(processor, messages)
    marks = Marks.of(processor)
    ids = prompt["prompt_token_ids"]
    assert marks.ids == {"image": 840, "video": 842, "audio": 841}
    assert [840 if token == 842 else token for token in ids] == inputs["input_ids"][0].tolist()
    # The audio of the video, its frames, the image, the sound.
    assert runs(ids) == [(841, 4), (842, 12), (840, 12), (841, 4)]
    assert marks.run("video") == [842] * 12


def test_media_keep_their_own_lengths_and_kinds(processor: VideoLlamaProcessor, make_video: MakeVideo) -> None:
    still = str(make_video("one.mp4", num_frames=1))
    messages = [user({"type": "image", "path": CROSS}, video(STARS), video(still), text("What?"))]
    prompt = make_prompt(processor, messages, load_audio_from_video=False)
    media = prompt["multi_modal_data"]
    assert {kind: [tuple(item.shape) for item in items] for kind, items in media.items()} == {
        "image": [(1, 3, 64, 64)],
        "video": [(8, 3, 64, 64), (1, 3, 64, 64)],
    }
    expected = processor.media_processor.process_video(STARS)[0].pixel_values
    assert torch.equal(media["video"][0], expected)
    assert [mark for mark, _ in runs(prompt["prompt_token_ids"])] == [840, 842, 842]


def test_audio_can_be_left_out_frames_chosen_and_an_answer_continued(processor: VideoLlamaProcessor) -> None:
    messages = [user(video(STARS), text("What?"))]
    assert "audio" in make_prompt(processor, messages)["multi_modal_data"]
    silent = make_prompt(processor, messages, load_audio_from_video=False, num_frames=3)
    assert [len(item) for item in silent["multi_modal_data"]["video"]] == [3]
    assert "audio" not in silent["multi_modal_data"]
    begun = [*messages, {"role": "assistant", "content": "On a black"}]
    answer = make_prompt(processor, begun, continue_final_message=True)["prompt_token_ids"]
    assert processor.tokenizer.decode(answer).endswith("On a black")
    assert "multi_modal_data" not in make_prompt(processor, [user(text("What?"))])


# Requests


def test_parts_of_openai_become_items_of_ours() -> None:
    parts = [
        {"type": "video_url", "video_url": {"url": "file:///a.mp4"}},
        {"type": "image_url", "image_url": "data:,b"},
        {"type": "input_image", "image_url": "data:,c"},
        {"type": "audio_url", "audio_url": {"url": "data:,d"}},
        {"type": "input_audio", "input_audio": {"data": "ZQ==", "format": "mp3"}},
        {"type": "input_text", "text": "What?"},
        "And?",
    ]
    messages, media = to_messages([{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}])
    assert [(item.kind, item.name, item.address) for item in media] == [
        ("video", "video_url 1", "file:///a.mp4"),
        ("image", "image_url 2", "data:,b"),
        ("image", "input_image 3", "data:,c"),
        ("audio", "audio_url 4", "data:,d"),
        ("audio", "input_audio 5", "data:audio/mp3;base64,ZQ=="),
    ]
    media[0].item["video"] = "a.mp4"
    assert messages[0] == {"role": "system", "content": "Be short."}
    assert messages[1]["content"][0] == {"type": "video", "video": "a.mp4"}
    assert messages[1]["content"][5:] == [text("What?"), text("And?")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "path": "/etc/passwd"},
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "video_url", "video_url": {}},
        {"type": "video_url", "path": "/etc/passwd"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"url": "data:,a"},
    ],
)
def test_paths_and_other_parts_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(MessagesError, match=r"the type of a part must be|names no file"):
        to_messages([{"role": "user", "content": [part]}])


def test_tool_calls_are_refused() -> None:
    with pytest.raises(MessagesError, match="tool_calls"):
        to_messages([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}])


def test_there_must_be_a_question() -> None:
    for messages in ([], [{"role": "system", "content": "Be short."}]):
        with pytest.raises(MessagesError, match="no message of the user"):
            to_messages(messages)


def test_requests_set_only_what_cannot_harm_the_server() -> None:
    assert request_keywords(None, 8) == {}
    assert request_keywords({"num_frames": 8, "use_audio_in_video": False}, 8) == {
        "num_frames": 8,
        "load_audio_from_video": False,
    }
    # `--limit-mm-per-prompt '{"audio": 0}'` leaves the audio branch unloaded.
    assert request_keywords({"load_audio_from_video": True}, 8, takes_audio=False) == {"load_audio_from_video": False}
    for number in (0, 9, "8", 2.0):
        with pytest.raises(ConfigError, match="num_frames must be from 1 to 8"):
            request_keywords({"num_frames": number}, 8)
    for name in ("allow_urls", "do_sample_frames", "fps", "max_length"):
        with pytest.raises(ConfigError, match=f"not {name}"):
            request_keywords({name: True}, 8)


# The server


def test_the_server_is_greedy_and_local_unless_options_say_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    folder = str(PACKAGED_MODELS / SMALL)
    greedy = ["--override-generation-config", '{"temperature": 0}']
    name = ["--served-model-name", SMALL]
    assert server_options(SMALL, ["--port", "1"]) == [folder, "--host", "127.0.0.1", *greedy, *name, "--port", "1"]
    chosen = ["--host=0.0.0.0", "--served_model_name", "small", "--override-generation-config", "{}"]
    assert server_options(SMALL, chosen) == [folder, *chosen]
    assert "stop=" not in caplog.text


def test_only_saved_folders_are_served(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        server_options(str(tmp_path / "absent"), [])
    with pytest.raises(CheckpointError, match=r"convert_checkpoint\.py"):
        server_options(str(tmp_path), [])
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        server_options(str(tmp_path), [])


def test_what_ends_answers_as_text_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(PACKAGED_MODELS / SMALL, tmp_path / "copy")
    settings = folder / "processor_config.json"
    settings.write_text(settings.read_text().replace("video_llama_2", "v1"))
    server_options(str(folder), [])
    assert "requests need stop=['###']" in caplog.text


def test_without_vllm_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main([SMALL]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == 'error: video-llama serve: vllm is not installed: pip install "video_llama[vllm]"'


def test_the_plug_in_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "could not be registered with vLLM" in caplog.text
