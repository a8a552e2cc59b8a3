"""Features are kept by content, and no longer than the weights that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import load_checkpoint
from video_llama.inference.cache import MediaCache, content_key
from video_llama.inference.engine import VideoLlama


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> VideoLlama:
    return load_checkpoint(checkpoints["hf"], device="cpu", dtype="float32")


BRANCH = torch.nn.Linear(1, 1)


def count_encoded(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    encode = model.model.get_video_features
    monkeypatch.setattr(
        model.model, "get_video_features", lambda values: (shapes.append(tuple(values.shape)), encode(values))[1]
    )
    return shapes


def test_the_same_content_is_encoded_once(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(model, monkeypatch)
    size = model.model.config.vision_config.image_size
    pixels = torch.rand(2, 3, size, size)
    first, again = model.encode(pixels), model.encode(pixels.clone())
    assert len(encoded) == 1
    assert torch.equal(first.features, again.features)
    assert first is not again  # two uploads of a file are two items in a prompt
    pixels[0, 0, 0, 0] += 1e-6
    model.encode(pixels)
    assert len(encoded) == 2


def test_features_of_other_weights_do_not_count(model: VideoLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(model, monkeypatch)
    size = model.model.config.vision_config.image_size
    pixels = torch.rand(2, 3, size, size)
    model.encode(pixels)
    with torch.no_grad():
        model.model.video_branch.projection.bias.add_(1.0)
    changed = model.encode(pixels).features
    assert len(encoded) == 2
    assert torch.equal(changed, model.model.get_video_features(pixels[None])[0])
    model.media_cache.clear()
    model.encode(pixels)
    assert len(encoded) == 4


def test_what_was_asked_for_longest_ago_is_forgotten_first() -> None:
    cache, computed = MediaCache(max_items=2), []

    def ask(number: int) -> None:
        cache.get(torch.tensor([number]), BRANCH, lambda: (computed.append(number), torch.tensor([number]))[1])

    for number in (1, 2, 1, 3, 1, 2):
        ask(number)
    assert computed == [1, 2, 3, 2]


def test_none_is_kept_unless_asked_for() -> None:
    cache, computed = MediaCache(), []
    for _ in range(2):
        cache.get(torch.zeros(1), BRANCH, lambda: (computed.append(1), torch.zeros(1))[1])
    assert computed == [1, 1]


def test_shape_and_type_belong_to_the_content() -> None:
    values = torch.zeros(2, 6)
    keys = {content_key(item) for item in (values, values.view(3, 4), values.int(), values.to(torch.bfloat16))}
    assert len(keys) == 4
    assert content_key(values.T.contiguous().T) == content_key(values)
