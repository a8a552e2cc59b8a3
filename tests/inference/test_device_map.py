"""A model that accelerate spreads over devices, or brings in from elsewhere layer by layer, answers as a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.helpers.tiny_model import make_tiny_config
from video_llama.checkpoints.memory import build_skeleton
from video_llama.errors import ConfigError
from video_llama.inference.chat import Chat
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import load_pretrained_model
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

pytestmark = pytest.mark.slow

BY_PARTS = {
    "video_branch": 1,
    "audio_branch": 2,
    "language_model.model.embed_tokens": 0,
    "language_model.model.rotary_emb": 0,
    "language_model.model.layers.0": 0,
    "language_model.model.layers.1": 3,
    "language_model.model.norm": 3,
    "language_model.lm_head": 3,
}
WITHIN_BRANCHES = {
    **BY_PARTS,
    "video_branch.vision_norm": 2,
    "video_branch.qformer": 3,
    "video_branch.frame_position_embedding": 2,
    "video_branch.video_qformer": 0,
    "video_branch.projection": 3,
    "audio_branch.audio_encoder": 1,
    "audio_branch.segment_position_embedding": 0,
    "audio_branch.audio_qformer": 3,
    "audio_branch.projection": 1,
}


@pytest.fixture
def skeleton() -> VideoLlamaForConditionalGeneration:
    return build_skeleton(make_tiny_config(num_audio_query_tokens=5)).eval()


@pytest.fixture
def _pretended(skeleton: VideoLlamaForConditionalGeneration) -> Iterator[None]:
    """GPUs that only know which tensor lies where, and refuse to compute with those of two."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def spread(model: VideoLlamaForConditionalGeneration, device_map: dict[str, int]) -> None:
    """Place parts as `dispatch_model` of accelerate does; it asks for real devices."""
    skipped = model._skip_keys_device_placement
    for name, index in device_map.items():
        device = torch.device("cuda", index)
        for module in model.get_submodule(name).modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                module._parameters[key] = nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False)
            for key, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[key] = torch.empty_like(buffer, device=device)
    for name, index in device_map.items():
        hook = AlignDevicesHook(execution_device=torch.device("cuda", index), skip_keys=skipped)
        add_hook_to_module(model.get_submodule(name), hook)
    whole = AlignDevicesHook(execution_device=torch.device("cuda", 0), io_same_device=True, skip_keys=skipped)
    add_hook_to_module(model, whole)


def numbers(*size: int) -> Tensor:
    return torch.ones(size, device="cuda:0")


@pytest.mark.parametrize("device_map", [BY_PARTS, WITHIN_BRANCHES], ids=["by parts", "within branches"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures("_pretended")
def test_parts_on_several_devices_meet_on_one(
    monkeypatch: pytest.MonkeyPatch,
    skeleton: VideoLlamaForConditionalGeneration,
    device_map: dict[str, int],
    padded: bool,
) -> None:
    config = skeleton.config
    spread(skeleton, device_map)
    # Values are unknown there: where the placeholders are is told, and masks keep all.
    places = (torch.arange(2 * config.num_video_query_tokens), torch.arange(2 * config.num_audio_query_tokens))
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [3] * len(counts))
    ids = torch.ones(2, 20, dtype=torch.long, device="cuda:0")
    mask = torch.ones(2, 3, dtype=torch.bool, device="cuda:0") if padded else None
    frames = {"pixel_values": numbers(2, 3, 3, 28, 28)}
    if padded:  # which frames are to be encoded depends on values
        frames = {"frame_tokens": numbers(2, 3, config.num_query_tokens, config.qformer_config.hidden_size)}
    output = skeleton(
        ids,
        **frames,
        frame_mask=mask,
        audio_values=numbers(2, 3, 1, 32, 36),
        segment_mask=mask,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        placeholders=places,
    )
    assert output.logits.device == torch.device("cuda:0")  # the whole model returns where its inputs were


@pytest.fixture(scope="module")
def media() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 56, 56, generator=generator), torch.randn(2, 1, 128, 204, generator=generator)


def answers(model: VideoLlama, media: tuple[Tensor, Tensor]) -> list[str]:
    """In every way to ask."""
    imgs, audio = media
    together = model.caption([imgs, imgs[:1], audio], batch_size=3, max_new_tokens=6)
    return [model.generate(imgs, audio, max_new_tokens=6), *together]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, media: tuple[Tensor, Tensor]) -> list[str]:
    return answers(load_pretrained_model(tiny_checkpoint, device="cpu", half=False), media)


@pytest.mark.parametrize(
    "device_map",
    [
        {"video_branch": "cpu", "audio_branch": "cpu", "language_model": "disk"},
        {"video_branch": "disk", "audio_branch": "disk", "language_model": "cpu"},
    ],
    ids=["language model", "branches"],
)
def test_parts_that_stay_on_disk_are_brought_in(
    tiny_checkpoint: Path, device_map: dict[str, str], media: tuple[Tensor, Tensor], expected: list[str]
) -> None:
    model = load_pretrained_model(tiny_checkpoint, half=False, device_map=device_map)
    assert any(weight.is_meta for weight in model.model.parameters())
    assert answers(model, media) == expected


def test_files_that_cannot_be_read_in_pieces_do_not_stay_on_disk(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"as only a folder in transformers' layout allows: convert the checkpoint"):
        load_pretrained_model(checkpoints["original"], device_map={"": "cpu", "language_model": "disk"})


def test_a_conversation_with_offloaded_weights_is_that_with_weights_in_place(
    tiny_checkpoint: Path, media: tuple[Tensor, Tensor], expected: list[str]
) -> None:
    model = load_pretrained_model(tiny_checkpoint, device="cpu", half=False)
    cpu_offload(model.model, execution_device=torch.device("cpu"))
    assert model.device == torch.device("cpu")
    assert answers(model, media) == expected
    chats = [Chat(model), Chat(model)]
    for chat in chats:
        chat.ask("What is it?")
    assert chats[0].answer(max_new_tokens=6) == "".join(chats[1].stream_answer(max_new_tokens=6))
