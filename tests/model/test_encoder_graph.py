"""Encoders as graphs: the same features as without, and none where something could have changed behind a graph's back.

A graph is stood for by running the same function on the same buffers again; tests/gpu has real ones.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny_model import frames, sound
from video_llama.model import encoder_graph
from video_llama.model.encoder_graph import MOST, SIZES, EncoderGraphs, split
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

RECORDED: list[int] = []
REPLAYED: list[int] = []


class Repeating:
    """Repeats a pass by running it again, into the same result."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, encode: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Callable[[], None], Tensor]:
        RECORDED.append(len(values))
        output = encode(values).clone().fill_(torch.nan)

        @torch.inference_mode(False)
        @torch.no_grad()
        def replay() -> None:
            REPLAYED.append(len(values))
            output.copy_(encode(values))

        return replay, output

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoder_graph.RECORDERS, "cpu", Repeating)
    RECORDED.clear()
    REPLAYED.clear()


@pytest.fixture
def model(tiny_model: VideoLlamaForConditionalGeneration) -> Iterator[VideoLlamaForConditionalGeneration]:
    with torch.no_grad():
        yield tiny_model.eval()


def without_graphs(
    model: VideoLlamaForConditionalGeneration, encode: Callable[[Tensor], Tensor], values: Any
) -> Tensor:
    model.set_chunk_size(1000)
    result = encode(values)
    model.set_chunk_size("auto")
    return result


@pytest.mark.parametrize("number", range(MOST + 1))
def test_parts_take_all_items_and_only_the_last_has_room_left(number: int) -> None:
    sizes = split(number)
    assert set(sizes) <= set(SIZES)
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes[:-1]) < number <= sum(sizes) if number else sizes == []
    assert sum(sizes) <= number + 5


@pytest.mark.parametrize(
    ("number", "sizes"), [(1, [1]), (2, [1, 1]), (5, [8]), (8, [8]), (9, [8, 1]), (15, [8, 8]), (16, []), (70, [])]
)
def test_frames_have_the_features_that_they_have_without_graphs(
    model: VideoLlamaForConditionalGeneration, number: int, sizes: list[int]
) -> None:
    clip, encode = frames(1, number), model.video_branch.encode_frames
    expected = without_graphs(model, encode, clip)
    for _ in range(2):
        REPLAYED.clear()
        torch.testing.assert_close(encode(clip), expected, rtol=1e-4, atol=1e-6)
        assert sizes == REPLAYED
    assert sorted(RECORDED) == sorted(set(sizes))  # once each


def test_segments_and_pictures_for_the_ear_go_through_graphs_of_their_own(
    model: VideoLlamaForConditionalGeneration,
) -> None:
    branch = model.audio_branch
    assert branch is not None
    noise = sound(2, 3)
    expected = without_graphs(model, branch.encode_segments, noise)
    torch.testing.assert_close(branch.encode_segments(noise), expected, rtol=1e-4, atol=1e-6)
    assert REPLAYED == [8]
    assert branch.encode_segments(noise).shape == expected.shape


def test_bytes_and_floats_share_a_graph(model: VideoLlamaForConditionalGeneration) -> None:
    side = model.config.vision_config.image_size
    bytes_ = torch.randint(0, 256, (1, 5, 3, side, side), dtype=torch.uint8)
    encode = model.video_branch.encode_frames
    encode(frames(1, 6))
    torch.testing.assert_close(encode(bytes_), without_graphs(model, encode, bytes_), rtol=1e-4, atol=1e-6)
    assert (RECORDED, REPLAYED) == ([8], [8, 8])


def test_a_result_is_not_overwritten_by_the_next_one_nor_does_it_depend_on_the_last(
    model: VideoLlamaForConditionalGeneration,
) -> None:
    encode = model.video_branch.encode_frames
    first, second = frames(1, 5), frames(1, 8) + 1
    kept = encode(first)
    before = kept.clone()
    encode(second)
    assert torch.equal(kept, before)
    assert torch.equal(encode(first), before)


