"""From an example to tokens, labels and tensors; the rules of the tokens are in test_tokenization.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeAudio, MakeVideo
from tests.data_pipeline.conftest import MakeEncoder, captioned
from video_llama.constants import IGNORE_INDEX
from video_llama.data.checking import check_sample
from video_llama.data.examples import Example, MediaSource
from video_llama.data.sample_processor import ProcessedSample
from video_llama.errors import DatasetError, MediaError, VideoLlamaError
from video_llama.processor.builders import BlipCaptionProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.transforms import normalize_pixels

PROMPTS = [f"###Human: <Image><ImageHere></Image> {verb} it. ###Assistant: " for verb in ("Describe", "Name", "Show")]
QA = {"QA": [{"q": "What is it?", "a": "A dog."}, {"q": "Where?", "a": "On the grass."}]}


def talk(*items: dict[str, str], answer: str = "A dog.") -> dict[str, Any]:
    user = {"role": "user", "content": [*items, {"type": "text", "text": "What is it?"}]}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


@pytest.fixture
def text_of(processor: VideoLlamaProcessor) -> Any:
    """A sample's text, with V for what is seen and S for what is heard; or only what is learnt."""
    marks = {processor.image_token_id: "V", processor.audio_token_id: "S"}

    def decode(sample: ProcessedSample, learnt: bool = False) -> str:
        ids = [token for token in sample.labels if token != IGNORE_INDEX] if learnt else sample.input_ids
        text, run = "", []
        for token in [*ids, None]:
            if token is None or token in marks:
                text += str(processor.tokenizer.decode(run))
                run = []
                text += marks.get(token, "")
            else:
                run.append(token)
        return text

    return decode


def test_a_caption_follows_its_picture(picture: Path, make_encoder: MakeEncoder, text_of: Any) -> None:
    sample = make_encoder()(captioned(picture))
    assert sample.id == "set/1"
    assert text_of(sample) == "<s>VVVVVa dog###"
    assert text_of(sample, learnt=True) == "a dog###"
    [item] = sample.media
    assert (item.name, item.is_encoded, item.key) == ("pixel_values", False, None)
    assert item.values.shape == (1, 3, 28, 28)


def test_a_video_has_as_many_frames_as_are_asked_for(make_video: MakeVideo, make_encoder: MakeEncoder) -> None:
    [item] = make_encoder()(captioned(make_video(), kind="video")).media
    assert (item.name, item.values.shape) == ("pixel_values", (2, 3, 28, 28))


def test_a_sound_takes_the_place_of_sounds(make_audio: MakeAudio, make_encoder: MakeEncoder, text_of: Any) -> None:
    sample = make_encoder()(captioned(make_audio(seconds=5.0), "a tone", kind="audio"))
    assert text_of(sample) == "<s>SSSa tone###"
    [item] = sample.media
    assert item.name == "audio_values"
    assert item.values.shape[1:] == (1, 32, 36)


def test_the_sound_track_of_a_video_is_heard_if_the_dataset_is_of_sounds(
    make_video: MakeVideo, make_encoder: MakeEncoder
) -> None:
    [item] = make_encoder()(captioned(make_video(audio=True), kind="audio")).media
    assert item.name == "audio_values"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pictures_can_stand_in_for_sound(
    kind: str, picture: Path, make_video: MakeVideo, make_encoder: MakeEncoder, text_of: Any
) -> None:
    path = picture if kind == "image" else make_video()
    sample = make_encoder(images_as_audio=True)(captioned(path, kind=kind))
    assert text_of(sample) == "<s>SSSa dog###"
    assert sample.media[0].name == "audio_pixel_values"


def test_captions_are_cleaned_if_there_is_a_cleaner(picture: Path, make_encoder: MakeEncoder, text_of: Any) -> None:
    example = captioned(picture, "A DOG (brown)!")
    assert text_of(make_encoder()(example), learnt=True) == "A DOG (brown)!###"
    assert text_of(make_encoder(caption_processor=BlipCaptionProcessor())(example), learnt=True) == "a dog brown###"


