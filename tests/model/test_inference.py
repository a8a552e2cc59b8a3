"""The model with its processor: encoding media, preparing prompts, answering whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from video_llama.conversation import Conversation, Placeholder, introduce_media
from video_llama.errors import VideoLlamaError
from video_llama.model.builder import load_pretrained_model
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.generation import GenerationOptions, PrefixCache
from video_llama.model.inference import EncodedMedia, Prompt, VideoLlama
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor import load_processor
from video_llama.processor.media import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

OPTIONS = GenerationOptions(max_new_tokens=16)
QUESTION = "What is happening?"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    return load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)


@pytest.fixture
def clip(model: VideoLlama, make_video: Callable[..., Path]) -> tuple[VideoFrames, AudioSegments]:
    frames, sound = model.processor.media_processor.process_video(make_video("clip.mp4", audio=True))
    assert sound is not None
    return frames, sound


@pytest.fixture
def image(model: VideoLlama) -> VideoFrames:
    pixels = torch.arange(40 * 30 * 3, dtype=torch.uint8).reshape(40, 30, 3).numpy()
    return model.processor.media_processor.process_image(pixels)


# What is loaded


def test_the_wrapper_knows_its_parts(model: VideoLlama) -> None:
    assert (model.device, model.has_audio, model.max_length) == (torch.device("cpu"), True, 4096)
    assert not model.model.training
    first, second = model.new_conversation(), model.new_conversation()
    first.ask(QUESTION)
    assert (second.messages, second.sep_style.name) == ([], "LLAMA_2")


@pytest.mark.parametrize(
    ("capable", "half", "expected"),
    [(True, True, torch.bfloat16), (False, True, torch.float32), (True, False, torch.float32)],
)
def test_half_precision_is_used_where_the_cpu_is_good_at_it(
    capable: bool, half: bool, expected: torch.dtype, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    monkeypatch.setattr("video_llama.utils.utils.NARROW_WIDTH", 16)
    model = load_pretrained_model(tiny_checkpoint, device=torch.device("cpu"), half=half, verbose=False)
    assert {tensor.dtype for tensor in model.model.parameters()} == {expected}


def test_a_template_can_be_chosen_by_name_and_other_names_leave_the_weights_own(tiny_checkpoint: Path) -> None:
    for name, template in (("v1", "v1"), ("Video-LLaMA-2-7B-Finetuned", "llama_2"), (None, "llama_2")):
        assert load_pretrained_model(tiny_checkpoint, None, name, "cpu").processor.conv_template == template


def test_the_auto_classes_load_what_was_saved_bit_by_bit(
    model: VideoLlama, tmp_path: Path, clip: tuple[VideoFrames, AudioSegments]
) -> None:
    model.model.save_pretrained(tmp_path, max_shard_size="500KB")
    model.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VideoLlamaConfig)
    processor = AutoProcessor.from_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(processor, VideoLlamaProcessor)
    assert isinstance(loaded, VideoLlamaForConditionalGeneration)
    saved = model.model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.state_dict().items())
    answers = [each.generate(*clip, None, max_new_tokens=8) for each in (model, VideoLlama(loaded, processor))]
    assert answers[0] == answers[1]


# Encoding


def test_media_are_encoded_by_the_branch_of_their_kind(
    model: VideoLlama, clip: tuple[VideoFrames, AudioSegments]
) -> None:
    frames, sound = clip
    seen, heard = model.encode(frames), model.encode(sound)
    assert (seen.kind, heard.kind) == ("image", "audio")
    assert torch.equal(seen.features, model.model.get_video_features(frames.pixel_values[None])[0])
    assert torch.equal(heard.features, model.model.get_audio_features(sound.values[None])[0])
    for tensor, encoded in ((frames.pixel_values, seen), (sound.values, heard)):
        again = model.encode(tensor)
        assert (again.kind, again.features.tolist()) == (encoded.kind, encoded.features.tolist())


def test_frames_of_another_size_are_resized_to_the_models(
    model: VideoLlama, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = make_video("clip.mp4"), model.processor.media_processor
    large, _ = load_processor(image_size=own.image_size * 4).process_video(path)
    expected, _ = own.process_video(path)
    seen: list[torch.Tensor] = []
    model.media_cache.clear()  # other tests have shown the clip before
    encode = model.model.get_video_features
    monkeypatch.setattr(model.model, "get_video_features", lambda values: (seen.append(values), encode(values))[1])
    model.encode(large)
    model.encode(expected)
    assert seen[0].shape == seen[1].shape
    assert (seen[0] - seen[1]).abs().mean() < 0.05 < (seen[0].flip(-1) - seen[1]).abs().mean()


def test_a_sound_for_a_deaf_model_is_an_error(tiny_checkpoint: Path, clip: tuple[VideoFrames, AudioSegments]) -> None:
    deaf = load_pretrained_model(tiny_checkpoint, device="cpu", audio=False, verbose=False)
    assert not deaf.has_audio
    with pytest.raises(ValueError, match="without its audio branch"):
        deaf.encode(clip[1])


# Prompts


def test_media_stand_in_the_prompt_where_they_are_introduced(
    model: VideoLlama, clip: tuple[VideoFrames, AudioSegments], image: VideoFrames
) -> None:
    frames, sound = clip
    items = [model.encode(item) for item in (frames, sound, image)]
    conversation = model.new_conversation()
    conversation.append_message(
        "USER", [Placeholder("image"), "then", Placeholder("audio"), "then", Placeholder("image")]
    )
    prompt = model.prepare(conversation.up_to_answer(), [items[1], items[0], items[2]])
    position = {key: number for number, key in enumerate(prompt.keys) if isinstance(key, tuple)}
    order = sorted(items, key=lambda item: position[item, 0])
    assert order == [items[0], items[1], items[2]]
    for item in items:
        start = position[item, 0]
        assert torch.equal(prompt.inputs_embeds[0, start : start + len(item.features)], item.features)
    embeddings = model.model.get_input_embeddings()
    words = [number for number, key in enumerate(prompt.keys) if isinstance(key, int)]
    ids = torch.tensor([prompt.keys[number] for number in words])
    assert torch.equal(prompt.inputs_embeds[0, words], embeddings(ids))
    text = model.processor.tokenizer.decode(ids)
    assert "then then" in " ".join(text.split())
    assert prompt.stop_strings == ["</s>"]


def test_placeholders_without_media_are_an_error(model: VideoLlama, image: VideoFrames) -> None:
    conversation = model.new_conversation()
    conversation.append_message("USER", [Placeholder("image"), Placeholder("image"), QUESTION])
    with pytest.raises(ValueError, match="image"):
        model.prepare(conversation.up_to_answer(), [model.encode(image)])


# Answers


def test_the_wrapper_answers_as_the_transformers_classes_do(
    model: VideoLlama, clip: tuple[VideoFrames, AudioSegments], make_video: Callable[..., Path]
) -> None:
    content = [{"type": "video", "path": str(make_video("clip.mp4", audio=True))}, {"type": "text", "text": QUESTION}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = model.model.generate(**inputs, max_new_tokens=16)
    conversation = model.new_conversation()
    conversation.ask(QUESTION)
    answer = model.generate(*clip, conversation, max_new_tokens=16)
    assert answer == model.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert conversation.messages == [["USER", QUESTION]]


@pytest.mark.parametrize("last", ["…thinking…", None], ids=["words", "nothing"])
def test_a_last_assistant_message_stands_for_the_answer_to_come(
    last: str | None, model: VideoLlama, image: VideoFrames
) -> None:
    asked, pending = model.new_conversation(), model.new_conversation()
    asked.ask(QUESTION)
    pending.ask(QUESTION)
    pending.append_message("ASSISTANT", last)
    answers = [model.generate(image, None, conv, max_new_tokens=12) for conv in (asked, pending)]
    assert answers[0] == answers[1]
    assert pending.messages[-1] == ["ASSISTANT", last]


def test_media_are_introduced_unless_the_messages_place_them(
    model: VideoLlama, image: VideoFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    prepare = model.prepare

    def remember(conversation: Conversation, media: list[EncodedMedia]) -> Prompt:
        prompts.append(conversation.get_prompt())
        return prepare(conversation, media)

    monkeypatch.setattr(model, "prepare", remember)
    placed, bare = model.new_conversation(), model.new_conversation()
    placed.introduce(introduce_media([image], None))
    for conversation in (placed, bare):
        conversation.ask(QUESTION)
        model.generate(image, None, conversation, max_new_tokens=1)
    assert prompts[0] == prompts[1]
    assert prompts[0].count("<ImageHere>") == 1


def test_the_oldest_turns_of_a_conversation_that_is_too_long_are_not_read(
    model: VideoLlama, image: VideoFrames, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model.model.config.get_text_config(), "max_position_embeddings", 200)
    long, short = model.new_conversation(), model.new_conversation()
    for number in range(9):
        long.ask(f"Question {number}: what is happening here?")
        long.append_message("ASSISTANT", "Something, as always.")
    for conversation in (long, short):
        conversation.ask(QUESTION)
    num_messages = len(long.messages)
    kept = long.copy()
    kept.introduce(introduce_media([image]))
    prompt = model.prepare(kept.up_to_answer(), [model.encode(image)])
    assert model.too_long(prompt, OPTIONS) is not None
    answer = model.generate(image, None, long, max_new_tokens=16)
    assert "turn(s) are not read" in caplog.text
    assert len(long.messages) == num_messages
    while model.too_long(prompt, OPTIONS):
        assert kept.drop_oldest_turn()
        prompt = model.prepare(kept.up_to_answer(), [model.encode(image)])
    assert answer == model.complete(prompt, OPTIONS)
    with pytest.raises(VideoLlamaError, match="0 fit beside an answer of 500"):
        model.generate(image, None, short, max_new_tokens=500)


@pytest.mark.parametrize("given", ["two images", "sound", "nothing"])
def test_any_media_or_none_can_be_asked_about(
    given: str,
    model: VideoLlama,
    clip: tuple[VideoFrames, AudioSegments],
    image: VideoFrames,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imgs = [image, clip[0]] if given == "two images" else None
    audio = clip[1] if given == "sound" else None
    encoded: list[EncodedMedia] = []
    prepare = model.prepare
    monkeypatch.setattr(model, "prepare", lambda conv, media: (encoded.extend(media), prepare(conv, media))[1])
    conversation = model.new_conversation()
    conversation.ask(QUESTION)
    assert model.generate(imgs, audio, conversation, max_new_tokens=4)
    expected = {"two images": ["image", "image"], "sound": ["audio"], "nothing": []}
    assert [item.kind for item in encoded] == expected[given]


def test_an_answer_ends_before_its_stop_string_whole_and_streamed(model: VideoLlama, image: VideoFrames) -> None:
    conversation = model.new_conversation()
    conversation.append_message("USER", [Placeholder("image"), QUESTION])
    prompt = model.prepare(conversation.up_to_answer(), [model.encode(image)])
    answer = model.complete(prompt, OPTIONS)
    stop = answer[4:6]
    stopped = replace(prompt, stop_strings=[stop])
    assert model.complete(stopped, OPTIONS) == answer[: answer.index(stop)].strip()
    pieces = list(model.stream(prompt, OPTIONS))
    assert len(pieces) > 1
    assert "".join(pieces) == answer
    assert "".join(model.stream(stopped, OPTIONS)) == answer[: answer.index(stop)].strip()


def test_beams_answer_whole_and_leave_the_cache_alone(model: VideoLlama, image: VideoFrames) -> None:
    conversation = model.new_conversation()
    conversation.append_message("USER", [Placeholder("image"), QUESTION])
    prompt, cache = model.prepare(conversation.up_to_answer(), [model.encode(image)]), PrefixCache()
    beams = replace(OPTIONS, num_beams=3)
    assert list(model.stream(prompt, beams, cache)) == [model.complete(prompt, beams)]
    assert cache.keys == []
    answer = model.complete(prompt, OPTIONS, cache)
    assert cache.keys[: len(prompt.keys)] == prompt.keys
    assert model.complete(prompt, OPTIONS, cache) == answer == model.complete(prompt, OPTIONS)


def test_sound_of_another_models_processor_is_refused_in_words(model: VideoLlama) -> None:
    bins, frames = model.model.config.audio_config.input_size
    with pytest.raises(ValueError, match=r"hears segments of .* read the sound with its own processor"):
        model.encode(torch.zeros(2, 1, bins, frames + 8))
