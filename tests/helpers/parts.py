"""Tiny random encoders of other libraries, in folders as those libraries write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER = {**_BLOCKS, "intermediate_size": 48, "image_size": 56, "patch_size": 14}
_TEXT = {**_BLOCKS, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 10}
_TEXT |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_TIMM = {"depth": 2, "embed_dim": 32, "num_heads": 2}
FRAME_ENCODERS = ("siglip", "clip", "dinov2", "timm")
AUDIO_ENCODERS = ("whisper", "ast", "clap")


def make_frame_encoder(kind: str, folder: Path) -> dict[str, Any]:
    """Write a random frame encoder, and return the keys that name it."""
    torch.manual_seed(0)
    if kind == "timm":
        folder.mkdir(parents=True)
        arguments: dict[str, Any] = {**_TIMM, "img_size": 64}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
        save_file(model.state_dict(), folder / "weights.safetensors")
        keys = {"model": "vit_tiny_patch16_224", "path": str(folder / "weights.safetensors"), "image_size": 64}
        return {"name": "timm", "args": _TIMM, **keys}
    if kind == "siglip":
        SiglipModel(SiglipConfig(vision_config=_TOWER, text_config=_TEXT)).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    elif kind == "clip":
        CLIPModel(CLIPConfig(vision_config=_TOWER, text_config=_TEXT, projection_dim=16)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    else:
        # Its table of positions is of another size than its images, as that of the published models is.
        Dinov2Model(Dinov2Config(**{**_TOWER, "image_size": 70}, mlp_ratio=2)).save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, image_mean=[0.485, 0.456, 0.406]
        ).save_pretrained(folder)
    return {"name": "transformers", "path": str(folder)}


def make_audio_encoder(kind: str, folder: Path) -> dict[str, Any]:
    """Write a random audio encoder, and return the keys that name it."""
    torch.manual_seed(0)
    if kind == "whisper":
        blocks: dict[str, Any] = {}
        for side in ("encoder", "decoder"):
            blocks |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
        ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 1}
        config = WhisperConfig(d_model=32, num_mel_bins=16, max_source_positions=100, vocab_size=60, **blocks, **ids)
        WhisperModel(config).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    elif kind == "ast":
        ASTModel(ASTConfig(**_BLOCKS, intermediate_size=48, max_length=100, num_mel_bins=32)).save_pretrained(folder)
        ASTFeatureExtractor(max_length=100, num_mel_bins=32).save_pretrained(folder)
    else:
        swin = {"patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 2]}
        swin |= {"spec_size": 64, "num_mel_bins": 16, "window_size": 4, "projection_dim": 16}
        model = ClapModel(ClapConfig(audio_config=swin, text_config=_TEXT, projection_dim=16))
        model.save_pretrained(folder)
        ClapFeatureExtractor(feature_size=16, max_length_s=2, truncation="rand_trunc").save_pretrained(folder)
    return {"name": "transformers", "path": str(folder)}


def yaml_keys(section: str, keys: dict[str, Any]) -> list[str]:
    """Return keys of a part as options of the command line."""
    options = []
    for name, value in keys.items():
        if isinstance(value, dict):
            options += yaml_keys(f"{section}.{name}", value)
        else:
            options.append(f"{section}.{name}={os.fspath(value) if isinstance(value, Path) else value}")
    return options