def test_one_of_the_prompts_is_drawn_for_each_caption(picture: Path, make_encoder: MakeEncoder, text_of: Any) -> None:
    encoder = make_encoder(prompts=PROMPTS)
    texts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        first = text_of(encoder(captioned(picture)))
        torch.manual_seed(seed)
        assert text_of(encoder(captioned(picture))) == first
        texts.add(first.replace("VVVVV", "<ImageHere>").replace("  ", " "))  # each part begins with a space
    assert texts == {f"<s> {prompt}a dog###" for prompt in PROMPTS}


def test_questions_on_a_video_say_which_frames_were_sampled(
    make_video: MakeVideo, make_encoder: MakeEncoder, text_of: Any
) -> None:
    path = make_video(num_frames=21, fps=10)
    sample = make_encoder()(Example("set/1", "video", MediaSource(str(path)), QA))
    text = text_of(sample)
    assert "<Video>VVVVV</Video> The video contains 2 frames sampled at" in text
    assert text.index("sampled") < text.index("What is it?\n###Assistant: A dog.\n###Human: Where?")
    assert text_of(sample, learnt=True) == "A dog.\n### On the grass.\n###"


def test_questions_on_a_sound_are_asked_as_a_chat_asks_them(
    make_audio: MakeAudio, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    path = str(make_audio())
    encoder = make_encoder(max_txt_len=200, template=processor.conv_template)
    sample = encoder(Example("set/1", "audio", MediaSource(path), QA))
    content = [{"type": "audio", "path": path}, {"type": "text", "text": "What is it?"}]
    asked = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)["input_ids"][0].tolist()
    assert sample.input_ids[: len(prompt)] == prompt


def test_llava_dialogues_put_the_picture_where_their_mark_is(
    picture: Path, make_encoder: MakeEncoder, text_of: Any
) -> None:
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A dog."}]
    sample = make_encoder(template="llama_v2")(
        Example("set/1", "image", MediaSource(str(picture)), {"conversations": turns})
    )
    assert "What is it?\n<Image>VVVVV</Image> [/INST] A dog. </s>" in text_of(sample)


def test_messages_may_hold_media_of_every_kind(
    picture: Path, make_video: MakeVideo, make_audio: MakeAudio, make_encoder: MakeEncoder, text_of: Any
) -> None:
    items = [("image", picture), ("video", make_video(audio=True)), ("audio", make_audio())]
    text = talk(*({"type": kind, "path": str(path)} for kind, path in items))
    # Even where pictures stand in for sound elsewhere: messages name their sounds.
    sample = make_encoder(max_txt_len=200, images_as_audio=True)(Example("set/1", "video", None, text))
    whole = text_of(sample)
    assert "<Image>VVVVV</Image>" in whole
    assert "<Video>VVVVV</Video> The video contains 2 frames" in whole
    assert whole.count("SSS") == 1
    assert text_of(sample, learnt=True) == "A dog.\n###"
    assert [item.name for item in sample.media] == ["pixel_values", "pixel_values", "audio_values"]


def test_the_sound_of_a_video_in_messages_is_heard_only_if_they_name_it(
    make_video: MakeVideo, make_encoder: MakeEncoder
) -> None:
    path = str(make_video(audio=True))
    items = [{"type": "video", "path": path}, {"type": "audio", "path": path}]
    encoder = make_encoder(max_txt_len=200)
    assert [item.name for item in encoder(Example("1", "video", None, talk(items[0]))).media] == ["pixel_values"]
    assert len(encoder(Example("1", "video", None, talk(*items))).media) == 2


