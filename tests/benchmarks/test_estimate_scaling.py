"""The formulas of docs/scaling.md against what torch counts and what is on disk; the document against the script."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import estimate_scaling
from benchmarks.benches.encoders import make_config, vit_operations
from benchmarks.estimate_scaling import feature_bytes, main, restart_interval
from benchmarks.workload import Workload, branch_flops, caption_flops, encoder_flops, training_flops
from tests.helpers.tiny_model import make_tiny_config
from video_llama.data.features import Features, FeatureStore
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.parts import freeze_for_training
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.flops import language_model_flops, vit_flops

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
WORK = Workload(num_frames=3, num_segments=2, num_text_tokens=20, num_answer_tokens=4)
WITHOUT_SOUND = Workload(num_frames=3, num_segments=0, num_text_tokens=20, num_answer_tokens=4)


def count(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops())


@pytest.fixture(scope="module")
def config() -> VideoLlamaConfig:
    return make_tiny_config()


@pytest.fixture(scope="module")
def model(config: VideoLlamaConfig) -> VideoLlamaForConditionalGeneration:
    return VideoLlamaForConditionalGeneration(config).eval().requires_grad_(False)


def media(config: VideoLlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    side = config.vision_config.image_size
    return torch.zeros(1, 3, 3, side, side), torch.zeros(1, 2, 1, *config.audio_config.input_size)


def ids(config: VideoLlamaConfig, with_sound: bool, extra: int = 0) -> torch.Tensor:
    marks = [config.image_token_id] * config.num_video_query_tokens
    marks += [config.audio_token_id] * config.num_audio_query_tokens if with_sound else []
    return torch.tensor([[*marks, *[5] * (20 + extra)]])


@torch.no_grad()
def test_encoders_and_branches_cost_what_torch_counts(
    config: VideoLlamaConfig, model: VideoLlamaForConditionalGeneration
) -> None:
    pixels, sound = media(config)
    video, audio = model.video_branch, model.audio_branch
    assert audio is not None
    encoded = count(lambda: (video.encode_frames(pixels), audio.encode_segments(sound)))
    assert encoder_flops(config, WORK) == pytest.approx(encoded, rel=1e-6)
    tokens, vectors = video.encode_frames(pixels), audio.encode_segments(sound)
    assert branch_flops(config, WORK) == pytest.approx(
        count(lambda: (video.pool(tokens), audio.pool(vectors))), rel=1e-6
    )


@torch.no_grad()
def test_a_caption_costs_what_torch_counts(config: VideoLlamaConfig, model: VideoLlamaForConditionalGeneration) -> None:
    pixels, sound = media(config)
    counted = count(
        lambda: model.generate(
            input_ids=ids(config, True),
            pixel_values=pixels,
            audio_values=sound,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
    )
    assert caption_flops(config, WORK).total == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_training_step_costs_what_torch_counts(config: VideoLlamaConfig, is_cached: bool) -> None:
    model = VideoLlamaForConditionalGeneration(config)
    freeze_for_training(model, ("video_qformer", "video_projection"))
    pixels, _ = media(config)
    input_ids = ids(config, False, extra=4)
    labels = torch.full_like(input_ids, -100)
    labels[:, -4:] = 5
    with torch.no_grad():
        tokens = model.video_branch.encode_frames(pixels)
    inputs = {"frame_tokens": tokens} if is_cached else {"pixel_values": pixels}

    def step() -> None:
        model(input_ids=input_ids, labels=labels, answers_only=True, **inputs).loss.backward()

    expected = training_flops(config, WITHOUT_SOUND, is_cached)
    assert expected.total == pytest.approx(count(step), rel=0.02)


def test_grouped_keys_cost_less() -> None:
    text = make_tiny_config().text_config
    many = language_model_flops(text, 10, 10, 1)
    text.num_key_value_heads = 1
    assert language_model_flops(text, 10, 10, 1) < many


def test_the_vit_costs_what_the_bench_divides_by() -> None:
    config = make_config("full")
    assert vit_flops(config.vision_config) == pytest.approx(vit_operations(config, 1), rel=0.01)


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_the_cache_takes_the_bytes_of_real_entries(tmp_path: Path, encoding: str) -> None:
    config, work = VideoLlamaConfig(), Workload()
    store = FeatureStore(tmp_path, encoding, {})  # type: ignore[arg-type]
    message = "The video contains 8 frames sampled at 0.0, 1.1, 2.3, 3.4, 4.6, 5.7, 6.9, 8.0 seconds. "
    store.save("aa", Features(torch.randn(8, 32, 768), message))
    store.save("bb", Features(torch.randn(8, 1024), ""))
    real = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert feature_bytes(config, work, encoding) == pytest.approx(real, rel=0.003)


def test_saving_more_or_less_often_than_advised_loses_more() -> None:
    save, failures = 10.0, 24.0

    def lost(interval: float) -> float:
        return save / interval + interval / (2 * failures * 3600)

    best = restart_interval(save, failures)
    assert lost(best) < min(lost(best * 1.1), lost(best / 1.1))


@pytest.mark.slow
def test_the_document_shows_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line for line in printed.splitlines() if re.match(r"\||restarts|shards|a training checkpoint", line)]
    assert len(lines) > 20
    missing = [line for line in lines if line not in text]
    assert not missing


@pytest.mark.slow
def test_more_frames_sound_and_tokens_cost_more(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_tiny_config()
    base = caption_flops(config, WORK).total
    assert caption_flops(config, Workload(6, 2, 20, 4)).total > base
    assert caption_flops(config, WITHOUT_SOUND).total < base
    assert caption_flops(config, Workload(3, 2, 20, 8)).answer > caption_flops(config, WORK).answer
    assert main(["--segments", "0", "--frames", "32", "--model", "13b"]) == 0
    assert "13b: 32 frames, 132 tokens of prompt" in capsys.readouterr().out
    assert set(estimate_scaling.STORED) == {"float32", "bfloat16", "int8"}
