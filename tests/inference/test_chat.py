"""The chat: uploads, several turns with a kept cache, dropped turns, streaming, user text that stays text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_model import make_tiny_config
from video_llama.conversation import conv_templates
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.media import decode
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer
from video_llama.prompt_parts import Placeholder

TOKENIZER = Path(__file__).parents[1] / "data" / "reference" / "tokenizer"
OPTIONS = GenerationOptions(max_new_tokens=12)


def build_model(use_audio: bool = True, context: int = 2048) -> VideoLlama:
    """Random weights; pictures and sound of the published sizes, so that real files go in."""
    tokenizer = load_tokenizer(TOKENIZER)
    config = make_tiny_config(
        use_audio=use_audio,
        audio_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
            "output_size": 24,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": context,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration(config)
    processor = VideoLlamaProcessor(
        tokenizer=tokenizer,
        media_processor=MediaProcessor(image_size=config.vision_config.image_size, num_frames=4),
        image_token_id=config.image_token_id,
        audio_token_id=config.audio_token_id,
        num_video_query_tokens=config.num_video_query_tokens,
        num_audio_query_tokens=config.num_audio_query_tokens,
        conv_template="llama_2",
    )
    return VideoLlama(model, processor)


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return build_model()


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        Image.linear_gradient("L").convert("RGB").save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def chat(model: VideoLlama) -> Chat:
    return Chat(model, options=OPTIONS)


def test_a_video_is_seen_and_heard_and_asked_about(chat: Chat, make_video: Callable[..., Path]) -> None:
    upload = chat.upload_video(make_video("clip.mp4", audio=True))
    assert upload.frames is not None
    assert upload.sound == "heard"
    assert [item.kind for item in upload.encoded] == ["audio", "image"]
    chat.ask("What is it?")
    assert chat.answer() == chat.turns[0].answer


def test_no_sound_track_and_a_broken_one_are_told_apart(
    chat: Chat, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = chat.upload_video(make_video("silent.mp4"))
    assert (silent.audio, silent.sound) == (None, "no sound track")

    def broken(path: object, *arguments: object) -> None:
        raise MediaError(str(path), "the sound breaks off after 1.2 seconds")

    monkeypatch.setattr(decode, "read_segments", broken)
    damaged = chat.upload_video(make_video("damaged.mp4", audio=True))
    assert damaged.frames is not None
    assert damaged.sound == "sound track cannot be decoded: the sound breaks off after 1.2 seconds"


def test_later_turns_give_the_tokens_of_a_fresh_start_without_encoding_or_reading_again(
    model: VideoLlama, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, clip = Chat(model, options=OPTIONS), make_video("clip.mp4", audio=True)
    chat.upload_video(clip)
    processed: list[int] = []
    forward = model.model.language_model.forward

    def counting(*args: object, **kwargs: object) -> object:
        processed.append(kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else 1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", counting)
    for question in ("What is the man doing?", "Why?", "And what can you hear?"):
        processed.clear()
        chat.ask(question)
        answer, computed = chat.answer(), sum(processed)
        fresh = Chat(model, options=OPTIONS)
        fresh.turns = [type(turn)(list(turn.uploads), turn.question, turn.answer) for turn in chat.turns]
        fresh.turns[-1].answer = None
        processed.clear()
        assert fresh.answer() == answer
        if len(chat.turns) > 1:
            assert computed < sum(processed) / 2


def test_several_media_can_stand_in_one_conversation(
    chat: Chat, make_video: Callable[..., Path], make_image: Callable[..., Path], make_audio: Callable[..., Path]
) -> None:
    chat.upload_img(make_image("still.png"))
    chat.ask("What is this?")
    chat.answer()
    chat.upload_video_without_audio(make_video("clip.mp4", audio=True))
    chat.upload_audio(make_audio("noise.wav"))
    chat.ask("And these?")
    assert isinstance(chat.answer(), str)
    placeholders = [
        item.kind for _, content in chat.conversation().messages for item in content if isinstance(item, Placeholder)
    ]
    assert placeholders == ["image", "image", "audio"]


def test_a_streamed_answer_is_the_answer(model: VideoLlama, make_image: Callable[..., Path]) -> None:
    chats = [Chat(model, options=OPTIONS) for _ in range(2)]
    for chat in chats:
        chat.upload_img(make_image("still.png"))
        chat.ask("What is this?")
    assert "".join(chats[0].stream_answer()) == chats[1].answer()
    assert chats[0].turns[0].answer == chats[1].turns[0].answer


def test_a_stopped_answer_keeps_what_was_said_and_the_chat_goes_on(
    model: VideoLlama, make_image: Callable[..., Path]
) -> None:
    chat = Chat(model, options=GenerationOptions(max_new_tokens=200, min_new_tokens=200))
    chat.upload_img(make_image("still.png"))
    chat.ask("Tell me everything.")
    pieces = chat.stream_answer()
    first = next(pieces)
    pieces.close()
    said = chat.turns[0].answer
    assert said is not None
    assert said.startswith(first)
    chat.ask("Go on.")
    assert isinstance(chat.answer(max_new_tokens=5, min_new_tokens=1), str)


def test_a_long_conversation_drops_whole_oldest_turns_and_keeps_its_media(
    make_video: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    chat = Chat(build_model(context=160), conv_templates["v1"], options=GenerationOptions(max_new_tokens=16))
    chat.upload_video_without_audio(make_video("clip.mp4"))
    for number in range(6):
        chat.ask(f"Question number {number}: how many people appear in the video?")
        chat.answer()
    assert 0 < chat.dropped_turns < 6
    assert "left out" in caplog.text
    prompt = chat.conversation(chat.dropped_turns).get_prompt()
    assert prompt.count("<ImageHere>") == 1
    assert "Question number 0" not in prompt
    assert "Question number 5" in prompt
    while len(chat.turns) > 1:  # back to before the first turn that was dropped
        chat.undo()
    chat.ask("And how many dogs?")
    chat.answer()
    assert "And how many dogs?" in chat.conversation(chat.dropped_turns).get_prompt()


def test_a_question_that_can_never_fit_is_refused_with_figures(make_image: Callable[..., Path]) -> None:
    chat = Chat(build_model(context=64), options=GenerationOptions(max_new_tokens=16))
    chat.upload_img(make_image("still.png"))
    chat.ask("word " * 200)
    with pytest.raises(VideoLlamaError, match="48 fit beside an answer of 16"):
        chat.answer()


def test_special_tokens_typed_by_a_user_stay_text(chat: Chat, make_image: Callable[..., Path]) -> None:
    chat.upload_img(make_image("still.png"))
    chat.ask("Is <ImageHere> or </s> or <s> special?")
    prompt = chat.model.prepare(chat.conversation().up_to_answer(), chat.turns[0].uploads[0].encoded)
    config = chat.model.model.config
    features = [key for key in prompt.keys if isinstance(key, tuple)]
    assert len(features) == config.num_video_query_tokens
    assert prompt.keys.count(2) == 0
    assert prompt.keys.count(1) == 1


def test_a_model_without_audio_branch_says_so(make_video: Callable[..., Path], make_audio: Callable[..., Path]) -> None:
    chat = Chat(build_model(use_audio=False), options=OPTIONS)
    assert chat.upload_video(make_video("clip.mp4", audio=True)).sound == "the model has no audio branch"
    with pytest.raises(VideoLlamaError, match="no audio branch"):
        chat.upload_audio(make_audio("noise.wav"))


def test_nothing_asked_is_an_error_and_undo_and_reset_take_back(chat: Chat, make_image: Callable[..., Path]) -> None:
    with pytest.raises(VideoLlamaError, match="nothing was asked"):
        chat.answer()
    chat.upload_img(make_image("still.png"))
    chat.ask("What is this?")
    chat.answer()
    undone = chat.undo()
    assert undone is not None
    assert undone.question == "What is this?"
    chat.reset()
    assert chat.turns == []
    assert chat.undo() is None


def test_text_asked_twice_before_an_answer_is_one_question(chat: Chat) -> None:
    chat.ask("Who?")
    chat.ask("And where?")
    assert chat.turns[0].question == "Who? And where?"


def test_the_same_question_has_the_same_answer_and_a_temperature_changes_it(
    model: VideoLlama, make_image: Callable[..., Path]
) -> None:
    def ask(temperature: float) -> str:
        chat = Chat(model, options=GenerationOptions(max_new_tokens=20, temperature=temperature))
        chat.upload_img(make_image("still.png"))
        chat.ask("What is this?")
        return chat.answer()

    torch.manual_seed(1)
    assert ask(0.0) == ask(0.0)
    assert ask(5.0) != ask(5.0)


def test_options_of_one_answer_have_transformers_names_and_a_wrong_one_is_told_the_right_ones(
    chat: Chat, make_image: Callable[..., Path]
) -> None:
    chat.upload_img(make_image("still.png"))
    chat.ask("What is it?")
    with pytest.raises(
        TypeError, match=r"no option 'temprature'; did you mean 'temperature'\? \(options: max_new_tokens"
    ):
        chat.answer(temprature=0.2)
    answer = chat.answer(do_sample=True, top_k=1)
    chat.undo()
    chat.upload_img(make_image("still.png"))
    chat.ask("What is it?")
    assert chat.answer(do_sample=False) == answer


def test_an_encoded_sound_no_longer_holds_what_it_was_made_of(chat: Chat, make_audio: Callable[..., Path]) -> None:
    decoded = chat.decode_audio(make_audio())
    assert decoded.audio is not None
    assert decoded.audio.origin is not None
    audio = chat.add(decoded).audio
    assert audio is not None
    assert audio.origin is None
    assert audio.values is decoded.audio.values
