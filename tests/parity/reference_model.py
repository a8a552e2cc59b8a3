"""Build the model from a reference folder: sizes from its JSON, weights through the package's own name table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.checkpoints import original_to_ours
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def vision_config(vit: dict[str, Any], weights: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Our vision sizes; what the record leaves out is read off the weights."""
    return {
        "image_size": vit["img_size"],
        "patch_size": weights[f"{prefix}patch_embed.proj.weight"].shape[-1],
        "hidden_size": vit["embed_dim"],
        "num_hidden_layers": vit["depth"],
        "num_attention_heads": vit["num_heads"],
        "intermediate_size": len(weights[f"{prefix}blocks.0.mlp.fc1.bias"]),
    }


def num_layers(weights: Iterable[str], prefix: str) -> int:
    """How many layers are numbered below `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def imagebind_config(
    ib: dict[str, Any], modality: str, weights: dict[str, Tensor], prefix: str, input_size: Sequence[int]
) -> dict[str, Any]:
    """Sizes of one ImageBind trunk for inputs of (height, width); a stride left unsaid is the published model's."""
    stem = "rgbt_stem.proj.weight" if modality == "audio" else "rgbt_stem.proj.1.weight"
    kernel = weights[f"{prefix}modality_preprocessors.{modality}.{stem}"].shape
    return {
        "modality": modality,
        "input_size": tuple(input_size),
        "patch_size": kernel[-1],
        "stride": ib.get("audio_stride", 10) if modality == "audio" else kernel[-1],
        "temporal_patch_size": kernel[2] if modality == "vision" else 1,
        "hidden_size": ib[f"{modality}_embed_dim"],
        "num_hidden_layers": ib[f"{modality}_num_blocks"],
        "num_attention_heads": ib[f"{modality}_num_heads"],
        "intermediate_size": len(weights[f"{prefix}modality_trunks.{modality}.blocks.0.mlp.fc1.bias"]),
        "output_size": ib["out_embed_dim"],
    }


def heard_pictures(folder: Path) -> dict[str, list[int]]:
    """Shapes of an input of each of ImageBind's trunks: of sound, and of images that train in its place."""
    cases = json.loads((folder / "full/cases.json").read_text())
    shapes = json.loads((folder / "full/inputs.json").read_text())["tensors"]
    calls = [call.rstrip(")").partition("(") for case in cases["generation"] for call in case["images"]]
    sound = next(argument for function, _, argument in calls if "audioQformer" in function)
    image = next(case["image"] for case in cases["losses"] if case["train_flag"] == 1)
    return {kind: shapes[name.partition("[")[0]][0] for kind, name in (("audio", sound), ("vision", image))}


def full_model_config(folder: Path, weights: dict[str, Tensor]) -> VideoLlamaConfig:
    sizes = json.loads((folder / "full/model.json").read_text())["config"]
    bert, queries = sizes["bert"], sizes["q"]
    pictures = heard_pictures(folder)
    video, audio = (
        {**bert, "num_hidden_layers": num_layers(weights, f"{kind}_Qformer.bert.encoder.layer.")}
        for kind in ("video", "audio")
    )
    return VideoLlamaConfig(
        vision_config=vision_config(sizes["vit"], weights, "visual_encoder."),
        qformer_config=bert,
        video_qformer_config=video,
        audio_qformer_config=audio,
        audio_config=imagebind_config(sizes["ib"], "audio", weights, "audio_encoder.", pictures["audio"][-2:]),
        imagebind_vision_config=imagebind_config(
            sizes["ib"], "vision", weights, "audio_encoder.", pictures["vision"][-2:]
        ),
        text_config={"model_type": "llama", "pad_token_id": 0, **sizes["llama"]},
        num_query_tokens=queries["num_query_token"],
        num_video_query_tokens=queries["num_video_query_token"],
        num_audio_query_tokens=queries["num_audio_query_token"],
        max_frame_positions=queries["max_frame_pos"],
        max_segment_positions=len(weights["audio_position_embedding.weight"]),
    )


def load_reference_model(folder: Path) -> VideoLlamaForConditionalGeneration:
    """The whole recorded model in float32, in evaluation mode, with the parameters of the recipe trainable."""
    weights = load_file(folder / "full/model.safetensors")
    model = VideoLlamaForConditionalGeneration(full_model_config(folder, weights))
    model.load_state_dict(original_to_ours(weights))
    return model.eval()


def load_inputs(path: Path) -> dict[str, Tensor]:
    """Recorded tensors; those stored as float16 are exact and meant as float32."""
    return {
        name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in load_file(path).items()
    }
