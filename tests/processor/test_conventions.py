"""The keywords and results of transformers' processors."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from video_llama import VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.errors import ConfigError, MediaError, MessagesError

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


def test_a_list_of_image_files_is_a_video_whatever_stands_for_a_file(
    processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    files = [Path(IMAGE), tmp_path / "turned.png"]
    Image.open(IMAGE).rotate(90).crop((0, 0, 50, 80)).save(files[1])
    sources: list[list[Any]] = [
        [str(file) for file in files],
        files,
        [file.read_bytes() for file in files],
        [Image.open(file) for file in files],
        [Image.open(files[0]), *files[1:]],
    ]
    expected = torch.cat([processor(text="<ImageHere>", images=file)["pixel_values"][:, 0] for file in files])[None]
    for frames in sources:
        batch = processor.apply_chat_template(about(frames), tokenize=True)
        assert torch.equal(batch["pixel_values"], expected)
        assert torch.equal(processor(text="<ImageHere>", videos=[frames])["pixel_values"], expected)
    with pytest.raises(MediaError, match=r"absent\.jpg"):
        processor.apply_chat_template(about([files[0], "absent.jpg"]), tokenize=True)


def test_videos_may_be_nested_by_prompt(processor: VideoLlamaProcessor) -> None:
    text = ["<ImageHere> a", "<ImageHere><ImageHere> b"]
    image = Image.open(IMAGE)
    flat = processor(text=text, videos=[VIDEO, [image] * 2, VIDEO])
    nested = processor(text=text, videos=[[VIDEO], [[image] * 2, VIDEO]])
    assert flat.keys() == nested.keys()
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    # The frames of one video for each prompt stay that, also where there is one frame.
    single = processor(text=["<ImageHere>", "<ImageHere>"], videos=[[image], [image]])
    assert single["pixel_values"].shape[:2] == (2, 1)


def test_padding_is_where_the_tokenizer_has_it_unless_the_call_says_otherwise(tmp_path: Path) -> None:
    processor = VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")
    text = ["What is that in the picture?", "What?"]
    assert processor(text=text)["attention_mask"][1].tolist()[0] == 0
    processor.tokenizer.padding_side = "right"
    assert processor(text=text)["attention_mask"][1].tolist()[-1] == 0
    assert processor(text=text, padding_side="left")["attention_mask"][1].tolist()[0] == 0
    with pytest.raises(ValueError, match="'left' or 'right', not 'top'"):
        processor(text=text, padding_side="top")
    # Tokenizers of language models pad on the right; a processor is there to answer.
    processor.save_pretrained(tmp_path)
    assert VideoLlamaProcessor.from_pretrained(tmp_path)(text=text)["attention_mask"][1].tolist()[0] == 0
    turned = AutoProcessor.from_pretrained(tmp_path, padding_side="right")
    assert turned(text=text)["attention_mask"][1].tolist()[-1] == 0


def test_lists_and_arrays_are_returned_on_request(processor: VideoLlamaProcessor) -> None:
    conversations = [about(VIDEO), [*about(IMAGE, "image"), {"role": "assistant", "content": "A cross."}]]
    options = {"tokenize": True, "return_assistant_tokens_mask": True, "return_mm_token_type_ids": True}
    tensors = processor.apply_chat_template(conversations, **options)
    arrays = processor.apply_chat_template(conversations, **options, return_tensors="np")
    assert tensors.keys() == arrays.keys()
    for name, value in arrays.items():
        assert isinstance(value, np.ndarray)
        assert np.array_equal(value, tensors[name].numpy())
    lists = processor.apply_chat_template(conversations, **options, return_tensors=None, padding=False)
    for name in ("input_ids", "attention_mask", "assistant_masks", "mm_token_type_ids"):
        alone = [processor.apply_chat_template(each, **options)[name][0].tolist() for each in conversations]
        assert lists[name] == alone
        padded = processor.apply_chat_template(conversations, **options, return_tensors=None)[name]
        assert padded == tensors[name].tolist()
    assert torch.equal(lists["pixel_values"], tensors["pixel_values"])
    assert isinstance(processor.video_processor(VIDEO, return_tensors="np")["pixel_values"], np.ndarray)


def test_an_item_may_hold_a_file_in_base64(processor: VideoLlamaProcessor) -> None:
    item = {"type": "image", "base64": base64.b64encode(Path(IMAGE).read_bytes()).decode()}
    message = [{"role": "user", "content": [item, {"type": "text", "text": "What is it?"}]}]
    expected = processor.apply_chat_template(about(IMAGE, "image"), tokenize=True)["pixel_values"]
    assert torch.equal(processor.apply_chat_template(message, tokenize=True)["pixel_values"], expected)


def test_what_an_item_says_that_nothing_reads_is_named(
    processor: VideoLlamaProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    item = {"type": "video", "path": VIDEO, "fps": 1.0, "nothing": None, "max_pixels": 9}
    processor.apply_chat_template([{"role": "user", "content": [item]}])
    assert "fps, max_pixels of the video item is not read" in caplog.text


def test_a_call_without_text_says_what_is_missing(processor: VideoLlamaProcessor) -> None:
    with pytest.raises(ValueError, match="give text"):
        processor(text=None, images=IMAGE)
