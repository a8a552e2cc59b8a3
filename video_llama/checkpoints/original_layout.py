"""Find the files of a checkpoint in the original layout, in a folder or given one by one.

VL_LLaMA_2_7B_Finetuned.pth          video Q-Former and projection
AL_LLaMA_2_7B_Finetuned.pth          audio Q-Former and projection; only for audio
imagebind_huge.pth                   audio encoder; only for audio
llama-2-7b-chat-hf/                  language model and tokenizer
eva_vit_g.pth                        frame encoder; here or at its public address
blip2_pretrained_flant5xxl.pth       BLIP-2 Q-Former; here or at its public address
config.json                          sizes, where they are not the published ones (written by our scripts)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_llama.checkpoints.chosen_parts import chosen_part
from video_llama.checkpoints.hub import (
    CHECKPOINT_PATTERNS,
    LANGUAGE_MODEL_PATTERNS,
    WITHOUT_AUDIO_PATTERNS,
    resolve_source,
)
from video_llama.checkpoints.trained_run import run_checkpoint
from video_llama.checkpoints.weight_files import FOLDER_FILES, open_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    LANGUAGE_MODEL,
    QFORMER,
    VIDEO_BRANCH,
    VISION_ENCODER,
)
from video_llama.config import ModelConfig
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.schema import EVA_VIT_G_URL, QFORMER_URL
from video_llama.utils.files import read_json_object

__all__ = [
    "OriginalFiles",
    "configured_files",
    "find_config",
    "find_original_files",
    "is_transformers_folder",
    "is_whole_model",
    "resolve_checkpoint",
    "resolve_language_model",
]

logger = logging.getLogger(__name__)

IMAGEBIND_FILE = "imagebind_huge.pth"
VISION_FILE = "eva_vit_g.pth"
QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class OriginalFiles:
    """Local paths of a checkpoint's files.

    Args:
        language_model: folder of the language model and its tokenizer.
        vision_encoder, qformer: EVA ViT-g; BLIP-2's Q-Former with the norm in front of it. None where the model has
            another frame encoder.
        video_branch, audio_branch: what was trained; None starts the branch untrained.
        imagebind: ImageBind; None for a model without audio branch.
        projection: a projection to start from (MiniGPT-4's); that of `video_branch` overrides it.
        config: our config.json with the sizes; None for the published ones.
        frame_encoder, audio_encoder: keys of other encoders than the published ones, their `path` a local one.
    """

    language_model: Path
    vision_encoder: Path | None
    qformer: Path | None
    video_branch: Path | None = None
    audio_branch: Path | None = None
    imagebind: Path | None = None
    projection: Path | None = None
    config: Path | None = None
    frame_encoder: dict[str, Any] | None = None
    audio_encoder: dict[str, Any] | None = None


def is_transformers_folder(folder: Path) -> bool:
    """Return whether this folder was written by `save_pretrained` (or `scripts/convert_checkpoint.py`).

    Raises:
        CheckpointError: it was, but its config.json is missing or damaged.
    """
    if (folder / "processor_config.json").exists():
        read_json_object(folder / "config.json")
    return _is_our_config(folder / "config.json") and _has_weights(folder)


def resolve_checkpoint(
    source: Source,
    audio: bool | None = None,
    wanted: str = "a folder with VL_*.pth and the files beside it, one that save_pretrained wrote, or video-llama-tiny",
) -> Path:
    """Return the local folder or file of a checkpoint in either layout, downloaded if need be.

    Of a hub id, `audio=False` leaves out what only the audio branch needs; `wanted` goes into the error message.

    Raises:
        CheckpointError: there is none.
    """
    if audio is False:
        return resolve_source(source, wanted, WITHOUT_AUDIO_PATTERNS)
    return resolve_source(source, wanted, CHECKPOINT_PATTERNS)


def is_whole_model(base: str) -> bool:
    """Whether a run began with a folder for transformers: a path, a model of the package or of the hub."""
    path = Path(base).expanduser()
    if not path.exists() and path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        path = resolve_checkpoint(base)
    return is_transformers_folder(path)


def find_original_files(
    source: Source,
    *,
    audio: bool | None = None,
    language_model: Source | None = None,
    vision_encoder: Source | None = None,
    qformer: Source | None = None,
    imagebind: Source | None = None,
) -> OriginalFiles:
    """Find the files of a published checkpoint.

    Args:
        source: the folder, its hub id, or the path of its `VL_*.pth` or `AL_*.pth`.
        audio: whether the model gets an audio branch; by default if there is an `AL_*.pth`.
        language_model: folder or hub id, if it is elsewhere.
        vision_encoder, qformer, imagebind: path or address (or the folder that holds it), if it is elsewhere.

    Raises:
        CheckpointError: a file is missing, or there are several and none was chosen.
    """
    path = resolve_checkpoint(source, audio)
    if path.is_file() and path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        raise CheckpointError(f"{path}: not a checkpoint; give a folder, or a file VL_*.pth in it")
    # The path may name the file of one branch. The file of the other one is then looked for in the same folder.
    video_branch = _chosen_or_only(path, "VL", required=True)
    audio_branch = None if audio is False else _chosen_or_only(path, "AL", required=bool(audio))
    # Use the keys of a configuration, so that the same rules find the remaining files.
    named = {
        "ckpt": video_branch,
        "ckpt_2": audio_branch,
        "llama_model": language_model,
        "vit_ckpt": vision_encoder,
        "q_former_model": qformer,
        "imagebind_ckpt_path": imagebind,
    }
    paths: dict[str, Any] = {key: os.fspath(path) for key, path in named.items() if path is not None}
    return configured_files(ModelConfig(equip_audio_branch=audio_branch is not None, **paths))


def configured_files(config: ModelConfig) -> OriginalFiles:
    """Find the files that a configuration's model section names.

    What it does not name is looked for beside the checkpoints: the language model, and files of the usual names.

    Raises:
        CheckpointError: a file is missing, or there are several and none was chosen.
    """
    use_audio = config.equip_audio_branch
    video_branch = audio_branch = imagebind = projection = None
    # What is given for audio does not count without audio branch.
    if config.ckpt is not None:
        video_branch = _branch_file(config.ckpt, "VL", "model.ckpt", use_audio)
    if config.ckpt_2 is not None and use_audio:
        audio_branch = _branch_file(config.ckpt_2, "AL", "model.ckpt_2", use_audio)
    # Look for the other files beside the first checkpoint that is given, else in the working folder.
    folder = next((file.parent for file in (video_branch, audio_branch) if file is not None), Path.cwd())
    language_model = resolve_language_model(config.llama_model or _find_language_model(folder))
    frame_encoder = chosen_part(config, "frame_encoder")
    audio_encoder = chosen_part(config, "audio_encoder") if use_audio else None
    vision_encoder = qformer = None
    config_folders = [folder]
    if frame_encoder is None:
        vision_encoder = _resolve_file(config.vit_ckpt, folder, VISION_FILE, VISION_ENCODER.file, EVA_VIT_G_URL)
        qformer = _resolve_file(config.q_former_model, folder, QFORMER_FILE, QFORMER.file, QFORMER_URL)
        config_folders.append(vision_encoder.parent)
    if use_audio and audio_encoder is None:
        imagebind = _resolve_file(config.imagebind_ckpt_path, folder, IMAGEBIND_FILE, AUDIO_ENCODER.file)
    if config.llama_proj_model is not None:
        projection = resolve_source(config.llama_proj_model, "model.llama_proj_model")
    return OriginalFiles(
        language_model=language_model,
        vision_encoder=vision_encoder,
        qformer=qformer,
        video_branch=video_branch,
        audio_branch=audio_branch,
        imagebind=imagebind,
        projection=projection,
        config=find_config(config_folders),
        frame_encoder=frame_encoder,
        audio_encoder=audio_encoder,
    )


def find_config(folders: Iterable[Path]) -> Path | None:
    """Return the first `config.json` with the sizes of a Video-LLaMA; None if there is none.

    Raises:
        CheckpointError: one is damaged.
    """
    for folder in folders:
        if _is_our_config(folder / "config.json"):
            return folder / "config.json"
    return None


def resolve_language_model(source: Source) -> Path:
    """Return the local folder of a language model, given as a path or hub id.

    Raises:
        CheckpointError: there is none, or it holds no weights.
    """
    wanted = LANGUAGE_MODEL.file
    path = resolve_source(source, wanted, LANGUAGE_MODEL_PATTERNS)
    # Pickled weights are downloaded only where a repository has no safetensors.
    if not _has_weights(path) and not Path(source).expanduser().exists():
        path = resolve_source(source, wanted, CHECKPOINT_PATTERNS)
    if _has_weights(path):
        return path
    if any(path.glob("consolidated.*.pth")):
        raise CheckpointError(
            f"{path}: LLaMA in Meta's own format; take the release for transformers (its name ends in -hf), "
            f"or convert it with transformers' convert_llama_weights_to_hf.py"
        )
    raise CheckpointError(
        f"{path}: not a language model: the folder must hold config.json and one of {', '.join(FOLDER_FILES)}"
    )


def _is_our_config(path: Path) -> bool:
    return os.path.lexists(path) and read_json_object(path).get("model_type") == VideoLlamaConfig.model_type


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").exists() and any((folder / name).exists() for name in FOLDER_FILES)


def _find_language_model(folder: Path) -> Path:
    found = sorted(child for child in folder.iterdir() if child.is_dir() and _has_weights(child))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several language models ({_names(found)}); say which one with llama_model")
    if not found:
        raise CheckpointError(
            f"{folder}: no language model; put its folder here (llama-2-7b-chat-hf/ with config.json, weights and "
            f"tokenizer.model), or say where it is with model_base (--model-base), in a configuration llama_model"
        )
    return found[0]


def _branch_file(source: Source, prefix: str, key: str, audio: bool) -> Path:
    """Return a branch's checkpoint: a file of any name, or that of a published folder or of a training run."""
    path = resolve_checkpoint(source, audio, wanted=key)
    if path.is_file():
        return path
    # Try a training run first: its folder has a log, and its checkpoints have other names than the published ones.
    found = run_checkpoint(path) or _chosen_or_only(path, prefix, required=True)
    assert found is not None
    return found


def _chosen_or_only(path: Path, prefix: str, required: bool) -> Path | None:
    """Return the path itself if it is a branch's checkpoint, else the only one of that branch in its folder."""
    if path.is_file() and (_holds(path, prefix) or (prefix == "VL" and not _holds(path, "AL"))):
        return path
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob(f"{prefix}*.pth")) or [file for file in _of_2023(folder) if _holds(file, prefix)]
    if len(found) == 1:
        return found[0]
    part = {"VL": VIDEO_BRANCH, "AL": AUDIO_BRANCH}[prefix]
    if not found:
        if required:
            raise CheckpointError(f"{folder}: no {prefix}*.pth, which holds the {part.name}; put it here")
        return None
    if path.is_file() and not required:
        # The folder of the 2023 series holds all its variants, and nothing says which of them belong together.
        logger.warning(
            "%s: several checkpoints of the %s (%s), so the model is loaded without; put the one that belongs to %s "
            "into a folder with it, or name it with model.ckpt_2 in a configuration",
            *(folder, part.name, _names(found), path.name),
        )
        return None
    raise CheckpointError(
        f"{folder}: several checkpoints ({_names(found)}) of the {part.name}; give the path of the one you "
        "mean, or put those that belong together into a folder of their own"
    )


def _of_2023(folder: Path) -> list[Path]:
    """Return what may be branches under names of 2023, such as finetune-vicuna7b-v2.pth; none beside later names."""
    files = sorted(folder.glob("*.pth"))
    if any(file.name[:2] in ("VL", "AL") for file in files):
        return []
    return [file for file in files if file.name not in (IMAGEBIND_FILE, VISION_FILE, QFORMER_FILE)]


def _holds(file: Path, prefix: str) -> bool:
    """Return whether a file is the checkpoint of a branch: by the prefix of its name, else by its weights."""
    if file.name[:2] in ("VL", "AL"):
        return file.name[:2] == prefix
    token = {"VL": "video_query_tokens", "AL": "audio_query_tokens"}[prefix]
    return token in open_weights(file)


def _resolve_file(source: Source | None, folder: Path, name: str, wanted: str, address: str | None = None) -> Path:
    """Return the file given (or in the folder given), else the one of this name in the folder, else its address."""
    # The public address is the default of the configuration, so it counts as not set: a local copy saves the download.
    if source is None or source == address:
        source = folder / name
        if address is not None and not source.exists():
            source = address
    path = resolve_source(source, wanted)
    return path / name if path.is_dir() else path


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
