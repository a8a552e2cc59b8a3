"""The keywords and results of transformers' processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_llama import VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.errors import ConfigError, MessagesError

SAMPLES = Path(__file__).parents[2] / "video_llama/demo/samples"
VIDEO, IMAGE = str(SAMPLES / "stars.mp4"), str(SAMPLES / "cross.jpg")


@pytest.fixture(scope="module")
def processor() -> VideoLlamaProcessor:
    return VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")


def about(source: Any, kind: str = "video") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: source}, {"type": "text", "text": "What?"}]}]


def test_placeholders_have_the_usual_names(processor: VideoLlamaProcessor) -> None:
    assert (processor.image_token, processor.video_token, processor.audio_token) == (
        "<ImageHere>", "<ImageHere>", "<AudioHere>",
    )  # fmt: skip
    assert processor.video_token_id == processor.image_token_id
    counted = processor._get_num_multimodal_tokens(image_sizes=[(5, 5)], video_sizes=[(2, 5, 5)] * 2)
    assert counted["num_image_tokens"] == [processor.num_video_query_tokens]
    assert counted["num_video_tokens"] == [processor.num_video_query_tokens] * 2


def test_a_request_says_how_many_frames_it_wants(processor: VideoLlamaProcessor) -> None:
    whole = processor.apply_chat_template(about(VIDEO), tokenize=True, do_sample_frames=False, return_metadata=True)
    metadata = whole["video_metadata"][0]
    assert whole["pixel_values"].shape[1] == metadata.total_num_frames
    assert metadata.frames_indices == list(range(metadata.total_num_frames))
    two = processor.apply_chat_template(about(VIDEO), tokenize=True, processor_kwargs={"num_frames": 2})
    assert two["pixel_values"].shape[1] == 2
    seconds = metadata.total_num_frames / metadata.fps
    each = processor(text="<ImageHere>", videos=VIDEO, videos_kwargs={"fps": 2})
    assert each["pixel_values"].shape[1] == round(2 * seconds)


def test_frames_in_memory_are_told_their_times(processor: VideoLlamaProcessor) -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    plain = processor.apply_chat_template(about(frames))
    told = processor.apply_chat_template(about(frames), video_metadata=[{"fps": 2, "frames_indices": [0, 2, 4, 6]}])
    assert "0.0, 1.0, 2.0, 3.0" in told
    assert "0.0" not in plain
    with pytest.raises(ConfigError, match="more entries"):
        processor.apply_chat_template(about(frames), tokenize=True, video_metadata=[{"fps": 2}, {"fps": 2}])
    with pytest.raises(ConfigError, match="frame rate of frames in memory"):
        processor.apply_chat_template(about(frames), fps=1)


def test_kinds_of_ids_and_answers_are_returned_on_request(processor: VideoLlamaProcessor) -> None:
    messages = [*about(IMAGE, "image"), {"role": "assistant", "content": "One."}, *about(VIDEO)]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_mm_token_type_ids=True, return_assistant_tokens_mask=True
    )
    types, length = batch["mm_token_type_ids"][0].tolist(), processor.num_video_query_tokens
    assert [types.count(kind) for kind in (1, 2, 3)] == [length, length, 0]
    assert types.index(1) < types.index(2)
    answer = batch["input_ids"][0][batch["assistant_masks"][0] == 1]
    assert processor.decode(answer, skip_special_tokens=True).strip() == "One."


def test_an_answer_is_left_open(processor: VideoLlamaProcessor) -> None:
    begun = [*about(VIDEO), {"role": "assistant", "content": "It is"}]
    whole, left_open = processor.apply_chat_template(begun), processor.apply_chat_template(
        begun, continue_final_message=True
    )  # fmt: skip
    assert left_open.endswith("It is")
    assert whole.startswith(left_open)
    with pytest.raises(MessagesError, match="last message of the assistant"):
        processor.apply_chat_template(about(VIDEO), continue_final_message=True)


def test_prompts_are_cut_and_filled_to_a_length_but_media_are_never_cut(processor: VideoLlamaProcessor) -> None:
    batch = processor(["Hello", "Hello there, you all"], padding="max_length", max_length=32)
    assert batch["input_ids"].shape == (2, 32)
    cut = processor("Hello there, you all of the world", truncation=True, max_length=4)
    assert cut["input_ids"].shape == (1, 4)
    assert processor("Hello", pad_to_multiple_of=8)["input_ids"].shape[1] % 8 == 0
    with pytest.raises(ValueError, match="would cut media off"):
        processor("Hello <ImageHere>", videos=VIDEO, truncation=True, max_length=6)
    with pytest.raises(ValueError, match="needs truncation=True"):
        processor("Hello", max_length=6)


def test_what_cannot_be_done_is_refused(processor: VideoLlamaProcessor) -> None:
    with pytest.raises(TypeError, match=r"unknown keyword.*nframes"):
        processor.apply_chat_template(about(VIDEO), nframes=3)
    with pytest.raises(ConfigError, match="another chat_template"):
        processor.apply_chat_template(about(VIDEO), chat_template="{{ messages }}")
    with pytest.raises(ConfigError, match="not both"):
        processor(text="<ImageHere>", videos=VIDEO, num_frames=2, fps=1)


def test_lists_of_images_for_each_prompt_are_one_list(processor: VideoLlamaProcessor) -> None:
    nested = processor(["<ImageHere>", "<ImageHere>"], images=[[IMAGE], [IMAGE]])
    assert torch.equal(nested["pixel_values"][0], nested["pixel_values"][1])
    sound = processor("<AudioHere>", audio=np.zeros(32_000, np.float32), sampling_rate=16_000)
    assert len(sound["audio_values"]) == 1
