"""Match a model with its checkpoint's files by name and shape: every gap is known before anything else is read."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from video_llama.checkpoints.language_model import check_language_model
from video_llama.checkpoints.memory import build_skeleton
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.checkpoints.report import Found, LoadReport, Source, match_weights
from video_llama.checkpoints.weight_files import Weights, open_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    LANGUAGE_MODEL,
    PROJECTION,
    QFORMER,
    VIDEO_BRANCH,
    VISION_ENCODER,
    Part,
    is_stray,
    part_of,
)
from video_llama.model.configuration import VideoLlamaConfig

__all__ = ["log_report", "match_original", "match_transformers"]

logger = logging.getLogger(__name__)


def match_original(files: OriginalFiles, config: VideoLlamaConfig) -> LoadReport:
    """Find every weight of a model in the files; nothing is read but names and shapes.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
    """
    language_model = open_weights(files.language_model)
    check_language_model(language_model, config.text_config)
    sources = _open_sources(files)
    renamed = _is_renamed(config)
    if not renamed:
        sources.append(Source(language_model, LANGUAGE_MODEL.file_prefix))
    expected = _expected_weights(config)
    report = match_weights(expected, sources, _required_parts(files, config))
    report.raise_for_problems("the checkpoint")
    if renamed:
        report.found |= _as_stored(language_model)
    log_report(report)
    return report


def match_transformers(folder: Path, config: VideoLlamaConfig) -> LoadReport:
    """Find every weight of a model in a folder that `save_pretrained` wrote; nothing is read but names and shapes.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
    """
    expected = _expected_weights(config)
    required = {part for part in map(part_of, expected) if part is not None}
    report = match_weights(expected, [Source(open_weights(folder))], required, folder)
    report.raise_for_problems("the checkpoint")
    log_report(report)
    return report


def log_report(report: LoadReport) -> None:
    """Say what was loaded; loudly, if a file has names that mean nothing to us."""
    logger.log(logging.WARNING if report.unknown else logging.INFO, report.summary())


def _is_renamed(config: VideoLlamaConfig) -> bool:
    """Whether transformers may rename and merge the language model's stored weights, so that it must match them."""
    return config.text_config.model_type != "llama"


def _expected_weights(config: VideoLlamaConfig) -> dict[str, Tensor]:
    """All weights that files must hold, on the meta device: no tied ones, and none that transformers matches."""
    model = build_skeleton(config)
    left_out = set(model.all_tied_weights_keys)
    if _is_renamed(config):
        left_out |= {name for name in model.state_dict() if part_of(name) is LANGUAGE_MODEL}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def _open_sources(files: OriginalFiles) -> list[Source]:
    """In the original's order: what comes later goes before what comes earlier."""
    in_order = (
        (files.vision_encoder, VISION_ENCODER.file_prefix),
        (files.qformer, ""),
        (files.imagebind, AUDIO_ENCODER.file_prefix),
        (files.projection, ""),
        (files.video_branch, ""),
        (files.audio_branch, ""),
    )
    return [Source(open_weights(path), prefix) for path, prefix in in_order if path is not None]


def _required_parts(files: OriginalFiles, config: VideoLlamaConfig) -> set[Part]:
    """All that is built, but for the trainable parts that no file is given for: those start untrained."""
    required = {VISION_ENCODER, QFORMER, LANGUAGE_MODEL}
    if files.video_branch is not None:
        required |= {VIDEO_BRANCH, PROJECTION}
    if files.projection is not None:
        required |= {PROJECTION}
    if config.use_audio:
        required |= {AUDIO_ENCODER} | ({AUDIO_BRANCH} if files.audio_branch is not None else set())
    if config.imagebind_vision_config is not None:
        required |= {IMAGEBIND_VISION}
    return required


def _as_stored(language_model: Weights) -> dict[str, Found]:
    stored = (name for name in language_model if not is_stray(LANGUAGE_MODEL.file_prefix + name))
    return {f"language_model.{name}": Found(language_model, name) for name in stored}
