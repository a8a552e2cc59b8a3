"""Where the weights lie, what is computed from them, and the same text by every way to ask for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.gpu.conftest import load
from video_llama.checkpoints import fitting
from video_llama.checkpoints.fitting import DeviceMemory, read_device_memory
from video_llama.demo.shared_model import SharedModel
from video_llama.errors import ConfigError
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.prompt_parts import media_prefix

OPTIONS = GenerationOptions(max_new_tokens=24, min_new_tokens=24)
FIXED = GenerationOptions(max_new_tokens=24, min_new_tokens=24, static_cache=True)


def frames(number: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def segments(model: VideoLlama, number: int = 4) -> Tensor:
    size = model.model.config.audio_config.input_size
    return torch.randn(number, 1, *size, generator=torch.Generator().manual_seed(1))


def make_prompt(model: VideoLlama, question: str = "What is this?", seed: int = 0) -> Prompt:
    conversation = model.new_conversation()
    conversation.ask(question)
    conversation = conversation.up_to_answer()
    seen, heard = frames(seed=seed), segments(model)
    conversation.introduce(media_prefix([seen], heard))
    return model.prepare(conversation, [model.encode(heard), model.encode(seen)])


def relative(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; infinite if anything is not finite."""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    if not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - reference).norm() / reference.norm())


