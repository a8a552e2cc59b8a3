"""Models with random weights, made on the device: nothing of their 16 GB passes through files or the CPU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from examples.random_checkpoint import SIZES, STD, train_tokenizer
from video_llama.checkpoints.load import build_processor
from video_llama.inference.engine import VideoLlama
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.imagebind import AUDIO_LOGIT_SCALE
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration

__all__ = ["make_model", "make_peer"]

SMALL_VOCABULARY = 600  # more than the small tokenizer has
DTYPE = torch.bfloat16
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_model(size: str, device: torch.device, seed: int = 0, num_text_layers: int | None = None) -> VideoLlama:
    """A Video-LLaMA in bfloat16 with both branches, and a processor whose vocabulary is as large as the model's.

    Args:
        size: one of `SIZES`.
        device: where the weights are drawn.
        seed: of the weights.
        num_text_layers: of the language model, instead of all.
    """
    text = {"model_type": "llama", "vocab_size": SMALL_VOCABULARY, **SIZES[size]["text_config"], **_IDS}
    if num_text_layers is not None:
        text["num_hidden_layers"] = num_text_layers
    config = VideoLlamaConfig(**{**SIZES[size], "text_config": text})
    config.text_config.dtype = DTYPE
    config.text_config.architectures = ["LlamaForCausalLM"]
    with _empty_weights_on(device):
        model = VideoLlamaForConditionalGeneration(config)
    fill(model, device, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("k_bias"):  # zero by definition
            buffer.zero_()
        elif name.endswith("log_logit_scale"):
            buffer.fill_(torch.tensor(AUDIO_LOGIT_SCALE).log().item())
        elif not name.endswith("inv_freq"):  # computed when the module was made
            raise AssertionError(f"nobody thought of the buffer {name}")
    generation = GenerationConfig.from_model_config(config.text_config)
    model.generation_config = model.language_model.generation_config = generation
    model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder), text["vocab_size"])
        processor = build_processor(config, Path(folder), conv_template="llama_2")
    return VideoLlama(model, processor)


def make_peer(ours: VideoLlama, device: torch.device, seed: int = 1) -> Any:
    """transformers' InstructBLIP for videos: ViT and Q-Former of our sizes, and our language model itself."""
    from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

    config = ours.model.config
    vision, qformer = config.vision_config, config.qformer_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = config.text_config.to_dict()
    peer_config = InstructBlipVideoConfig(
        vision_config={
            **{name: getattr(vision, name) for name in sizes},
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        qformer_config={name: getattr(qformer, name) for name in sizes},
        text_config={**text, "num_hidden_layers": 1},  # makes room for ours
        num_query_tokens=config.num_query_tokens,
        video_token_index=text["vocab_size"] - 1,  # in the place of one that it would add
    )
    with _empty_weights_on(device):
        peer = InstructBlipVideoForConditionalGeneration(peer_config)
    peer.language_model = None
    fill(peer, device, seed)
    peer.to(DTYPE)  # it wants its queries in float32, which SDPA would not take beside the rest
    peer.language_model = ours.model.language_model
    peer.requires_grad_(False)
    return peer.eval()


@contextlib.contextmanager
def _empty_weights_on(device: torch.device) -> Iterator[None]:
    """Modules made in here have bfloat16 weights on the device that nobody has filled; buffers are what they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, seed: int) -> None:
    """Draw all weights: normal, with the weights of norms around 1 and biases 0."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
            continue
        weight.normal_(std=STD, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):
            weight.add_(1)


def _write_tokenizer(folder: Path, size: int) -> None:
    """The small tokenizer with pieces no text has, up to `size`, so that any token can be turned into text."""
    from sentencepiece import sentencepiece_model_pb2

    train_tokenizer(folder)
    file = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for number in range(len(model.pieces), size):
        # An unreachable piece: its last character is in no text, and it can be joined from no two others.
        model.pieces.add(piece=f"w{number:05d}\N{HEAVY GREEK CROSS}", score=-1e6)
    file.write_bytes(model.SerializeToString())
