"""The encoders against the modules that a user would otherwise take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from benchmarks.benches.timing import Row, alternate, gemm_task, memory_of, relative_difference
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_branch import VideoBranch
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

NUM_FRAMES, NUM_SEGMENTS = 8, 8
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
TINY_QFORMERS = {"qformer_config": {**SMALL, "num_hidden_layers": 2}, "audio_qformer_config": SMALL}
TINY = {
    **TINY_QFORMERS,
    "video_qformer_config": SMALL,
    "vision_config": {**SMALL, "image_size": 56, "num_hidden_layers": 2},
    "audio_config": {**SMALL, "num_hidden_layers": 2, "output_size": 64},
}
TEXT = {"model_type": "llama", "vocab_size": 64, **SMALL, "num_hidden_layers": 1}

# Of all of ImageBind-Huge as the original loads it, in mebibytes: resident afterwards, and at its peak.
IMAGEBIND_RESIDENT, IMAGEBIND_PEAK = 5000.0, 9585.0
BUILD_AUDIO_BRANCH = """
import sys, torch
from benchmarks.benches.encoders import make_config
from video_llama.model.audio_branch import AudioBranch
branch = AudioBranch(make_config(sys.argv[1])) if sys.argv[2] != "import" else None
if branch is not None:
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
if sys.argv[2] == "run":
    with torch.inference_mode():
        branch(torch.zeros(1, 8, 1, *make_config(sys.argv[1]).audio_config.input_size))
