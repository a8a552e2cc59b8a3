"""Batches: bad samples replaced and reported, the same from any number of workers and from any place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeAudio, MakeVideo
from tests.data_pipeline.conftest import MakeEncoder, captioned, write_picture
from video_llama.constants import IGNORE_INDEX
from video_llama.data.batches import (
    MAX_REPLACEMENTS,
    BadSample,
    Batch,
    BatchReader,
    DataCollator,
    gather_media,
    load_batches,
)
from video_llama.data.examples import Example
from video_llama.data.mixture import MixtureBatchSampler
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.errors import DatasetError, MediaError

PAD_ID = 0
PROMPTS = [f"<ImageHere> {number} " for number in range(50)]


@dataclasses.dataclass
class FakeEncoder:
    """Makes of example N a sample of N + 1 tokens, and fails on those it is told to."""

    unreadable: Sequence[int] = ()
    error: Exception = dataclasses.field(default_factory=lambda: MediaError("file.mp4", "damaged"))

    def __call__(self, example: Example) -> ProcessedSample:
        number = int(example.id)
        if number in self.unreadable:
            raise self.error
        drawn = int(torch.randint(1000, ()))
        return ProcessedSample(example.id, [drawn] * (number + 1), [IGNORE_INDEX] * number + [drawn], [])


def make_reader(encoder: Any = None, size: int = 20, examples: Any = None, **settings: Any) -> BatchReader:
    table = examples or [captioned(Path("x.jpg"), id_=str(number)) for number in range(size)]
    settings = {"batch_size": 4, "num_batches": 10, "seed": 3, **settings}
    return BatchReader(
        [table], [encoder or FakeEncoder()], MixtureBatchSampler([len(table)], [1.0], **settings), PAD_ID
    )


def contents(batches: Sequence[Batch]) -> list[Any]:
    return [
        (batch.number, batch.ids, batch.failures, {key: value.tolist() for key, value in batch.text.items()},
         [item.values.tolist() for item in batch.media])
        for batch in batches
    ]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> list[Example]:
    """Twelve readable pictures and two that are not."""
    examples = []
    for number in range(14):
        path = write_picture(tmp_path / f"{number}.jpg", (number * 15, 90, 30))
        if number in (4, 9):
            path.write_bytes(b"no picture")
        examples.append(captioned(path, "a dog " * (number % 3 + 1), id_=str(number)))
    return examples


def test_padding_is_on_the_right_hidden_and_without_loss() -> None:
    samples = [ProcessedSample("a", [5, 6, 7], [-100, 6, 7], []), ProcessedSample("b", [8], [8], [])]
    batch = DataCollator(9)(samples, 7, [BadSample("c", "broken")])
    assert (batch.number, batch.ids, batch.failures) == (7, ["a", "b"], [BadSample("c", "broken")])
    assert {name: tensor.tolist() for name, tensor in batch.text.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.text.values()} == {torch.int64}
    assert batch.num_label_tokens == 2  # none is predicted from nothing


def item(name: Any, *shape: int, value: float = 1.0, is_encoded: bool = False) -> MediaInput:
    return MediaInput(name, torch.full(shape, value), is_encoded=is_encoded)


def test_media_are_padded_with_a_mask_by_kind_and_in_order() -> None:
    media = [
        item("pixel_values", 1, 3, 4, 4),
        item("audio_values", 2, 1, 8, 8),
        item("pixel_values", 3, 3, 4, 4, value=2.0),
        item("audio_values", 2, 1, 8, 8),
    ]
    inputs = gather_media(media)
    assert sorted(inputs) == ["audio_values", "frame_mask", "pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 3, 4, 4)
    assert inputs["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 0, 0], [2, 2, 2]]
    assert inputs["frame_mask"].tolist() == [[True, False, False], [True] * 3]
    assert inputs["audio_values"].shape == (2, 2, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "shape", "expected", "mask"),
    [
        ("pixel_values", (5, 8), "frame_tokens", "frame_mask"),
        ("audio_values", (8,), "segment_vectors", "segment_mask"),
        ("audio_pixel_values", (8,), "segment_vectors", "segment_mask"),
    ],
)
def test_encoded_media_go_in_behind_the_encoders(name: str, shape: tuple[int, ...], expected: str, mask: str) -> None:
    inputs = gather_media([item(name, length, *shape, is_encoded=True) for length in (2, 3)])
    assert inputs[expected].shape == (2, 3, *shape)
    assert inputs[mask].tolist() == [[True, True, False], [True, True, True]]


def test_pictures_for_the_ear_have_a_mask_of_segments() -> None:
    inputs = gather_media([item("audio_pixel_values", length, 3, 4, 4) for length in (1, 2)])
    assert sorted(inputs) == ["audio_pixel_values", "segment_mask"]


def test_all_tensors_of_a_batch_are_pinned_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = DataCollator(PAD_ID)([ProcessedSample("a", [1, 2], [-100, 2], [item("pixel_values", 2, 3, 4, 4)])], 3)
    result = batch.pin_memory()
    assert {id(tensor) for tensor in pinned} == {id(t) for t in (*batch.text.values(), batch.media[0].values)}
    assert (result.number, result.ids, result.media[0].name) == (3, ["a"], "pixel_values")
    assert all(torch.equal(result.text[name], tensor) for name, tensor in batch.text.items())
    assert torch.equal(result.media[0].values, batch.media[0].values)


def test_tokens_are_counted_with_and_without_padding() -> None:
    batch = DataCollator(PAD_ID)(
        [ProcessedSample("a", [1, 2, 3], [-100, 2, 3], []), ProcessedSample("b", [1], [1], [])]
    )
    assert (batch.num_text_tokens, batch.num_positions) == (4, 6)


def test_a_batch_without_media_is_text_alone() -> None:
    assert sorted(make_reader()[0].model_inputs("cpu")) == ["attention_mask", "input_ids", "labels"]


def test_a_bad_sample_is_replaced_reported_and_the_same_at_every_run() -> None:
    plan = make_reader()
    ids = plan[0].ids
    bad = int(ids[1])
    reader = make_reader(FakeEncoder([bad]))
    batch = reader[0]
    assert batch.failures == [BadSample(str(bad), "file.mp4: damaged")]
    assert [batch.ids[place] for place in (0, 2, 3)] == [ids[place] for place in (0, 2, 3)]
    assert batch.ids[1] != str(bad)
    assert contents([reader[0]]) == contents([make_reader(FakeEncoder([bad]))[0]]) == contents([batch])


def test_a_bad_replacement_is_replaced_and_reported_as_well() -> None:
    good = 7
    reader = make_reader(FakeEncoder([number for number in range(8) if number != good]), size=8, batch_size=1)
    batches = [reader[number] for number in range(10)]
    assert {batch.ids[0] for batch in batches} == {str(good)}
    assert max(len(batch.failures) for batch in batches) > 1


@pytest.mark.parametrize("error", [MediaError("a.mp4", "damaged"), DatasetError("nothing to learn")])
def test_errors_of_data_are_bad_samples(error: Exception) -> None:
    reader = make_reader(FakeEncoder([0, 1], error))
    failures = [failure for number in range(10) for failure in reader[number].failures]
    assert {failure.id for failure in failures} <= {"0", "1"}
    assert {failure.reason for failure in failures} == {str(error)}


@pytest.mark.parametrize("error", [KeyError("caption"), ValueError("shape"), RuntimeError("memory"), OSError("disk")])
def test_a_mistake_in_a_program_is_no_bad_sample(error: Exception) -> None:
    reader = make_reader(FakeEncoder(range(20), error))
    with pytest.raises(type(error)):
        reader[0]


def test_a_mistake_in_a_program_stops_workers_too() -> None:
    reader = make_reader(FakeEncoder(range(20), ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError, match="oops"):
        list(load_batches(reader, range(2), num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_gives_up_after_too_many_bad_samples_in_a_row_and_tells_them_all(num_workers: int) -> None:
    (batch,) = load_batches(make_reader(FakeEncoder(range(20))), range(1), num_workers)
    assert re.fullmatch(rf"{MAX_REPLACEMENTS} samples in a row .* \d+: file\.mp4: damaged", batch.gave_up)
    assert len(batch.failures) == MAX_REPLACEMENTS
    assert (batch.ids, batch.num_label_tokens) == ([], 0)


def test_reading_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_reader()[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_random_about_a_sample_does_not_depend_on_what_was_read_before() -> None:
    forwards, backwards = make_reader(), make_reader()
    expected = [forwards[number] for number in range(10)]
    torch.manual_seed(99)
    read = [backwards[number] for number in reversed(range(10))][::-1]
    assert contents(read) == contents(expected)
    drawn = {ids[0] for batch in expected for ids in batch.text["input_ids"].tolist()}
    assert len(drawn) > 30


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_batches_that_one_process_reads(
    num_workers: int, pictures: list[Example], make_encoder: MakeEncoder
) -> None:
    reader = make_reader(make_encoder(prompts=PROMPTS), examples=pictures)
    alone = contents(list(load_batches(reader, range(6), num_workers=0)))
    assert contents(list(load_batches(reader, range(6), num_workers=num_workers))) == alone
    assert [number for number, *_ in alone] == list(range(6))
    assert any(failures for _, _, failures, *_ in alone)


def test_starting_in_the_middle_gives_the_same_batches(pictures: list[Example], make_encoder: MakeEncoder) -> None:
    whole = list(load_batches(make_reader(make_encoder(prompts=PROMPTS), examples=pictures), range(10), 0))
    rest = list(load_batches(make_reader(make_encoder(prompts=PROMPTS), examples=pictures), range(6, 10), 1))
    assert contents(rest) == contents(whole[6:])


def test_videos_pictures_and_sounds_make_one_batch_of_the_right_tensors(
    make_video: MakeVideo, make_audio: MakeAudio, picture: Path, make_encoder: MakeEncoder
) -> None:
    encoder = make_encoder(max_txt_len=200)
    examples = [captioned(make_video(), kind="video"), captioned(picture), captioned(make_audio(), kind="audio")]
    batch = DataCollator(PAD_ID)([encoder(example) for example in examples])
    inputs: dict[str, Tensor] = batch.model_inputs("cpu")
    assert inputs["pixel_values"].shape == (2, 2, 3, 28, 28)
    assert inputs["frame_mask"].tolist() == [[True, True], [True, False]]
    assert inputs["audio_values"].shape[0] == 1


def test_silent_clips_are_left_out_or_bad(make_video: MakeVideo, make_encoder: MakeEncoder) -> None:
    heard, silent = make_video("heard.mp4", audio=True), make_video("silent.mp4")
    examples = [captioned(path, "a dog", "audio", path.stem) for path in (heard, silent)]
    bad = [make_reader(make_encoder(), examples=examples)[number] for number in range(3)]
    assert {failure.id for batch in bad for failure in batch.failures} == {"silent"}
    reader = make_reader(make_encoder(skip_silent=True), examples=examples)
    batches = [reader[number] for number in range(3)]
    # The same samples stand in for them, and nothing counts as bad.
    assert [batch.ids for batch in batches] == [batch.ids for batch in bad]
    assert {name for batch in batches for name in batch.ids} == {"heard"}
    assert not any(batch.failures for batch in batches)
    # A file that cannot be read is bad all the same, and silence alone ends a run.
    broken = captioned(silent.with_name("absent.mp4"), "a dog", "audio", "absent")
    [failure, *_] = make_reader(make_encoder(skip_silent=True), examples=[broken])[0].failures
    assert failure.id == "absent"
    alone = make_reader(make_encoder(skip_silent=True), examples=examples[1:])[0]
    assert (alone.failures, "silent" in alone.gave_up) == ([], True)