def test_graphs_serve_callers_in_inference_mode_and_those_that_go_on_with_gradients(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    branch = tiny_model.eval().requires_grad_(False).video_branch
    branch.projection.requires_grad_(True)
    clip = frames(1, 8)
    with torch.inference_mode():
        expected = branch(clip)
        assert expected.is_inference()
    tokens = branch.encode_frames(clip)
    assert not tokens.is_inference()
    branch(clip).square().sum().backward()
    assert branch.projection.weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(branch(clip), expected)
    assert (RECORDED, REPLAYED) == ([8], [8] * 4)


def test_two_threads_get_their_own_features(model: VideoLlamaForConditionalGeneration) -> None:
    clips = [frames(1, 5), frames(1, 7) - 1]
    encode = model.video_branch.encode_frames
    expected = [encode(clip) for clip in clips]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.inference_mode():
            wrong.extend(number for _ in range(20) if not torch.equal(encode(clips[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(REPLAYED) == 42


def move(model: VideoLlamaForConditionalGeneration) -> None:
    weight = model.video_branch.vision_encoder.blocks[-1].mlp.fc2.weight
    weight.data = weight.data * 2


def move_queries(model: VideoLlamaForConditionalGeneration) -> None:
    queries = model.video_branch.query_tokens
    queries.data = torch.randn_like(queries)


def convert(model: VideoLlamaForConditionalGeneration) -> None:
    model.double()


@pytest.mark.parametrize("change", [move, move_queries, convert])
def test_weights_that_have_moved_get_new_graphs(
    model: VideoLlamaForConditionalGeneration, change: Callable[[VideoLlamaForConditionalGeneration], None]
) -> None:
    encode, clip = model.video_branch.encode_frames, frames(1, 8)
    before = encode(clip)
    change(model)
    after = encode(clip)
    assert RECORDED == [8, 8]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, without_graphs(model, encode, clip), rtol=1e-4, atol=1e-6)


def test_weights_that_changed_where_they_lie_are_seen(model: VideoLlamaForConditionalGeneration) -> None:
    encode, clip = model.video_branch.encode_frames, frames(1, 8)
    encode(clip)
    model.video_branch.query_tokens.normal_()
    torch.testing.assert_close(encode(clip), without_graphs(model, encode, clip), rtol=1e-4, atol=1e-6)
    assert RECORDED == [8]


class Adapted(nn.Linear):
    """Stands for an adapter or a quantised layer: a class of another package."""


class Quantised(nn.Parameter):
    pass


def in_training_mode(model: VideoLlamaForConditionalGeneration) -> None:
    model.video_branch.vision_encoder.blocks[0].train()


def with_a_hook(model: VideoLlamaForConditionalGeneration) -> None:
    model.video_branch.qformer.register_forward_hook(lambda *_: None)


def with_another_forward(model: VideoLlamaForConditionalGeneration) -> None:
    norm = model.video_branch.vision_norm
    norm.forward = norm.forward  # type: ignore[method-assign]


def with_an_adapter(model: VideoLlamaForConditionalGeneration) -> None:
    model.video_branch.vision_encoder.blocks[0].mlp.fc1.__class__ = Adapted


def with_quantised_weights(model: VideoLlamaForConditionalGeneration) -> None:
    layer = model.video_branch.vision_encoder.blocks[0].mlp.fc1
    layer.weight = Quantised(layer.weight.detach(), requires_grad=False)


def compiled(model: VideoLlamaForConditionalGeneration) -> None:
    model.video_branch.vision_encoder.compile(backend="eager")


def in_parts_of_a_given_size(model: VideoLlamaForConditionalGeneration) -> None:
    model.set_chunk_size(64)


def shared_out(model: VideoLlamaForConditionalGeneration) -> None:
    model.set_chunk_size(None)


@pytest.mark.parametrize(
    "change",
    [
        in_training_mode,
        with_a_hook,
        with_another_forward,
        with_an_adapter,
        with_quantised_weights,
        compiled,
        in_parts_of_a_given_size,
        shared_out,
    ],
)
def test_encoders_that_are_more_than_their_weights_run_as_they_are(
    model: VideoLlamaForConditionalGeneration, change: Callable[[VideoLlamaForConditionalGeneration], None]
) -> None:
    change(model)
    assert model.video_branch.encode_frames(frames(1, 2)).isfinite().all()
    assert RECORDED == []


def test_encoders_that_train_or_run_under_autocast_have_no_graphs(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    branch = tiny_model.eval().requires_grad_(True).video_branch
    assert branch.encode_frames(frames(1, 2)).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        branch.encode_frames(frames(1, 2))
    assert RECORDED == []
    with torch.no_grad():
        branch.encode_frames(frames(1, 2))
    assert RECORDED == [1]


def test_without_memory_for_graphs_encoders_run_without_and_say_so_once(
    model: VideoLlamaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(self: Repeating, encode: Callable[[Tensor], Tensor], values: Tensor) -> Any:
        RECORDED.append(len(values))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    encode, clip = model.video_branch.encode_frames, frames(1, 9)
    encode(clip[:, :8])
    monkeypatch.setattr(Repeating, "record", record)
    expected = without_graphs(model, encode, clip)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(encode(clip), expected, rtol=1e-4, atol=1e-6)
    assert RECORDED == [8, 1]
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "cpu has no memory for the CUDA graphs of an encoder"
    ]


def test_other_errors_of_an_encoder_are_those_that_it_raises() -> None:
    def encode(part: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        EncoderGraphs().run(encode, torch.zeros(2, 3), "auto", nn.Linear(3, 3).eval())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_makes_its_own_graphs(
    model: VideoLlamaForConditionalGeneration, duplicate: Callable[[Any], Any]
) -> None:
    clip = frames(1, 8)
    expected = model.video_branch.encode_frames(clip)
    assert torch.equal(duplicate(model.video_branch).encode_frames(clip), expected)
    assert RECORDED == [8, 8]
