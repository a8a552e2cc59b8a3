"""The blocks in C against timm's in float32, whatever their sizes and however many threads share them."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from video_llama.model import eva_block
from video_llama.model.configuration import VideoLlamaVisionConfig
from video_llama.model.eva_vit import build_eva_vit
from video_llama.model.packed_block import PackedBlock, PackedLinear

pytestmark = pytest.mark.skipif(eva_block.why_not() is not None, reason=str(eva_block.why_not()))


def make_blocks(width: int, heads: int, hidden: int, depth: int = 1) -> tuple[torch.nn.Module, list[PackedBlock]]:
    """timm's in float32, and packed ones of the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": hidden}
    encoder = build_eva_vit(VideoLlamaVisionConfig(image_size=28, num_hidden_layers=depth, **sizes)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5 * width**-0.5)
    encoder.requires_grad_(False).to(torch.bfloat16)
    packed = [PackedBlock(copy.deepcopy(block)) for block in encoder.blocks]
    return encoder.blocks.float(), packed


def run(blocks: list[PackedBlock], states: Tensor, threads: int) -> Tensor:
    states = states.clone()
    addresses, kept = zip(*(block.addresses() for block in blocks), strict=True)
    eva_block.forward(addresses, states, threads)
    del kept
    return states


def relative_error(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())


@settings(max_examples=60, deadline=None)
@given(
    head_width=st.integers(1, 5).map(lambda number: 16 * number),
    heads=st.integers(1, 4).map(lambda number: 2 * number),
    hidden=st.sampled_from([32, 96, 1536, 1568, 3104]),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([256, 257, 258])),
    images=st.integers(1, 5),
    threads=st.integers(1, 6),
)
def test_it_computes_what_timm_does(
    head_width: int, heads: int, hidden: int, tokens: int, images: int, threads: int
) -> None:
    exact, packed = make_blocks(head_width * heads, heads, hidden, depth=2)
    states = torch.randn(images, tokens, head_width * heads, generator=torch.Generator().manual_seed(1))
    expected = states
    for block in exact:
        expected = block(expected)
    found = run(packed, states, threads)
    assert relative_error(found - states, expected - states) < 0.01
    assert torch.equal(found, run(packed, states, 1)), "the result should not depend on the number of threads"


def test_peaked_attention_is_no_less_exact_than_with_timm_in_bfloat16() -> None:
    exact, packed = make_blocks(64, 2, 128)
    for layers in (exact[0], packed[0]):
        layers.norm1.weight.data.fill_(30.0)
        layers.norm2.weight.data.fill_(20.0)
    states = torch.randn(2, 40, 64)
    expected = exact[0](states)
    before = copy.deepcopy(exact[0]).bfloat16()(states.bfloat16()).float()
    assert relative_error(run(packed, states, 2), expected) < 0.8 * relative_error(before, expected)


def test_the_activation_is_the_exact_gelu() -> None:
    """Two products that change nothing let the activation be seen alone."""
    _, packed = make_blocks(32, 1, 32)
    block, identity = packed[0], torch.nn.Linear(32, 32).to(torch.bfloat16).requires_grad_(False)
    identity.weight.copy_(torch.eye(32))
    identity.bias.zero_()
    block.attn.proj = PackedLinear(torch.nn.Linear(32, 32, bias=True).to(torch.bfloat16).requires_grad_(False))
    block.attn.proj.packed.zero_()
    block.attn.proj.bias.zero_()
    block.mlp.fc1, block.mlp.fc2 = PackedLinear(identity), PackedLinear(identity)
    block.norm2.weight.fill_(3.0)
    block.norm2.bias.zero_()
    states = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1))
    inside = torch.nn.functional.layer_norm(states, (32,), block.norm2.weight.float(), None, block.norm2.eps)
    expected = torch.nn.functional.gelu(inside.bfloat16().float())
    found = run(packed, states, 1) - states
    assert inside.abs().max() > 6
    assert torch.allclose(found, expected, rtol=2**-8, atol=2e-6)


def test_what_is_not_a_number_stays_in_its_image_and_is_not_hidden() -> None:
    _, packed = make_blocks(64, 2, 128)
    states = torch.randn(3, 17, 64)
    expected = run(packed, states, 1)
    states[1, 4, 7] = torch.nan
    for threads in (1, 2, 3):
        found = run(packed, states, threads)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert found[1].isnan().all()


@pytest.mark.parametrize("offset", [0, 1])
def test_a_packed_weight_is_the_same_weight(offset: int) -> None:
    weight = torch.randn(64 * 96 + offset).bfloat16()[offset:].view(64, 96)
    packed = eva_block.pack(weight)
    assert packed.is_contiguous()
    assert torch.equal(eva_block.unpack(packed), weight)
    pairs = packed[1, 2, 1]  # the last 16 outputs, the last 32 inputs
    assert torch.equal(pairs[3, 5], weight[32 + 16 + 5, 64 + 6 : 64 + 8])


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.zeros(1, 4, 64, dtype=torch.bfloat16), "float32"),
        (torch.zeros(4, 64), "three-dimensional"),
        (torch.zeros(1, 64, 4).transpose(1, 2), "contiguous"),
        (torch.zeros(1, 4, 32), "width 32"),
    ],
)
def test_states_that_do_not_fit_are_refused(states: Tensor, message: str) -> None:
    _, packed = make_blocks(64, 2, 128)
    with pytest.raises(ValueError, match=message):
        eva_block.forward([packed[0].addresses()[0]], states, 1)


def test_torch_finds_its_own_registers_again() -> None:
    """Products of torch before and after use AMX too, in the same thread."""
    _, packed = make_blocks(64, 2, 128)
    query = torch.randn(1, 2, 300, 64).bfloat16()
    left = torch.randn(64, 512).bfloat16()
    attended, product = torch.nn.functional.scaled_dot_product_attention(query, query, query), left @ left.T
    run(packed, torch.randn(1, 40, 64), 1)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, query), attended)
    assert torch.equal(left @ left.T, product)


def test_it_works_in_the_child_of_a_process_that_used_it() -> None:
    """Data loaders fork."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_eva_block import make_blocks, run
import torch
_, packed = make_blocks(64, 2, 128)
states = torch.randn(2, 17, 64)
expected = run(packed, states, 2)
if not (child := os.fork()):
    os._exit(0 if torch.equal(run(packed, states, 2), expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_library_of_another_source_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "eva_block.c").write_text("/* a later version */\n", encoding="utf-8")
    monkeypatch.setattr(eva_block, "_SOURCES", tmp_path)
    library, problem = eva_block._load.__wrapped__()
    assert library is None
    assert "install video_llama once more" in str(problem)


def test_a_library_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError("wrong ELF class")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    library, problem = eva_block._load.__wrapped__()
    assert library is None
    assert "wrong ELF class" in str(problem)
