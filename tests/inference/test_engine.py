"""The model with its processor: encoding media, preparing prompts, answering whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import ConfigError, MediaError, VideoLlamaError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.inference.load import load_pretrained_model
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor import load_processor
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.prompt_parts import Placeholder, media_prefix

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
    monkeypatch.setattr("video_llama.utils.devices.NARROW_WIDTH", 16)
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
    path = str(make_video("clip.mp4", audio=True))
    media = [{"type": kind, "path": path} for kind in ("video", "audio")]
    content = [*media, {"type": "text", "text": QUESTION}]
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
    placed.introduce(media_prefix([image], None))
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
    kept.introduce(media_prefix([image]))
    prompt = model.prepare(kept.up_to_answer(), [model.encode(image)])
    assert model.too_long(prompt, OPTIONS) is not None
    answer = model.generate(image, None, long, max_new_tokens=16)
    assert "turn(s) are left out" in caplog.text
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
    with pytest.raises(ValueError, match=r"takes segments of .* read the audio with its own processor"):
        model.encode(torch.zeros(2, 1, bins, frames + 8))


# What scripts do


def test_the_wrapper_is_used_like_a_module(tiny_checkpoint: Path, image: VideoFrames) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    whole = model.model
    answer = model.generate(image, max_new_tokens=8)
    assert (model.dtype, model.config) == (torch.float32, whole.config)
    assert len(list(model.parameters())) == len(list(whole.parameters()))
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert model.tokenizer is model.processor.tokenizer
    assert model.generation_config is whole.generation_config
    assert model.train() is model
    assert whole.training
    assert model.eval().to("cpu").cpu().float() is model
    assert not whole.training
    assert model.generate(image, max_new_tokens=8) == answer
    assert model.generate(image, max_new_tokens=8, static_cache=True) == answer
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.generate(image, max_new_tokens=2, static_cache=True)
    assert model.encode(image).features.dtype == torch.bfloat16  # none that were kept in float32
    assert model.generate(image.half(), max_new_tokens=2)
    assert model.requires_grad_(False) is model
    assert not any(weight.requires_grad for weight in whole.parameters())


@pytest.mark.parametrize(("capable", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_half_is_what_loading_takes_for_half(
    capable: bool, dtype: torch.dtype, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    assert model.half().dtype == dtype


def test_a_gpu_that_is_not_there_is_an_error_in_words(model: VideoLlama) -> None:
    with pytest.raises(ConfigError, match="device cuda:77 is not available"):
        model.cuda(77)


def test_tensors_in_the_place_of_frames_and_sound_give_the_same_answer(
    model: VideoLlama, clip: tuple[VideoFrames, AudioSegments], image: VideoFrames
) -> None:
    frames, sound = clip
    expected = model.generate(frames, sound, max_new_tokens=8)  # with sound no sentence says the frames' times
    for seen in (frames.pixel_values, frames.unsqueeze(0), torch.as_tensor(frames), torch.stack(list(frames))):
        for heard in (sound, sound.values, sound.unsqueeze(0)):
            assert model.generate(seen, heard, max_new_tokens=8) == expected
    still = model.generate(image, max_new_tokens=8)
    for seen in (image[0], image.pixel_values, image.unsqueeze(0)):
        assert model.generate(seen, max_new_tokens=8) == still
    assert model.generate([image[0][None], frames], max_new_tokens=4)
    assert model.caption([image[0]], max_new_tokens=4) == model.caption([image.pixel_values], max_new_tokens=4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"imgs": "clip.mp4"}, TypeError, r"imgs is str 'clip.mp4', not .* read it first, imgs, audio = process_video"),
        ({"imgs": [Path("a.mp4")]}, TypeError, r"imgs is \w*PosixPath 'a.mp4'"),
        ({"imgs": np.zeros((4, 4, 3))}, TypeError, "imgs is ndarray, not what"),
        (
            {"imgs": [torch.zeros(3, 4, 4)] * 2},
            TypeError,
            r"2 tensors of one frame each: torch.stack\(imgs\) is a video",
        ),
        ({"imgs": torch.zeros(1, 3, 8, 4, 4)}, MediaError, r"tensor\[0\].transpose\(0, 1\)"),
        ({"imgs": torch.zeros(2, 1, 4, 4)}, MediaError, r"is no \(frames, 3, height, width\)"),
        ({"audio": "tone.wav"}, TypeError, r"audio is str 'tone.wav', not .* audio = process_audio\(path"),
        ({"audio": (np.zeros(9), 16_000)}, TypeError, "audio is tuple"),
        ({"conv": "What is this?"}, TypeError, r"conv is str 'What is this\?', not a conversation: conv = model.new"),
        (
            {"images": 1},
            TypeError,
            r"no option 'images' \(options: max_new_tokens, .*do_sample, keep_template, max_length",
        ),
        ({"max_tokens": 1}, TypeError, "no option 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"top_k": -1}, ValueError, "top_k must not be negative"),
    ],
)
def test_what_generate_cannot_take_is_an_error_that_says_what_to_do(
    model: VideoLlama, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(**given)


def test_frames_and_sound_in_each_others_place_are_an_error(
    model: VideoLlama, clip: tuple[VideoFrames, AudioSegments]
) -> None:
    with pytest.raises(TypeError, match="imgs is audio: pass it as audio"):
        model.generate(clip[1])
    with pytest.raises(TypeError, match="audio is frames: pass them as imgs"):
        model.generate(None, clip[0])


def test_sound_that_was_read_for_another_model_is_encoded_as_this_ones_processor_reads_it(
    model: VideoLlama, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, processor = make_video("clip.mp4", audio=True), model.processor
    foreign = load_processor(log_mel={"num_mel_bins": 40, "num_mel_frames": 90, "mean": 0.0}).process_audio(path)
    expected = processor.media_processor.process_audio(path).values
    assert torch.equal(model.prepare_values(foreign), expected)
    inputs = processor("<AudioHere> What?", audios=[foreign])
    assert torch.equal(inputs["audio_values"][0], expected)


def test_options_of_transformers_do_what_they_do_there(model: VideoLlama, image: VideoFrames) -> None:
    greedy = model.generate(image, max_new_tokens=12)
    conversation = model.new_conversation()
    conversation.introduce(media_prefix([image]))
    length = len(model.prepare(conversation.up_to_answer(), [model.encode(image)]).keys)
    assert model.generate(image, max_length=length + 12) == greedy
    assert model.generate(image, max_length=length + 12, max_new_tokens=300, min_length=1, use_cache=True) == greedy
    with pytest.raises(VideoLlamaError, match=f"max_length={length} leaves none for an answer"):
        model.generate(image, max_length=length)
    assert model.generate(image, do_sample=True, top_k=1, max_new_tokens=12) == greedy
    assert model.generate(image, do_sample=False, top_p=None, max_new_tokens=12) == greedy
    torch.manual_seed(0)
    sampled = {model.generate(image, do_sample=True, top_p=1.0, top_k=0, max_new_tokens=12) for _ in range(3)}
    assert len(sampled) == 3


@pytest.mark.parametrize("static_cache", [False, True])
def test_a_streamer_of_transformers_gets_the_answer(model: VideoLlama, image: VideoFrames, static_cache: bool) -> None:
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.generate(image, max_new_tokens=12, streamer=streamer, static_cache=static_cache)
    assert answer == model.generate(image, max_new_tokens=12)
    assert cut_at_stop("".join(streamer), ["</s>"]) == answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5, "do_sample": False}, "temperature=0.5 has no effect with do_sample=False"),
        ({"top_p": 0.8}, "no effect of top_p: nothing is sampled without a temperature or do_sample=True"),
        ({"top_p": 0.8, "top_k": 3, "do_sample": False}, "no effect of top_p and top_k"),
        ({"use_cache": False}, "use_cache=False has no effect"),
    ],
)
def test_an_option_without_effect_is_not_ignored_without_a_word(
    model: VideoLlama, image: VideoFrames, options: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = model.generate(image, max_new_tokens=6, **options)
    [warning] = caplog.messages
    assert message in warning
    assert answer == model.generate(image, max_new_tokens=6)


def test_a_conversation_in_another_template_is_answered_in_the_weights_own_with_one_warning(
    tiny_checkpoint: Path, image: VideoFrames, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False, verbose=False)
    prompts: list[str] = []
    prepare = model.prepare
    monkeypatch.setattr(
        model, "prepare", lambda conv, media: (prompts.append(conv.get_prompt()), prepare(conv, media))[1]
    )
    own, other = model.new_conversation(), conv_templates["v1"].copy()
    for conversation in (own, other):
        conversation.append_message(conversation.roles[0], QUESTION)
        conversation.append_message(conversation.roles[1], "...")
        model.generate(image, None, conversation, max_new_tokens=2)
    assert prompts[0] == prompts[1]
    model.generate(image, None, other, max_new_tokens=2)
    [warning] = caplog.messages
    assert "(SINGLE, Human/Assistant, system '') than these weights were trained with ('llama_2')" in warning
    assert other.messages == [["Human", QUESTION], ["Assistant", "..."]]
    model.generate(image, None, other, max_new_tokens=2, keep_template=True)
    assert prompts[-1].startswith("###Human: <Image>")
    assert len(caplog.messages) == 1