"""


def make_config(size: str) -> VideoLlamaConfig:
    """The published widths with a ViT of depth 4, or a tiny model; the language model is small in both."""
    sizes: dict[str, Any] = TINY if size == "tiny" else {"vision_config": {"num_hidden_layers": 4}}
    return VideoLlamaConfig(**sizes, text_config=TEXT)


def build(size: str) -> VideoLlamaForConditionalGeneration:
    """A model with random weights."""
    torch.manual_seed(0)
    return VideoLlamaForConditionalGeneration(make_config(size)).eval()


class Blip2Frames(torch.nn.Module):
    """transformers' modules with the weights of ours: ViT, its last norm, Q-Former."""

    def __init__(self, branch: VideoBranch, config: VideoLlamaConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.vision = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                num_hidden_layers=vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.layer_norm_eps,
                attn_implementation="sdpa",
            )
        )
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.qformer.load_state_dict(branch.qformer.state_dict())
        self.vision.load_state_dict(dict(_renamed(branch)))
        self.vision.post_layernorm.eps = branch.vision_norm.eps
        self.query_tokens = torch.nn.Parameter(branch.query_tokens.detach().clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.vision(pixel_values.flatten(0, 1)).last_hidden_state
        queries = self.query_tokens.expand(len(patches), -1, -1)
        answer = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
        return answer.last_hidden_state.unflatten(0, pixel_values.shape[:2])


def _renamed(branch: VideoBranch) -> list[tuple[str, Tensor]]:
    """Our ViT's weights under transformers' names."""
    encoder = branch.vision_encoder
    tensors = [
        ("embeddings.class_embedding", encoder.cls_token),
        ("embeddings.position_embedding", encoder.pos_embed),
        ("embeddings.patch_embedding.weight", encoder.patch_embed.proj.weight),
        ("embeddings.patch_embedding.bias", encoder.patch_embed.proj.bias),
        ("post_layernorm.weight", branch.vision_norm.weight),
        ("post_layernorm.bias", branch.vision_norm.bias),
    ]
    for number, block in enumerate(encoder.blocks):
        name, attention = f"encoder.layers.{number}", block.attn
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        tensors += [(f"{name}.self_attn.qkv.weight", attention.qkv.weight), (f"{name}.self_attn.qkv.bias", bias)]
        modules = {
            "self_attn.projection": attention.proj,
            "layer_norm1": block.norm1,
            "layer_norm2": block.norm2,
            "mlp.fc1": block.mlp.fc1,
            "mlp.fc2": block.mlp.fc2,
        }
        for theirs, module in modules.items():
            tensors += [(f"{name}.{theirs}.weight", module.weight), (f"{name}.{theirs}.bias", module.bias)]
    return tensors


def vit_operations(config: VideoLlamaConfig, num_frames: int) -> float:
    """Floating-point operations of the ViT's matrix products."""
    vision = config.vision_config
    tokens, width = (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size
    linear = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * tokens**2 * width
    patches = 2 * (tokens - 1) * 3 * vision.patch_size**2 * width
    return float(num_frames * (vision.num_hidden_layers * (linear + attention) + patches))


def products_task(encoder: Any, rows: int) -> tuple[Callable[[], Any], float]:
    """The matrix products of a ViT's linear layers, each with its own weights, and nothing else; their operations."""
    layers = [
        layer for block in encoder.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    ]
    dtype = layers[0].weight.dtype
    inputs = {width: torch.randn(rows, width).to(dtype) for width in {layer.in_features for layer in layers}}

    def run() -> None:
        for layer in layers:
            torch.nn.functional.linear(inputs[layer.in_features], layer.weight)

    return run, sum(2.0 * rows * layer.weight.numel() for layer in layers)


@torch.inference_mode()
def run_vision(size: str, repeats: int, folder: Path) -> list[Row]:
    """Frames to Q-Former tokens in float32 and bfloat16, and how near the ViT comes to plain matrix products."""
    model = build(size)
    branch, config = model.video_branch, model.config
    peer = Blip2Frames(branch, config).eval()
    vision = config.vision_config
    tokens = NUM_FRAMES * ((vision.image_size // vision.patch_size) ** 2 + 1)
    pixels = torch.randn(1, NUM_FRAMES, 3, vision.image_size, vision.image_size)
    half = VideoBranch(config).eval().to(torch.bfloat16)
    half.load_state_dict(branch.state_dict())
    operations = {"ViT": vit_operations(config, NUM_FRAMES)}
    tasks: dict[str, Callable[[], Any]] = {"peer": lambda: peer(pixels)}
    for name, own in (("float32", branch), ("bfloat16", half)):
        dtype = own.vision_encoder.cls_token.dtype
        tasks[name] = partial(own.encode_frames, pixels)
        tasks[f"{name} ViT"] = partial(own.vision_encoder, pixels[0].to(dtype))
        tasks[f"{name} products"], operations["products"] = products_task(own.vision_encoder, tokens)
        tasks[f"{name} product"], operations["product"] = gemm_task(
            tokens, vision.hidden_size, vision.intermediate_size, dtype
        )
    medians = alternate(tasks, repeats)
    expected = peer(pixels)

    def share(seconds: Mapping[str, float], name: str, of: str) -> str:
        """The ViT's rate as a part of that of plain products."""
        rate = operations["ViT"] / seconds[f"{name} ViT"]
        return f"{rate * seconds[f'{name} {of}'] / operations[of]:.0%}"

    rows = []
    for name, own, against, target, tolerance in (
        ("float32", branch, "peer", 1.0, 1e-4),
        ("bfloat16", half, "float32", 2.0, 2e-2),
    ):
        difference = relative_difference(own.encode_frames(pixels), expected)
        rates = {of: operations[of] / medians[f"{name} {of}"] / 1e9 for of in operations}
        shares = [
            f"{share(medians, name, of)} of the {rates[of]:.0f} of {what}, "
            f"{share(medians.processor, name, of)} by processor seconds"
            for of, what in (("products", "its products alone"), ("product", "one large product"))
        ]
        note = (
            f"ViT {rates['ViT']:.0f} GFLOP/s: {'; '.join(shares)}; {medians.processor_ratio(name, against)}; "
            f"differs by {difference:.1e}"
        )
        peer_name = "transformers, float32" if against == "peer" else "ours, float32"
        what = f"{NUM_FRAMES} frames, ViT depth {vision.num_hidden_layers} and Q-Former, {name}"
        agrees = difference < tolerance
        rows.append(Row("vision", what, medians[name], medians[against], "s", peer_name, target, agrees, note))
    return rows


@torch.inference_mode()
def run_audio(size: str, repeats: int, folder: Path) -> list[Row]:
    """All segments at once against one by one, and the memory of the branch against all of ImageBind."""
    model = build(size)
    branch = model.audio_branch
    assert branch is not None
    bins, frames = model.config.audio_config.input_size
    values = torch.randn(1, NUM_SEGMENTS, 1, bins, frames)

    def one_by_one() -> Tensor:
        return torch.cat([branch.encode_segments(values[:, number : number + 1]) for number in range(NUM_SEGMENTS)], 1)

    medians = alternate({"ours": lambda: branch.encode_segments(values), "peer": one_by_one}, repeats)
    difference = relative_difference(branch.encode_segments(values), one_by_one())
    what, note = f"{NUM_SEGMENTS} segments, float32", f"differs by {difference:.1e}"
    rows = [Row("audio", what, medians["ours"], medians["peer"], "s", "one by one", None, difference < 1e-4, note)]
    built, run, bare = (memory_of(BUILD_AUDIO_BRANCH, size, task) for task in ("build", "run", "import"))
    for name, own, before, whole, target in (
        ("resident memory as built", built[0], bare[0], IMAGEBIND_RESIDENT, 10.0),
        (f"peak memory, {NUM_SEGMENTS} segments included", run[1], bare[1], IMAGEBIND_PEAK, 1 / 0.12),
    ):
        note = f"over {before:.0f} MiB of imports"
        rows.append(
            Row("audio", f"{name}, float32", own - before, whole, "MiB", "recorded: all of it", target, None, note)
        )
    return rows
