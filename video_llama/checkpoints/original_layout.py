"""The files of a checkpoint in the original layout, found in a folder or given one by one.

VL_LLaMA_2_7B_Finetuned.pth          video Q-Former and projection
AL_LLaMA_2_7B_Finetuned.pth          audio Q-Former and projection; only to hear
imagebind_huge.pth                   audio encoder; only to hear
llama-2-7b-chat-hf/                  language model and tokenizer
eva_vit_g.pth                        frame encoder; here or at its public address
blip2_pretrained_flant5xxl.pth       BLIP-2 Q-Former; here or at its public address
config.json                          sizes, where they are not the published ones (written by our scripts)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from video_llama.checkpoints.hub import (
    CHECKPOINT_PATTERNS,
    LANGUAGE_MODEL_PATTERNS,
    WITHOUT_SOUND_PATTERNS,
    resolve_source,
)
from video_llama.checkpoints.trained_run import newest_checkpoint
from video_llama.checkpoints.weight_files import FOLDER_FILES
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

__all__ = [
    "OriginalFiles",
    "configured_files",
    "find_config",
    "find_original_files",
    "is_transformers_folder",
    "resolve_checkpoint",
    "resolve_language_model",
]

IMAGEBIND_FILE = "imagebind_huge.pth"
VISION_FILE = "eva_vit_g.pth"
QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"

_CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class OriginalFiles:
    """Local paths of a checkpoint's files.

    Args:
        language_model: folder of the language model and its tokenizer.
        vision_encoder: EVA ViT-g.
        qformer: BLIP-2's Q-Former with the norm in front of it.
        video_branch: what was trained for video; None starts it untrained.
        audio_branch: what was trained for sound; None starts it untrained, if the model hears at all.
        imagebind: ImageBind; needed if the model hears.
        projection: a projection to start from (MiniGPT-4's); `video_branch` goes before it.
        config: our config.json with the sizes; None for the published ones.
    """

    language_model: Path
    vision_encoder: Path
    qformer: Path
    video_branch: Path | None = None
    audio_branch: Path | None = None
    imagebind: Path | None = None
    projection: Path | None = None
    config: Path | None = None


def is_transformers_folder(folder: Path) -> bool:
    """Whether this folder was written by `save_pretrained` (or `scripts/convert_checkpoint.py`)."""
    return _is_our_config(folder / "config.json") and any((folder / name).exists() for name in FOLDER_FILES)


def resolve_checkpoint(
    source: Source,
    audio: bool | None = None,
    wanted: str = "a folder with VL_*.pth and the files beside it, or one of save_pretrained",
) -> Path:
    """The local folder or file of a checkpoint in either layout, downloaded if need be.

    Args:
        source: path, hub id or address.
        audio: False leaves out of the download what only sound needs.
        wanted: what it should be, for the error message.

    Raises:
        CheckpointError: there is none.
    """
    return resolve_source(source, wanted, WITHOUT_SOUND_PATTERNS if audio is False else CHECKPOINT_PATTERNS)


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
        audio: whether the model shall hear; by default if there is an `AL_*.pth`.
        language_model: folder or hub id, if it lies elsewhere.
        vision_encoder, qformer, imagebind: path or address (or the folder that holds it), if it lies elsewhere.

    Raises:
        CheckpointError: a file is missing, or there are several and none was chosen.
    """
    path = resolve_checkpoint(source, audio)
    if path.is_file() and path.suffix not in _CHECKPOINT_SUFFIXES:
        raise CheckpointError(f"{path}: not a checkpoint; give a folder, or a file VL_*.pth in it")
    folder = path if path.is_dir() else path.parent
    video_branch = _chosen_or_only(path, folder, "VL", required=True)
    audio_branch = None if audio is False else _chosen_or_only(path, folder, "AL", required=bool(audio))
    hears = audio_branch is not None
    return OriginalFiles(
        language_model=resolve_language_model(language_model or _find_language_model(folder)),
        vision_encoder=_resolve_file(vision_encoder, folder, VISION_FILE, EVA_VIT_G_URL, VISION_ENCODER.file),
        qformer=_resolve_file(qformer, folder, QFORMER_FILE, QFORMER_URL, QFORMER.file),
        video_branch=video_branch,
        audio_branch=audio_branch,
        imagebind=_resolve_file(imagebind, folder, IMAGEBIND_FILE, None, AUDIO_ENCODER.file) if hears else None,
        config=find_config([folder]),
    )


def configured_files(config: ModelConfig) -> OriginalFiles:
    """The files that a configuration's model section names.

    What it does not name is looked for beside the checkpoints: the language model, and files of the usual names.

    Raises:
        CheckpointError: a file is missing, or there are several and none was chosen.
    """
    hears = config.equip_audio_branch
    video = None if config.ckpt is None else _branch_file(config.ckpt, "VL", "model.ckpt", hears)
    audio = _branch_file(config.ckpt_2, "AL", "model.ckpt_2", hears) if hears and config.ckpt_2 is not None else None
    beside = next((file.parent for file in (video, audio) if file is not None), Path.cwd())
    language_model = resolve_language_model(config.llama_model or _find_language_model(beside))
    vision = None if config.vit_ckpt == EVA_VIT_G_URL else config.vit_ckpt
    qformer = None if config.q_former_model == QFORMER_URL else config.q_former_model
    projection = config.llama_proj_model
    vision_encoder = _resolve_file(vision, beside, VISION_FILE, EVA_VIT_G_URL, VISION_ENCODER.file)
    return OriginalFiles(
        language_model=language_model,
        vision_encoder=vision_encoder,
        qformer=_resolve_file(qformer, beside, QFORMER_FILE, QFORMER_URL, QFORMER.file),
        video_branch=video,
        audio_branch=audio,
        imagebind=_resolve_file(config.imagebind_ckpt_path, beside, IMAGEBIND_FILE, None, AUDIO_ENCODER.file)
        if hears
        else None,
        projection=None if projection is None else resolve_source(projection, "model.llama_proj_model"),
        config=find_config([beside, vision_encoder.parent]),
    )


def find_config(folders: Iterable[Path]) -> Path | None:
    """The first `config.json` with the sizes of a Video-LLaMA; None if there is none.

    Raises:
        CheckpointError: one is damaged.
    """
    return next((folder / "config.json" for folder in folders if _is_our_config(folder / "config.json")), None)


def resolve_language_model(source: Source) -> Path:
    """The local folder of a language model, given as a path or hub id.

    Raises:
        CheckpointError: there is none, or it holds no weights.
    """
    wanted = LANGUAGE_MODEL.file
    path = resolve_source(source, wanted, LANGUAGE_MODEL_PATTERNS)
    if not _has_weights(path) and not Path(source).expanduser().exists():  # a repository without safetensors
        path = resolve_source(source, wanted, CHECKPOINT_PATTERNS)
    if any(path.glob("consolidated.*.pth")) and not _has_weights(path):
        raise CheckpointError(
            f"{path}: LLaMA in Meta's own format; take the release for transformers (its name ends in -hf), "
            f"or convert it with transformers' convert_llama_weights_to_hf.py"
        )
    if not _has_weights(path):
        raise CheckpointError(
            f"{path}: no language model here; the folder must hold config.json and one of {', '.join(FOLDER_FILES)}"
        )
    return path


def _is_our_config(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == VideoLlamaConfig.model_type
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a configuration ({error}); download it again") from error


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").exists() and any((folder / name).exists() for name in FOLDER_FILES)


def _find_language_model(folder: Path) -> Path:
    found = sorted(child for child in folder.iterdir() if child.is_dir() and _has_weights(child))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder}: several language models ({_names(found)}); say which one with llama_model")
    raise CheckpointError(
        f"{folder}: no language model; put its folder here (llama-2-7b-chat-hf/ with config.json, weights and "
        f"tokenizer.model), or say where it is with llama_model"
    )


def _branch_file(source: Source, prefix: str, key: str, audio: bool) -> Path:
    """A branch's checkpoint: a file of any name, the folder of its `VL_*.pth` or `AL_*.pth`, or its training's."""
    path = resolve_checkpoint(source, audio, wanted=key)
    if path.is_file():
        return path
    trained = newest_checkpoint(path)
    if trained is not None:
        return trained
    file = _chosen_or_only(path, path, prefix, required=True)
    assert file is not None
    return file


def _chosen_or_only(path: Path, folder: Path, prefix: str, required: bool) -> Path | None:
    if path.is_file() and path.name.startswith(prefix):
        return path
    found = sorted(folder.glob(f"{prefix}*.pth"))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several checkpoints ({_names(found)}); give the path of the one you mean")
    if not found and path.is_file() and prefix == "VL" and not path.name.startswith("AL"):
        return path  # the checkpoints of 2023 have other names
    if not found and required:
        part = VIDEO_BRANCH if prefix == "VL" else AUDIO_BRANCH
        raise CheckpointError(f"{folder}: no {prefix}*.pth, which holds the {part.name}; put it here")
    return found[0] if found else None


def _resolve_file(source: Source | None, folder: Path, name: str, address: str | None, wanted: str) -> Path:
    """The file given (or in the folder given), else the one of this name in the folder, else its address."""
    if source is None:
        source = folder / name if (folder / name).exists() or address is None else address
    path = resolve_source(source, wanted)
    return path / name if path.is_dir() else path


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
