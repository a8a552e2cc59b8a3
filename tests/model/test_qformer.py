"""Encoders take many frames in parts: the same result, never more memory than one part needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny_model import frames, sound
from video_llama.model.encoder_graph import CHUNK_SIZE, encode_in_chunks
from video_llama.model.frozen import as_frozen
from video_llama.model.qformer import position_rows
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def record_batches(encoder: nn.Module, seen: list[int]) -> Callable[[], None]:
    return encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]))).remove


@pytest.mark.parametrize(("number", "parts"), [(8, [8]), (32, [32]), (70, [32, 32, 6])])
def test_frames_go_through_the_encoder_in_parts_with_the_features_of_all_at_once(
    tiny_model: VideoLlamaForConditionalGeneration, number: int, parts: list[int]
) -> None:
    assert CHUNK_SIZE == 32
    clip, branch = frames(1, number), tiny_model.video_branch
    seen: list[int] = []
    remove = record_batches(branch.vision_encoder, seen)
    with torch.no_grad():
        features = branch.encode_frames(clip)
        assert seen == parts
        seen.clear()
        tiny_model.set_chunk_size(None)
        expected = branch.encode_frames(clip)
        assert seen == [number]
    remove()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)


def test_padding_frames_are_in_no_part(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    clips, mask = frames(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 3:] = False
    seen: list[int] = []
    record_batches(tiny_model.video_branch.vision_encoder, seen)
    tokens = tiny_model.video_branch.encode_frames(clips, mask)
    assert seen == [23]
    tiny_model.set_chunk_size(10)
    in_parts = tiny_model.video_branch.encode_frames(clips, mask)
    assert seen == [23, 10, 10, 3]
    torch.testing.assert_close(in_parts, tokens, rtol=1e-4, atol=1e-6)
    assert not in_parts[1, 3:].any()


def test_segments_of_sound_go_through_the_encoder_in_parts_too(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    branch = tiny_model.audio_branch
    assert branch is not None
    noise, seen = sound(2, 20), list[int]()
    record_batches(branch.audio_encoder, seen)
    vectors = branch.encode_segments(noise)
    assert (vectors.shape[:2], seen) == ((2, 20), [32, 8])
    tiny_model.set_chunk_size(None)
    torch.testing.assert_close(vectors, branch.encode_segments(noise), rtol=1e-4, atol=1e-6)
    assert seen == [32, 8, 40]


def test_a_part_is_never_empty() -> None:
    sizes: list[int] = []

    def encode(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part * 2

    items = torch.arange(6.0)
    assert torch.equal(encode_in_chunks(encode, items, 3), items * 2)
    assert encode_in_chunks(encode, torch.empty(0, 3), 3).shape == (0, 3)
    assert sizes == [3, 3, 0]


@pytest.mark.parametrize("kind", ["video", "sound"])
def test_frozen_encoders_compute_in_their_own_precision_under_autocast(
    tiny_model: VideoLlamaForConditionalGeneration, kind: str
) -> None:
    audio = tiny_model.audio_branch
    assert audio is not None
    tiny_model.requires_grad_(False)
    encode, values = (
        (tiny_model.video_branch.encode_frames, frames(1, 2))
        if kind == "video"
        else (audio.encode_segments, sound(1, 2))
    )
    expected = encode(values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(values), expected)
        assert encode(values).dtype == torch.float32
        tiny_model.requires_grad_(True)
        assert not torch.equal(encode(values), expected)  # what trains runs as autocast wants it


def test_autocast_is_on_again_after_a_frozen_encoder() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), as_frozen("cpu", frozen):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        with as_frozen("cpu", frozen):
            pass
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("length", [33, 64, 100])
def test_stretched_positions_are_the_same_where_algorithms_must_be_deterministic(length: int) -> None:
    table = nn.Embedding.from_pretrained(torch.randn(32, 24), freeze=False)
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            rows = position_rows(table, length)
            (gradient,) = torch.autograd.grad(rows.square().sum(), table.weight)
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((rows, gradient))
    torch.testing.assert_close(results[0], results[1])
