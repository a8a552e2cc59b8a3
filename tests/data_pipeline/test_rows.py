"""Rows of LLaMA-Factory, ms-swift, TRL, LLaVA-Video and VideoLLaMA2: trained with their media, or refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeAudio, MakeVideo
from tests.data_pipeline.conftest import MakeEncoder, WriteText, write_picture
from tests.media.barcode import ClipSpec, read_barcode, write_clip
from video_llama.config import BuildInfo, DatasetConfig
from video_llama.constants import IGNORE_INDEX
from video_llama.data.annotations import KeyCheck
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, media_kinds
from video_llama.data.packing import pack_examples
from video_llama.data.rows import read_row
from video_llama.errors import ConfigError, DatasetError, MediaError
from video_llama.evaluation.captions import load_captions
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

ANSWER = {"role": "assistant", "content": "A dog."}


def chat(question: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, ANSWER], **columns}


def sharegpt(question: str, **columns: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    return {"conversations": turns, **columns}


def item(kind: str, path: str = "") -> dict[str, str]:
    return {"type": kind, "path": path} if path else {"type": kind}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def read(row: dict[str, Any]) -> Any:
    return read_row(row, "a.jsonl, line 7", KeyCheck())["messages"]


FILM = [item("video", "a.mp4"), text("What?")]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (chat("<video>What?", videos=["a.mp4"]), FILM),
        (chat("<video>\nWhat?", videos="a.mp4", images=[], audios=None), FILM),
        (chat("<video> What?", video="a.mp4"), FILM),
        (chat([text("<video>What?")], videos=[{"path": "a.mp4"}]), FILM),
        (chat([item("video"), text("What?")], videos=["a.mp4"]), FILM),
        (sharegpt("<video>\nWhat?", videos=["a.mp4"]), FILM),
        (sharegpt("<video>\nWhat?", video="a.mp4", id="x"), FILM),
        (sharegpt("<image>\nWhat?", video="a.mp4"), FILM),
        ({"query": "<video>What?", "response": "A dog.", "videos": ["a.mp4"]}, FILM),
        ({"instruction": "<video>What?", "input": "", "output": "A dog.", "videos": ["a.mp4"]}, FILM),
        ({"prompt": "<video>What?", "completion": "A dog.", "videos": ["a.mp4"]}, FILM),
        (
            {
                "prompt": [{"role": "user", "content": "<video>What?"}],
                "completion": [ANSWER],
                "videos": ["a.mp4"],
            },
            FILM,
        ),
        (sharegpt("What?<image>", image="b.jpg"), [text("What?"), item("image", "b.jpg")]),
        (
            chat("<image> or <image>, with <audio>?", images=["1.jpg", "2.jpg"], audios=["3.wav"]),
            [
                item("image", "1.jpg"),
                text("or"),
                item("image", "2.jpg"),
                text(", with"),
                item("audio", "3.wav"),
                text("?"),
            ],
        ),
        (sharegpt("What?"), "What?"),
        (chat("Is <video> a tag?", tags=False), "Is <video> a tag?"),
    ],
)
def test_a_row_of_any_tool_becomes_messages_with_its_media(row: dict[str, Any], content: Any) -> None:
    assert read(row) == [{"role": "user", "content": content}, ANSWER]


def test_files_are_taken_in_order_over_all_questions() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Tags such as <video> in a system text are text."},
            {"role": "user", "content": "<video>First?"},
            {"role": "assistant", "content": "One <video>."},
            {"role": "user", "content": "<video>Second?"},
            ANSWER,
        ],
        "videos": ["1.mp4", "2.mp4"],
    }
    messages = read(row)
    assert [message["content"] for message in messages] == [
        row["messages"][0]["content"],
        [item("video", "1.mp4"), text("First?")],
        "One <video>.",
        [item("video", "2.mp4"), text("Second?")],
        "A dog.",
    ]


def test_answers_in_a_prompt_are_context_and_only_the_completion_is_learnt() -> None:
    question, before = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "A cat.", "loss": True}
    messages = read({"prompt": [question, before, question], "completion": [ANSWER], "system": "Be brief."})
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1:] == [question, {**before, "loss": False}, question, ANSWER]
    for prompt, completion in ((None, [ANSWER]), ("What?", [ANSWER]), ([question], "A dog."), ([], [ANSWER])):
        with pytest.raises(DatasetError, match=r"a\.jsonl, line 7.*'?prompt"):
            read({"prompt": prompt, "completion": completion})


def test_history_and_system_text_of_a_query_come_first() -> None:
    row = {"query": "Where?", "response": "Here.", "system": "Be brief.", "history": [["<video>What?", "A dog."]]}
    messages = read({**row, "video": "a.mp4"})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [messages[1]["content"], messages[3]["content"]] == [FILM, "Where?"]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (chat("What?", videos=["a.mp4"]), r"names 1 video files \('video' or 'videos'\).* 0 places"),
        (chat("<video>What?"), "names 0 video files .* 1 places"),
        (chat("<video><video>What?", videos=["a.mp4"]), "names 1 video files .* 2 places"),
        (chat("<video>What?", videos=["a.mp4"], audios=["a.wav"]), "names 1 audio files .* 0 places"),
        (chat("<audio>What?", videos=["a.mp4"]), "names 1 video files"),
        (chat("<video>What?", video="a.mp4", videos=["b.mp4"]), "both 'videos' and 'video'"),
        (chat("<video>What?", videos=["a.mp4"], tags=False), "names 1 video files"),
        (chat("<video>What?", videos=[["1.jpg", "2.jpg"]]), "'videos' must hold names of files"),
        (chat("<video>What?", videos=[""]), "'videos' must hold names of files"),
        (chat("<video>What?", videos=[{"path": "a.mp4", "start": 1}]), "'start' of a file in 'videos'"),
        (chat("<video>What?", videos=["a.mp4"], start=1.0), "'start' of an entry is not supported: .* cut the clip"),
        (chat("What?", video_path="a.mp4"), "'video_path' of an entry names media that would not be used"),
        (chat("What?", frames=["1.jpg"]), r"'frames' of an entry names media that would not be used: \['1.jpg'\]"),
        (chat("What?", shown="clips/A.MP4"), "'shown' of an entry names media that would not be used"),
        (chat("What?", train=False), "'train' of an entry is not supported"),
        (chat("What?", weight=0.5), "'weight' of an entry is not supported"),
        ({**chat("What?"), **sharegpt("What?")}, "both 'messages' and 'conversations'"),
        ({"query": "What?"}, "'response' is missing"),
        ({"text": "What?"}, "'messages' must be a list"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "'from' must be human, gpt or system, not 'tool'"),
        ({"query": "Q", "response": "A", "history": ["Q"]}, "'history' must be a list of pairs"),
    ],
)
def test_a_row_whose_media_or_text_would_be_lost_names_its_place(row: dict[str, Any], cause: str) -> None:
    with pytest.raises(DatasetError, match=f"^a.jsonl, line 7: .*{cause}"):
        read(row)


def examples(path: Path) -> list[Example]:
    return list(build_examples("messages", DatasetConfig(build_info=BuildInfo(anno_dir=str(path)))))


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.json", "list.json"])
def test_rows_are_lines_or_one_list(name: str, write: WriteText) -> None:
    rows = [chat("<video>What?", videos=["a.mp4"]), sharegpt("Hello", id="x")]
    content: Any = rows if name == "list.json" else "\n".join(map(json.dumps, rows))
    first, second = examples(write(name, content))
    assert first.text["messages"][0]["content"][0]["path"].endswith("/a.mp4")
    assert second.id == "messages/x"
    assert [media_kinds(first), media_kinds(second)] == [["video"], []]


def test_an_unknown_key_is_named_once(write: WriteText, caplog: pytest.LogCaptureFixture) -> None:
    rows = [chat([item("video", "a.mp4") | {"fps": 2}, text("What?")], source="web", split=None)] * 3
    with caplog.at_level(logging.WARNING):
        examples(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "line 1: the key 'source' of an entry is not used" in warnings[0]
    assert "the key 'fps' of a video item is not used" in warnings[1]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (chat([item("video", "a.mp4") | {"start": 1.0, "end": 2.0}, text("?")]), "'start' of a video item"),
        (chat([text("?") | {"video": "a.mp4"}]), "'video' of a text item names media"),
        (chat([item("video", "a.mp4") | {"video": "b.mp4"}, text("?")]), "names several files"),
        ({"messages": [{"role": "user", "content": "?"}, ANSWER | {"weight": 0.5}]}, "'weight' of a message is 0.5"),
        ({"messages": [{"role": "user", "content": "?", "loss": True}, ANSWER]}, "'loss' of a message is not"),
        ({"messages": [{"role": "user", "content": "?"}, ANSWER | {"loss_scale": 2}]}, "'loss_scale' of a message"),
    ],
)
def test_what_would_change_a_sample_is_never_dropped(row: dict[str, Any], cause: str, write: WriteText) -> None:
    with pytest.raises(DatasetError, match=rf"a\.jsonl, line 1: .*{cause}"):
        examples(write("a.jsonl", row))


def test_a_row_trains_as_the_same_messages_do(
    make_video: MakeVideo, make_audio: MakeAudio, make_encoder: MakeEncoder, write: WriteText, tmp_path: Path
) -> None:
    film, beep, picture = str(make_video(audio=True)), str(make_audio()), str(write_picture(tmp_path / "b.jpg"))
    items = [item("video", film), item("audio", film), item("image", picture), item("audio", beep), text("What?")]
    columns = {"videos": [film], "audios": [film, beep], "images": [picture]}
    rows = [chat("<video><audio><image>\n<audio>What?", **columns), chat(items)]
    by_row, by_items = examples(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    encoder = make_encoder(max_txt_len=400)
    ours, theirs = encoder(by_row), encoder(by_items)
    assert (ours.input_ids, ours.labels) == (theirs.input_ids, theirs.labels)
    assert [found.name for found in ours.media] == ["pixel_values", "pixel_values", "audio_values", "audio_values"]
    assert "frames sampled at" in ours.media[0].message


@pytest.mark.parametrize("template", ["vicuna", "llama_v2"])
@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"loss": 0, "weight": 1}])
def test_an_answer_without_weight_is_read_but_not_learnt(
    template: str, mark: dict[str, Any], make_encoder: MakeEncoder, processor: VideoLlamaProcessor, write: WriteText
) -> None:
    asked = {"role": "user", "content": "What?"}
    answers = [{"role": "assistant", "content": f"Answer {number}."} for number in range(3)]
    rows = []
    for marks in ({}, mark):
        messages = [message for answer in answers for message in (asked, dict(answer))]
        messages[3] |= marks
        rows.append({"messages": messages})
    whole, masked = map(make_encoder(template=template), examples(write("a.jsonl", "\n".join(map(json.dumps, rows)))))
    assert whole.input_ids == masked.input_ids
    learnt = [str(processor.tokenizer.decode([x for x in s.labels if x != IGNORE_INDEX])) for s in (whole, masked)]
    assert "Answer 1." in learnt[0]
    assert "Answer 1." not in learnt[1]
    assert all(f"Answer {number}." in learnt[1] for number in (0, 2))
    # What ends the answer is not learnt either.
    ending = {"vicuna": "###", "llama_v2": "</s>"}[template]
    assert [text.count(ending) for text in learnt] == [3, 2]


def test_packed_rows_keep_media_weights_and_literal_tags(
    make_video: MakeVideo, write: WriteText, tmp_path: Path
) -> None:
    rows = [
        chat("<video>What?", videos=[str(make_video())]),
        chat("Is <video> a tag?", tags=False),
        {"messages": [{"role": "user", "content": "A?"}, ANSWER | {"loss": False}, *chat("B?")["messages"]]},
    ]
    packed = examples(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    folder = tmp_path / "shards"
    pack_examples(packed, folder)
    config = DatasetConfig(build_info=BuildInfo(storage=str(folder)))
    again = list(build_examples("shards", config))
    assert [media_kinds(example) for example in again] == [["video"], [], []]
    assert [example.text["messages"] for example in again[1:]] == [example.text["messages"] for example in packed[1:]]


def video_chat(**fields: Any) -> list[dict[str, Any]]:
    return [{"video": "a.mp4", "QA": [{"q": "What?", "a": "A dog."}], **fields}]


def test_an_instruction_of_video_chat_2_precedes_its_question(
    make_video: MakeVideo, make_encoder: MakeEncoder, processor: VideoLlamaProcessor, write: WriteText
) -> None:
    pairs = [{"i": "Reply briefly.", "q": "What?", "a": "A dog."}, {"i": "Describe it.", "q": "", "a": "Brown."}]
    file = write("a.json", video_chat(video=str(make_video()), QA=pairs))
    info = BuildInfo(anno_dir=str(file), videos_dir="/")
    [example] = build_examples("webvid_instruct", DatasetConfig(build_info=info))
    words = str(processor.tokenizer.decode(make_encoder(max_txt_len=200)(example).input_ids))
    assert "seconds. Reply briefly. What?" in " ".join(words.split())
    assert "Human: Describe it." in words


@pytest.mark.parametrize(
    ("part", "numbers", "said"),
    [
        ({"start": 2.0, "end": 4.0}, [20, 30], "sampled at 0.0, 1.0 seconds."),
        ({"end": 4}, [0, 20], "sampled at 0.0, 2.0 seconds."),
        ({"start": 5.0}, [50, 55], "sampled at 0.0, 0.5 seconds."),
        ({"start": None, "end": None}, [0, 30], "sampled at 0.0, 3.0 seconds."),
    ],
)
def test_a_part_that_video_chat_2_names_is_what_is_seen(
    part: dict[str, Any],
    numbers: list[int],
    said: str,
    make_encoder: MakeEncoder,
    processor: VideoLlamaProcessor,
    write: WriteText,
    tmp_path: Path,
) -> None:
    # Sixty numbered frames in six seconds.
    clip = write_clip(tmp_path, ClipSpec("mp4"))
    info = BuildInfo(anno_dir=str(write("a.json", video_chat(video=str(clip), **part))), videos_dir="/")
    [example] = build_examples("webvid_instruct", DatasetConfig(build_info=info))
    # Larger frames than the model's, so that the numbers can be read.
    encode = make_encoder(max_txt_len=200, media=dataclasses.replace(processor.media_processor, image_size=96))
    sample = encode(example)
    frames = sample.media[0].values.permute(0, 2, 3, 1).numpy()
    assert [read_barcode(frame) for frame in frames] == numbers
    assert said in " ".join(str(processor.tokenizer.decode(sample.input_ids)).split())


def test_a_part_that_video_chat_2_names_is_what_is_heard(
    make_encoder: MakeEncoder, write: WriteText, tmp_path: Path
) -> None:
    # Silent but for a beep at 4.3 seconds.
    clip = write_clip(tmp_path, ClipSpec("mp4"))
    loudest = []
    for start, end in ((1.0, 3.0), (4.0, 5.0), (5.0, None)):
        file = write("a.json", video_chat(video=str(clip), start=start, end=end))
        settings = DatasetConfig(data_type="audio", build_info=BuildInfo(anno_dir=str(file), videos_dir="/"))
        [example] = build_examples("webvid_instruct", settings)
        loudest.append(float(make_encoder(max_txt_len=200)(example).media[0].values.max()))
    assert loudest[1] > loudest[0] + 0.5
    assert loudest[1] > loudest[2] + 0.5


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"start": 2.0, "end": 2.0}, "no time between 'start' 2.0 and 'end' 2.0"),
        ({"start": -1}, "'start' is -1, not a number of seconds"),
        ({"end": "00:03"}, "'end' is '00:03', not a number of seconds"),
        ({"start": float("nan")}, "'start' is nan"),
        ({"start_time": 1.0}, "entry 0: 'start_time' of an entry"),
        ({"audio": "a.wav"}, "'audio' of an entry names"),
    ],
)
def test_other_keys_of_video_chat_2_are_refused(fields: dict[str, Any], cause: str, write: WriteText) -> None:
    info = BuildInfo(anno_dir=str(write("a.json", video_chat(**fields))), videos_dir="/")
    with pytest.raises(DatasetError, match=cause):
        build_examples("webvid_instruct", DatasetConfig(build_info=info))


def test_a_part_behind_the_end_is_a_bad_sample_and_is_not_packed_or_evaluated(
    make_encoder: MakeEncoder, write: WriteText, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path, ClipSpec("mp4"))
    file = write("a.json", video_chat(video=str(clip), start=9.0))
    [example] = build_examples("webvid_instruct", DatasetConfig(build_info=BuildInfo(str(file), videos_dir="/")))
    with pytest.raises(MediaError, match=r"the video ends after 6\.00 seconds, before 9\.0 seconds"):
        make_encoder(max_txt_len=200)(example)
    with pytest.raises(DatasetError, match=r"a part of .*cut the clip before"):
        pack_examples([example], tmp_path / "shards")
    with pytest.raises(ConfigError, match="only whole files are evaluated"):
        load_captions("webvid_instruct", file, tmp_path, data_type="video")


@pytest.mark.parametrize("speaker", [[], {}, None, 3, "x" * 10_000, "a\nb"])
def test_a_speaker_of_any_kind_is_refused_in_one_line(speaker: Any) -> None:
    with pytest.raises(DatasetError, match="'from' must be") as caught:
        read_row({"conversations": [{"from": speaker, "value": "?"}]}, "rows.json, entry 0", KeyCheck())
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
