"""Operations of a batch, and peaks of GPUs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.tiny_model import make_tiny_config, prompt_ids
from video_llama.data.batches import DataCollator
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.model.parts import freeze_for_training
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.flops import batch_flops, peak_flops
from video_llama.training.learner import teaching_inputs


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("kind", ["video", "sound"])
def test_a_batch_costs_what_torch_counts(kind: str, is_cached: bool) -> None:
    config = make_tiny_config()
    model = VideoLlamaForConditionalGeneration(config)
    freeze_for_training(model, ("video_qformer", "video_projection", "audio_qformer", "audio_projection"))
    model.eval()
    if kind == "video":
        item = MediaInput("pixel_values", torch.randn(3, 3, 28, 28))
        features = model.video_branch.encode_frames(item.values[None])[0]
    else:
        assert model.audio_branch is not None
        item = MediaInput("audio_values", torch.randn(2, 1, 32, 36))
        features = model.audio_branch.encode_segments(item.values[None])[0]
    if is_cached:
        item = MediaInput(item.name, features, is_encoded=True)
    ids = [*prompt_ids(config, 1, kind, 7), *range(4, 20)]
    batch = DataCollator(0)(
        [ProcessedSample(str(n), ids, [-100] * (len(ids) - 4) + ids[-4:], [item]) for n in range(2)]
    )
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**teaching_inputs(batch, config, torch.device("cpu"))).loss.backward()
    assert batch_flops(config, batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(name: str, teraflops: int | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)