def test_a_clip_and_its_own_sound_are_introduced_as_a_chat_introduces_them(
    make_video: MakeVideo, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    path = str(make_video(audio=True))
    items = [{"type": "video", "path": path}, {"type": "audio", "path": path}]
    sample = make_encoder(max_txt_len=200, template=processor.conv_template)(Example("1", "video", None, talk(*items)))
    asked = [{"role": "user", "content": [*items, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)["input_ids"][0].tolist()
    assert sample.input_ids[: len(prompt)] == prompt
    assert processor.audio_token_id in prompt
    assert [item.name for item in sample.media] == ["pixel_values", "audio_values"]


def test_messages_need_no_media(make_encoder: MakeEncoder, text_of: Any) -> None:
    sample = make_encoder()(Example("set/1", "video", None, talk()))
    assert sample.media == []
    assert text_of(sample, learnt=True) == "A dog.\n###"


def test_media_of_messages_may_lie_in_a_shard(picture: Path, make_encoder: MakeEncoder, tmp_path: Path) -> None:
    content = picture.read_bytes()
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"....." + content)
    fields = dataclasses.asdict(MediaSource(str(shard), "7.0.jpg", 5, len(content)))
    encoder = make_encoder()
    [inside] = encoder(Example("1", "image", None, talk({"type": "image", "path": fields}))).media  # type: ignore[dict-item]
    [outside] = encoder(Example("1", "image", None, talk({"type": "image", "path": str(picture)}))).media
    assert torch.equal(inside.values, outside.values)


def test_a_model_without_audio_branch_cannot_hear(
    make_audio: MakeAudio, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    encoder = make_encoder(placeholder_ids={"image": processor.image_token_id})
    with pytest.raises(DatasetError, match="equip_audio_branch"):
        encoder(Example("1", "audio", None, talk({"type": "audio", "path": str(make_audio())})))


@pytest.mark.parametrize("length", [3, 8, 20])
def test_the_longest_text_is_obeyed(
    length: int, picture: Path, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    sample = make_encoder(max_txt_len=length)(captioned(picture, "many dogs " * 40))
    assert len(sample.input_ids) == 1 + 5 + length
    messages = talk({"type": "image", "path": str(picture)}, answer="many dogs " * 40)
    dialogue = make_encoder(max_txt_len=30 + length)(Example("1", "image", None, messages))
    assert len(dialogue.input_ids) == 1 + 5 + 30 + length
    assert sum(label != IGNORE_INDEX for label in dialogue.labels) > 0


def test_a_question_that_fills_the_text_leaves_nothing_to_learn_and_is_an_error(
    picture: Path, make_encoder: MakeEncoder
) -> None:
    encoder = make_encoder(max_txt_len=20)
    long = {"QA": [{"q": "why " * 40, "a": "A dog."}]}
    with pytest.raises(DatasetError, match="no token of an answer is left"):
        encoder(Example("1", "image", MediaSource(str(picture)), long))


@pytest.mark.parametrize("nothing", ["", "  ", " \n"])
@pytest.mark.parametrize("form", ["caption", "QA", "conversations", "messages"])
@pytest.mark.parametrize("template", ["vicuna", "llama_v2"])
def test_an_empty_answer_is_a_bad_sample_even_beside_others(
    template: str, form: str, nothing: str, picture: Path, make_encoder: MakeEncoder
) -> None:
    asked, said = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}
    text: dict[str, Any] = {
        "caption": nothing,
        "QA": [{"q": "What?", "a": "A dog."}, {"q": "Where?", "a": nothing}],
        "conversations": [asked, said, {"from": "human", "value": "Where?"}, {"from": "gpt", "value": nothing}],
        "messages": [*talk()["messages"], *talk(answer=nothing)["messages"]],
    }
    source = None if form == "messages" else MediaSource(str(picture))
    example = Example("1", "image", source, {form: text[form]})
    with pytest.raises(DatasetError, match=r"is empty"):
        make_encoder(template=template)(example)
    assert check_sample(make_encoder(template=template), example).outcome == "malformed"


def test_a_caption_of_which_the_cleaner_leaves_nothing_is_a_bad_sample(
    picture: Path, make_encoder: MakeEncoder
) -> None:
    with pytest.raises(DatasetError, match=r"is empty"):
        make_encoder(caption_processor=BlipCaptionProcessor())(captioned(picture, "..."))


@pytest.mark.parametrize(
    "text",
    [
        {"caption": None},
        {"QA": ["What?"]},
        {"QA": [{"q": "What?"}]},
        {"conversations": ["What?"]},
        {"conversations": [{"from": "human", "value": "no mark"}, {"from": "gpt", "value": "A dog."}]},
        {"messages": [{"role": "judge", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
)
def test_an_annotation_of_another_form_is_a_dataset_error(
    text: dict[str, Any], picture: Path, make_encoder: MakeEncoder
) -> None:
    with pytest.raises(DatasetError):
        make_encoder()(Example("1", "image", MediaSource(str(picture)), text))


HELLO, SURE = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure."}
BRIEF = {"role": "system", "content": "Be brief."}
ABSENT = [{"type": "image", "path": "absent.jpg"}]  # the order of messages is looked at before any file


@pytest.mark.parametrize("template", ["vicuna", "llama_v2"])
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HELLO, HELLO, SURE], r"message 2 \(user\) follows a message of the user; expected are one system"),
        ([SURE, HELLO, SURE], r"message 1 \(assistant\) comes first"),
        ([HELLO, SURE, SURE], r"message 3 \(assistant\) follows a message of the assistant"),
        ([HELLO, SURE, BRIEF, HELLO, SURE], r"message 3 \(system\) follows a message of the assistant"),
        ([HELLO, {"role": "assistant", "content": ABSENT}], r"message 2 \(assistant\): holds image; expected"),
        ([{"role": "system", "content": ABSENT}, HELLO, SURE], r"message 1 \(system\): holds image; expected"),
        ([{"role": "user", "content": ""}, SURE], r"message 1 \(user\): is empty"),
        ([HELLO, {"role": "assistant", "content": " \n"}], r"message 2 \(assistant\): .* no training target"),
        ([HELLO, SURE, HELLO, {"role": "assistant", "content": []}], "no training target"),
    ],
)
def test_messages_out_of_order_are_bad_samples(
    messages: list[dict[str, Any]], reason: str, template: str, make_encoder: MakeEncoder
) -> None:
    example = Example("1", "image", None, {"messages": messages})
    with pytest.raises(DatasetError, match=reason):
        make_encoder(template=template)(example)
    checked = check_sample(make_encoder(template=template), example)
    assert checked.outcome == "malformed"


def test_a_system_message_in_front_replaces_the_templates(make_encoder: MakeEncoder, text_of: Any) -> None:
    sample = make_encoder(template="llama_v2")(Example("1", "video", None, {"messages": [BRIEF, HELLO, SURE]}))
    assert text_of(sample) == "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST] Sure. </s>"


def test_a_mistake_in_a_program_that_reads_messages_is_no_bad_sample(
    picture: Path, make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process_image(*_: Any) -> None:
        raise ValueError("not enough values to unpack")

    encoder = make_encoder()
    monkeypatch.setattr(type(encoder.media), "process_image", process_image)
    example = Example("1", "image", None, talk({"type": "image", "path": str(picture)}))
    with pytest.raises(ValueError, match="not enough values") as caught:
        encoder(example)
    assert not isinstance(caught.value, VideoLlamaError)
    with pytest.raises(ValueError, match="not enough values"):
        check_sample(encoder, example)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(None, "video"), (b"", "video"), (b"\xff\xd8\xff\xe0 broken", "image"), (b"text", "audio"), (None, "image")],
)
def test_a_file_that_cannot_be_read_is_a_media_error(
    content: bytes | None, kind: str, make_encoder: MakeEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "broken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match="broken"):
        make_encoder()(captioned(path, kind=kind))


def test_a_cut_jpg_is_a_media_error(picture: Path, make_encoder: MakeEncoder) -> None:
    picture.write_bytes(picture.read_bytes()[:-200])
    with pytest.raises(MediaError):
        make_encoder()(captioned(picture))


def test_what_is_random_comes_from_torchs_generator(
    make_video: MakeVideo, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    media = dataclasses.replace(processor.media_processor, crop_scale=(0.3, 1.0), sampling="headtail")
    encoder = make_encoder(media=media)
    example = captioned(make_video(num_frames=24), kind="video")

    def values(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return encoder(example).media[0].values

    assert torch.equal(values(1), values(1))
    assert not torch.equal(values(1), values(2))


def test_frames_travel_as_bytes_unless_the_processor_normalises_them_otherwise_than_the_model(
    picture: Path, make_encoder: MakeEncoder, processor: VideoLlamaProcessor
) -> None:
    values = make_encoder()(captioned(picture)).media[0].values
    assert values.dtype == torch.uint8
    expected = processor.media_processor.process_image(picture).pixel_values
    assert torch.equal(normalize_pixels(values), expected)
    other = dataclasses.replace(processor.media_processor, mean=(0.0, 0.0, 0.0))
    values = make_encoder(media=other)(captioned(picture)).media[0].values
    assert torch.equal(values, other.process_image(picture).pixel_values)
