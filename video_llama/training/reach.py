"""Find branches that a run would train without data, or learn through although their weights are random."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from video_llama.checkpoints.original_layout import is_transformers_folder, resolve_checkpoint
from video_llama.config import Config, DatasetConfig, ModelConfig
from video_llama.constants import Modality
from video_llama.data.build import EncodedDataset, holds_messages
from video_llama.data.examples import media_kinds
from video_llama.errors import ConfigError
from video_llama.model.parts import (
    AUDIO_PARTS,
    NOTHING_TRAINS,
    adapted_parts,
    branch_of,
    has_frame_qformer,
    trained_parts,
)
from video_llama.schema import FREEZING_KEYS

__all__ = ["Reach", "check_reach", "sends_images_to_audio"]

logger = logging.getLogger(__name__)

_VIDEO, _AUDIO = "video_branch", "audio_branch"


@dataclass(frozen=True)
class Reach:
    """Which branches the datasets of a mixture lead to.

    Args:
        certain: by branch, the datasets that surely have media for it.
        possible: by branch, those that may have some; messages name their media one by one.
    """

    certain: dict[str, list[str]]
    possible: dict[str, list[str]]

    @classmethod
    def of_sections(cls, config: Config) -> Reach:
        """Return what the keys alone tell, before any annotation is read."""
        reach = cls({_VIDEO: [], _AUDIO: []}, {_VIDEO: [], _AUDIO: []})
        as_audio = sends_images_to_audio(config)
        for name, section in _drawn(config):
            branches = [_branch(_MODALITIES[section.data_type], as_audio)]
            is_certain = not holds_messages(name, section)
            if not is_certain:
                branches = [_VIDEO, _AUDIO]
            for branch in branches:
                reach.possible[branch].append(name)
                if is_certain:
                    reach.certain[branch].append(name)
        return reach

    @classmethod
    def of_datasets(cls, config: Config, datasets: Iterable[EncodedDataset]) -> Reach:
        """Return what the examples themselves tell."""
        found: dict[str, list[str]] = {_VIDEO: [], _AUDIO: []}
        drawn = dict(_drawn(config))
        for dataset in datasets:
            if dataset.name not in drawn:
                continue
            left = {_VIDEO, _AUDIO}
            for example in dataset.examples:
                for kind in media_kinds(example):
                    # Frames stand in for audio where files are named by the dataset, not where messages name them.
                    branch = _branch(kind, dataset.encoder.images_as_audio and example.source is not None)
                    if branch in left:
                        left.remove(branch)
                        found[branch].append(dataset.name)
                # All files that a dataset itself names are of one kind.
                if not left or example.source is not None:
                    break
        return cls(found, found)


_MODALITIES: dict[str, Modality] = {"video": "video", "images": "image", "audio": "audio"}


def check_reach(config: Config, reach: Reach, *, has_model: bool = False) -> None:
    """Compare what trains, and what is random, with where the data lead.

    Args:
        config: of the run.
        reach: where its data lead.
        has_model: the model is not the one that the configuration names; only what trains is compared.

    Raises:
        ConfigError: a part trains that no dataset leads to, a dataset leads through a branch that is frozen and whose
            weights no file holds, or nothing trains; the message names the keys.
    """
    section = config.model
    if not (has_model or section.adapter or trained_parts(section) or adapted_parts(config.lora, section)):
        raise ConfigError(NOTHING_TRAINS)
    mistakes = [*_without_data(config, reach)]
    if sends_images_to_audio(config) and _names_other(section.audio_encoder, "imagebind"):
        mistakes.append(
            "audio parts train on videos and images through ImageBind alone, which maps them to one space, not through "
            f"model.audio_encoder {section.audio_encoder['name']!r}: name datasets with data_type: audio, or messages"
        )
    if not has_model:
        mistakes += _random(config.model, reach)
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def sends_images_to_audio(config: Config) -> bool:
    """Whether frames train the audio branch, as in the original; messages name their audio files themselves."""
    return bool(AUDIO_PARTS & trained_parts(config.model)) and any(
        section.data_type != "audio" and not holds_messages(name, section) for name, section in _drawn(config)
    )


def _drawn(config: Config) -> Iterator[tuple[str, DatasetConfig]]:
    """Yield the sections that samples are drawn from."""
    return ((name, section) for name, section in config.datasets.items() if section.sample_ratio != 0)


def _branch(kind: Modality, as_audio: bool) -> str:
    return _AUDIO if kind == "audio" or as_audio else _VIDEO


def _without_data(config: Config, reach: Reach) -> Iterator[str]:
    section = config.model
    whole, adapted = trained_parts(section), adapted_parts(config.lora, section)
    for branch in (_VIDEO, _AUDIO):
        vain = sorted(part for part in whole | adapted if branch_of(part) == branch)
        if not vain or reach.possible[branch]:
            continue
        keys = sorted({_key(part, section) for part in whole & set(vain)})
        keys += ["lora.target"] * bool(adapted & set(vain))
        sentence = f"{', '.join(keys)}: {', '.join(vain)} would train, but no dataset leads to the {_words(branch)}"
        if branch == _AUDIO:
            yield f"{sentence}: it needs datasets with data_type: audio, or messages with audio"
        elif sends_images_to_audio(config):
            yield (
                f"{sentence}: while audio parts train, videos and images stand in for audio, as in the original. Train "
                "the two branches in two runs, or name videos and audio in messages (docs/training.md)"
            )
        else:
            yield f"{sentence}: it needs datasets with data_type: video or images, or messages with them"


def _random(section: ModelConfig, reach: Reach) -> Iterator[str]:
    trained = trained_parts(section)
    for branch, parts in _branches_without_file(section).items():
        names = ", ".join(f"datasets.{name}" for name in reach.certain[branch])
        frozen = sorted(parts - trained)
        key, file = {_VIDEO: ("ckpt", "VL_*.pth"), _AUDIO: ("ckpt_2", "AL_*.pth")}[branch]
        if not frozen or not names:
            continue
        what = f"has random weights, because there is no model.{key}, and is frozen, but {names} would lead through it"
        advice = f"set model.{key} to a checkpoint ({file}, or the folder of a run)"
        if frozen != sorted(parts):
            # What trains can make up for a random part beside it, at a loss.
            logger.warning("the %s %s; %s, or train it", ", ".join(frozen), what, advice)
        elif branch == _AUDIO:
            yield f"the audio branch {what}: {advice}, or set model.equip_audio_branch: False"
        else:
            keys = "model.frozen_video_Qformer and frozen_llama_proj: False, or model.unfreeze"
            yield f"the video branch {what}: {advice}, or train it ({keys})"


def _branches_without_file(section: ModelConfig) -> dict[str, set[str]]:
    """Return, by branch, the parts whose weights no file of a model section holds."""
    random = {}
    if section.ckpt is None:
        random[_VIDEO] = {"video_qformer", "video_projection"}
        if _names_other(section.frame_encoder, "eva_vit_g") and has_frame_qformer(section):
            # BLIP-2's weights fit its own frame encoder only.
            random[_VIDEO].add("frame_qformer")
        if section.llama_proj_model is not None:
            random[_VIDEO].remove("video_projection")
    if section.equip_audio_branch and section.ckpt_2 is None and not _is_whole_model(section.ckpt):
        random[_AUDIO] = set(AUDIO_PARTS)
    return random


def _names_other(keys: Mapping[str, Any], published: str) -> bool:
    return keys.get("name", published) != published


def _is_whole_model(checkpoint: str | None) -> bool:
    return checkpoint is not None and is_transformers_folder(resolve_checkpoint(checkpoint))


def _key(part: str, section: ModelConfig) -> str:
    return f"model.{'unfreeze' if section.unfreeze is not None else FREEZING_KEYS[part]}"


def _words(branch: str) -> str:
    return branch.replace("_", " ")
