"""The packed frame encoder: the values of timm's, its names, and a clear word where it cannot be used."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from video_llama.model import eva_block
from video_llama.model.configuration import VideoLlamaConfig, VideoLlamaVisionConfig
from video_llama.model.eva_vit import EvaVit, build_eva_vit
from video_llama.model.media_cache import MediaCache
from video_llama.model.packed_block import PackedBlock, all_weights
from video_llama.model.video_branch import VideoBranch

# Heads are 40 wide, which is filled up; the MLP's hidden features are computed in two parts.
SIZES = {"hidden_size": 320, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 2}


def make_encoder(image_size: int = 56, **changes: int) -> EvaVit:
    """A frozen encoder in bfloat16 with random weights; images of 56 pixels have 17 tokens."""
    torch.manual_seed(0)
    encoder = build_eva_vit(VideoLlamaVisionConfig(image_size=image_size, **{**SIZES, **changes})).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.04)
    return encoder.requires_grad_(False).to(torch.bfloat16)


def make_images(number: int, image_size: int = 56) -> Tensor:
    return torch.randn(number, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def restored_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


needs_amx = pytest.mark.skipif(eva_block.why_not() is not None, reason=str(eva_block.why_not()))


def relative_error(states: Tensor, expected: Tensor) -> float:
    return float((states.float() - expected.float()).norm() / expected.float().norm())


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_it_computes_what_the_exact_weights_give_as_nearly_as_before(number: int, threads: int) -> None:
    torch.set_num_threads(threads)
    encoder, images = make_encoder(), make_images(number)
    with torch.inference_mode():
        exact = copy.deepcopy(encoder).float()(images.bfloat16().float())
        before = encoder(images.bfloat16())
        assert encoder.pack()
        after = encoder(images.bfloat16())
    assert after.shape == before.shape
    assert after.dtype == torch.bfloat16
    assert relative_error(after, exact) < 1.1 * relative_error(before, exact)
    assert all(relative_error(after[i], exact[i]) < 0.02 for i in range(number))


@needs_amx
@pytest.mark.parametrize("image_size", [28, 42, 70])  # 5, 10 and 26 tokens
def test_spare_rows_are_not_looked_at_whatever_the_number_of_tokens(image_size: int) -> None:
    encoder, images = make_encoder(image_size), make_images(2, image_size).bfloat16()
    with torch.inference_mode():
        before = encoder(images)
        encoder.pack()
        assert relative_error(encoder(images), before) < 0.01


@needs_amx
def test_a_state_dict_has_the_names_and_values_that_were_packed() -> None:
    encoder = make_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.pack()
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_amx
def test_weights_are_held_once() -> None:
    encoder = make_encoder()
    encoder.pack()
    assert all(isinstance(block, PackedBlock) for block in encoder.blocks)
    largest = max(parameter.numel() for parameter in encoder.blocks.parameters())
    assert largest == SIZES["intermediate_size"]  # a bias: no matrix is left


@needs_amx
def test_nothing_is_left_out_of_all_weights() -> None:
    plain, packed = make_encoder(), make_encoder()
    packed.pack()
    packed.load_state_dict(plain.state_dict())
    of_plain, of_packed = ({*map(fingerprint_of, all_weights(encoder))} for encoder in (plain, packed))
    assert of_plain == of_packed


def fingerprint_of(weight: Tensor) -> tuple[object, ...]:
    return (*weight.shape, float(weight.double().sum()))


@needs_amx
def test_other_weights_can_be_loaded_into_it() -> None:
    packed, other, images = make_encoder(), make_encoder(), make_images(2).bfloat16()
    packed.pack()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    packed.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert relative_error(packed(images), other(images)) < 0.01


@needs_amx
def test_weights_that_are_missing_or_misfit_are_named() -> None:
    packed = make_encoder()
    packed.pack()
    weights = packed.state_dict()
    del weights["blocks.0.mlp.fc1.weight"]
    weights["blocks.1.attn.proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError) as raised:
        packed.load_state_dict(weights)
    assert "blocks.0.mlp.fc1.weight" in str(raised.value)
    assert "blocks.1.attn.proj.weight: (3, 3) in the file, (320, 320) here" in str(raised.value)


@needs_amx
def test_it_can_be_copied_and_pickled() -> None:
    encoder, images = make_encoder(), make_images(2).bfloat16()
    encoder.pack()
    with torch.inference_mode():
        expected = encoder(images)
        assert torch.equal(copy.deepcopy(encoder)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(encoder))(images), expected)


@needs_amx
def test_it_stays_where_and_what_it_is() -> None:
    encoder = make_encoder()
    encoder.pack()
    encoder.to("cpu").to(torch.bfloat16).eval()
    for change in (torch.nn.Module.float, lambda module: module.to("meta")):
        with pytest.raises(RuntimeError, match=r"packed for bfloat16 on the CPU.*pack=False"):
            change(encoder)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.bfloat16}


@needs_amx
def test_gradients_and_masks_are_refused() -> None:
    encoder, images = make_encoder(), make_images(2).bfloat16()
    encoder.pack()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"takes no .*attn_mask"):
        encoder(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    assert not encoder(images).requires_grad
    with pytest.raises(RuntimeError, match="lets no gradient through"):
        encoder(images.clone().requires_grad_())
    encoder.blocks[-1].norm1.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="lets no gradient through"):
        encoder(images)


@needs_amx
def test_weights_that_were_replaced_by_others_are_not_read_as_what_they_are_not() -> None:
    encoder = make_encoder()
    encoder.pack()
    weight = encoder.blocks[0].norm2.weight
    for other in (torch.ones(320), torch.ones(3).bfloat16(), torch.ones(640).bfloat16()[::2]):
        weight.data = other
        message = (
            rf"in bfloat16 on the CPU, of their size.* {other.dtype} on cpu, of shape \({len(other)},\) with strides"
        )
        with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
            encoder(make_images(1).bfloat16())


@needs_amx
def test_weights_may_be_loaded_while_another_thread_encodes() -> None:
    """The code in C runs beside Python, and reads the weights that it was given to its end."""
    encoder, images = make_encoder(hidden_size=1408, num_attention_heads=16, num_hidden_layers=1), make_images(2)
    encoder.pack()
    weights, stop = encoder.state_dict(), threading.Event()

    def load() -> None:
        while not stop.is_set():
            encoder.load_state_dict(weights)

    loader = threading.Thread(target=load)
    with torch.inference_mode():
        expected = encoder(images.bfloat16())
        loader.start()
        try:
            assert all(torch.equal(encoder(images.bfloat16()), expected) for _ in range(100))
        finally:
            stop.set()
            loader.join()


@needs_amx
def test_the_block_keeps_what_it_reads() -> None:
    encoder = make_encoder()
    encoder.pack()
    block, kept = encoder.blocks[0].addresses()
    places = {block.norm1_weight, block.norm1_bias, block.norm2_weight, block.norm2_bias}
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        places |= {layer.weight, layer.bias}
    assert places == {tensor.data_ptr() for tensor in kept}


@needs_amx
def test_what_a_packed_encoder_cannot_do_is_said() -> None:
    encoder = make_encoder()
    assert encoder.forward_features(make_images(1).bfloat16()).shape == (1, 17, 320)
    assert encoder.forward_intermediates(make_images(1).bfloat16(), intermediates_only=True)
    encoder.pack()
    for method in (encoder.forward_features, encoder.forward_intermediates):
        with pytest.raises(RuntimeError, match=rf"no {method.__name__}: load the model with pack=False"):
            method(make_images(1).bfloat16())


@needs_amx
def test_no_pictures_have_no_tokens() -> None:
    encoder = make_encoder()
    encoder.pack()
    assert encoder(make_images(0).bfloat16()).shape == (0, 17, 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_weights_are_brought_in_and_neither_packed_nor_shared(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    encoder, images = make_encoder().to(dtype), make_images(4).to(dtype)
    with torch.inference_mode():
        expected = encoder(images)
    cpu_offload(encoder, execution_device=torch.device("cpu"))
    assert encoder.blocks[0].attn.qkv.weight.device.type == "meta"
    assert not encoder.pack()
    assert not encoder.shares_images
    with torch.no_grad():
        assert relative_error(encoder(images), expected) < (1e-6 if dtype == torch.float32 else 5e-3)


@needs_amx
def test_pictures_of_another_size_are_refused() -> None:
    encoder = make_encoder()
    encoder.pack()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"pictures are \(28, 28\) pixels .* \(56, 56\)"):
        encoder(make_images(1, 28).bfloat16())


def test_what_cannot_be_packed_is_left_as_it_is() -> None:
    for encoder in (make_encoder(hidden_size=304), make_encoder().float(), make_encoder().to("meta")):
        assert not encoder.pack()
        assert not any(isinstance(block, PackedBlock) for block in encoder.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_packed_shares_its_images_over_threads_with_the_same_result(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    encoder = make_encoder(hidden_size=304).to(dtype)
    used: set[str] = set()
    encoder.blocks[0].register_forward_hook(lambda *_: used.add(threading.current_thread().name))
    images = make_images(5).to(dtype)
    with torch.inference_mode():
        before = encoder(images)
        assert used == {threading.current_thread().name}
        encoder.pack()
        after = encoder(images)
    assert relative_error(after, before) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert len(used) == 3


def test_where_it_was_not_compiled_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva_block, "_load", lambda: (None, "there was no compiler"))
    assert not make_encoder().pack()


@needs_amx
def test_a_model_that_was_packed_elsewhere_says_why_it_cannot_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    encoder.pack()
    monkeypatch.setattr(eva_block, "_load", lambda: (None, "there was no compiler"))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"there was no compiler.*pack=False"):
        encoder(make_images(1).bfloat16())


@needs_amx
def test_a_packed_branch_encodes_as_the_plain_one() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = VideoLlamaConfig(
        vision_config={**SIZES, "image_size": 28},
        qformer_config={**small, "num_hidden_layers": 2},
        video_qformer_config=small,
        text_config={"model_type": "llama", **small, "vocab_size": 96, "num_hidden_layers": 1},
    )
    torch.manual_seed(0)
    branch = VideoBranch(config).eval().requires_grad_(False)
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    branch.to(torch.bfloat16)
    pixels = torch.randn(2, 3, 3, 28, 28)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = branch.encode_frames(pixels, mask)
    assert branch.vision_encoder.pack()
    found = branch.encode_frames(pixels, mask)
    assert relative_error(found, expected) < 0.01
    assert not found[~mask].any()


@needs_amx
def test_features_of_before_other_weights_were_loaded_are_forgotten() -> None:
    encoder, cache = make_encoder(), MediaCache(max_items=2)
    encoder.pack()
    images = make_images(1).bfloat16()
    with torch.inference_mode():
        before = cache.get(images, encoder, lambda: encoder(images))
        assert cache.get(images, encoder, lambda: None) is before
        weight = encoder.state_dict()["blocks.0.mlp.fc1.weight"]
        encoder.load_state_dict({"blocks.0.mlp.fc1.weight": -weight}, strict=False)
        after = cache.get(images, encoder, lambda: encoder(images))
    assert relative_error(after, before) > 0.01