def test_all_weights_and_buffers_lie_on_the_device_in_its_precision(
    tiny_checkpoint: Path, device: torch.device
) -> None:
    model = load(tiny_checkpoint, device, "auto" if device.type == "cuda" else "bfloat16").model
    named = [*model.named_parameters(), *model.named_buffers()]
    assert {name: tensor.device for name, tensor in named if tensor.device != device} == {}
    assert {name: weight.dtype for name, weight in model.named_parameters() if weight.dtype != torch.bfloat16} == {}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_device_with_too_little_free_memory_refuses_the_model(
    tiny_checkpoint: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = read_device_memory(device)
    assert memory is not None
    assert 0 < memory.free <= memory.total
    monkeypatch.setattr(fitting, "read_device_memory", lambda device: DeviceMemory(1000, 1000))
    with pytest.raises(ConfigError, match=f"the model cannot fit {device.type}"):
        load(tiny_checkpoint, device)


def test_features_and_texts_in_float32_are_those_of_the_cpu(tiny_checkpoint: Path, exact_model: VideoLlama) -> None:
    reference = load(tiny_checkpoint, "cpu")
    for media in (frames(), frames(1), frames(40), segments(reference), segments(reference, 1)):
        assert relative(exact_model.encode(media).features, reference.encode(media).features) < 1e-3
    for seed in range(3):
        prompts = [make_prompt(model, seed=seed) for model in (exact_model, reference)]
        assert relative(prompts[0].inputs_embeds, prompts[1].inputs_embeds) < 1e-3
        assert exact_model.complete(prompts[0], OPTIONS) == reference.complete(prompts[1], OPTIONS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32_and_finite(
    dtype: str, tiny_checkpoint: Path, exact_model: VideoLlama, device: torch.device
) -> None:
    half = load(tiny_checkpoint, device, dtype)
    for media in (frames(), segments(half)):
        assert relative(half.encode(media).features, exact_model.encode(media).features) < 2e-2
    embeds = make_prompt(half).inputs_embeds
    with torch.inference_mode():
        logits = [model.model(inputs_embeds=embeds.to(model.model.dtype)).logits for model in (half, exact_model)]
    assert relative(*logits) < 2e-2


SHAPES = {
    "ViT": ((1, 16, 257, 88), 257),
    "ImageBind": ((32, 12, 229, 64), 230),
    "Q-Former": ((8, 12, 32, 64), 257),
    "Q-Former, masked": ((8, 12, 32, 64), 257),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "default": None,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_kernel_is_right_at_the_shapes_of_the_encoders(
    name: str, backend: str, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    (batch, heads, length, width), num_keys = SHAPES[name]
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, heads, rows, width) for rows in (length, num_keys, num_keys)]
    query, key, value = (torch.randn(s, generator=generator, device=device).bfloat16() for s in shapes)
    mask = None
    if name.endswith("masked"):
        lengths = torch.randint(1, num_keys, (batch,), generator=generator, device=device)
        mask = (torch.arange(num_keys, device=device) < lengths[:, None])[:, None, None]
    with sdpa_kernel(SDPBackend.MATH):
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    kernel = BACKENDS[backend]
    if device.type == "cpu":
        kernel = None
    if kernel is None:
        out, names = _with_kernel_names(query, key, value, mask)
        record_property("kernels", names)
        print(f"{name}: torch chose {names}")
    elif kernel is SDPBackend.FLASH_ATTENTION and mask is not None:
        with sdpa_kernel(kernel), pytest.raises(RuntimeError, match="No available kernel"):
            scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return
    else:
        try:
            with sdpa_kernel(kernel):
                out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        except RuntimeError as error:
            if kernel is not SDPBackend.CUDNN_ATTENTION:
                raise
            pytest.skip(f"torch does not give cuDNN this shape: {error}")
    assert relative(out, exact) < 1e-2


def _with_kernel_names(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, str]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if query.is_cuda else [])
    with profile(activities=activities) as profiler:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if query.is_cuda:
            torch.cuda.synchronize()
    kinds = {torch.autograd.DeviceType.CUDA} if query.is_cuda else {torch.autograd.DeviceType.CPU}
    return out, ", ".join(event.key[:80] for event in profiler.key_averages() if event.device_type in kinds)


@pytest.mark.parametrize("options", [OPTIONS, FIXED], ids=["growing cache", "fixed cache"])
def test_a_streamed_answer_is_the_complete_one(options: GenerationOptions, exact_model: VideoLlama) -> None:
    prompt = make_prompt(exact_model)
    wanted = exact_model.complete(prompt, OPTIONS)
    assert exact_model.complete(prompt, options) == wanted
    assert "".join(exact_model.stream(prompt, options)) == wanted  # its tokens come from a thread


@pytest.mark.parametrize("options", [OPTIONS, FIXED], ids=["growing cache", "fixed cache"])
def test_two_threads_at_once_get_the_answers_of_one(options: GenerationOptions, exact_model: VideoLlama) -> None:
    shared = SharedModel(exact_model)
    prompts = [make_prompt(shared, question, seed) for seed, question in enumerate(("What is this?", "Who speaks?"))]
    wanted = [exact_model.complete(prompt, OPTIONS) for prompt in prompts]
    said: dict[int, list[str]] = {0: [], 1: []}
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for _ in range(3):
                said[number].append("".join(shared.stream(prompts[number], options)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert said == {number: [text] * 3 for number, text in enumerate(wanted)}


@pytest.mark.parametrize("static_cache", [False, True], ids=["growing cache", "fixed cache"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captions_do_not_depend_on_how_many_clips_are_answered_together(
    dtype: str,
    static_cache: bool,
    tiny_checkpoint: Path,
    device: torch.device,
    exact_float32: None,
    record_property: Callable[[str, object], None],
) -> None:
    model = load(tiny_checkpoint, device, dtype)
    clips = [frames(2 + number % 3, seed=number) for number in range(9)]
    texts = {
        size: model.caption(clips, batch_size=size, max_new_tokens=16, static_cache=static_cache) for size in (1, 4, 8)
    }
    differ = {size: sum(a != b for a, b in zip(texts[1], texts[size], strict=True)) for size in (4, 8)}
    record_property("differing", differ)
    print(f"{dtype}: texts that differ from those of one clip at a time: {differ}")
    assert all(len(of_size) == 9 for of_size in texts.values())
    if dtype == "float32":  # in half precision a tie may fall otherwise
        assert differ == {4: 0, 8: 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frames_and_segments_through_cuda_graphs_have_the_features_that_they_have_without(
    dtype: str, tiny_checkpoint: Path, device: torch.device, exact_float32: None
) -> None:
    model = load(tiny_checkpoint, device, dtype).model
    audio = model.audio_branch
    assert audio is not None
    size = model.config.audio_config.input_size
    numbers = (1, 5, 9, 70)
    noise = torch.Generator().manual_seed(2)
    sounds = [torch.randn(1, number, 1, *size, generator=noise).to(device) for number in numbers]
    tasks = [(model.video_branch.encode_frames, frames(number, number)[None].to(device)) for number in numbers]
    tasks += [(audio.encode_segments, sound) for sound in sounds]
    with torch.no_grad():
        model.set_chunk_size(1000)
        wanted = [encode(values) for encode, values in tasks]
        model.set_chunk_size("auto")
    wrong: list[tuple[int, float]] = []
    failures: list[BaseException] = []

    def encode_all(mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        try:
            with mode():
                for _ in range(3):
                    found = [encode(values) for encode, values in tasks]
                    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
                    wrong.extend((n, e) for n, e in enumerate(errors) if e > (1e-4 if dtype == "float32" else 2e-2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=encode_all, args=(mode,)) for mode in (torch.no_grad, torch.inference_mode)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert wrong == []
    if device.type == "cuda":
        assert sorted(number for number, *_ in model.video_branch._graphs._passes) == [1, 8]
        model.bfloat16() if dtype == "float32" else model.float()  # elsewhere, and in another precision
        with torch.inference_mode():
            again = [encode(values) for encode, values in tasks]
        assert all(relative(a, b) < 2e-2 for a, b in zip(again, wanted, strict=True))


def test_training_goes_on_from_features_of_cuda_graphs(exact_model: VideoLlama, device: torch.device) -> None:
    branch = exact_model.model.requires_grad_(False).video_branch
    branch.projection.requires_grad_(True)
    gradients = []
    for chunk_size in ("auto", 1000):
        exact_model.model.set_chunk_size(chunk_size)
        with torch.autocast(device.type, torch.bfloat16):
            features = branch(frames(5)[None].to(device))
        (gradient,) = torch.autograd.grad(features.float().square().mean(), branch.projection.weight)
        gradients.append(gradient)
    assert relative(*gradients) < 2e-2
    if device.type == "cuda":
        assert len(branch._graphs._passes) == 1
