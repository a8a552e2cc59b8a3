"""Pretrain the parts of the small model one by one, and write them where the training stages look for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from examples.tiny_world.pretraining.architecture import (
    CONV_TEMPLATE,
    build_untrained_model,
    read_config,
    write_language_model_files,
)
from examples.tiny_world.pretraining.audio import load_segment_pool, train_audio_encoder
from examples.tiny_world.pretraining.frames import load_frame_pool
from examples.tiny_world.pretraining.language import train_language_model, train_qformer
from examples.tiny_world.pretraining.steps import StepSchedule
from examples.tiny_world.pretraining.texts import tokenizer_texts
from examples.tiny_world.pretraining.vision import train_vision_encoder
from video_llama.checkpoints.convert import write_original_folder
from video_llama.checkpoints.load import build_processor
from video_llama.checkpoints.weight_files import Weights
from video_llama.checkpoints.weight_mapping import AUDIO_BRANCH, PROJECTION, VIDEO_BRANCH, part_of
from video_llama.model.video_branch import VideoBranch
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["PARTS", "SCALES", "Scale", "prepare", "pretrain", "write_parts"]

logger = logging.getLogger(__name__)

PARTS = ("vision", "sound", "language", "qformer")
"""In the order of their dependence: the Q-Former needs the frame encoder and the language model."""

_NAME = "untrained"


@dataclass(frozen=True)
class Scale:
    """How much to train on.

    Attributes:
        steps: of each part.
        drawn_frames, clips, sound_files: in the pools of frames and audio segments.
    """

    steps: dict[str, int]
    drawn_frames: int
    clips: int
    sound_files: int


SCALES = {
    "full": Scale({"vision": 3000, "sound": 400, "language": 800, "qformer": 600}, 40_000, 4_000, 4_000),
    "smoke": Scale({"vision": 30, "sound": 20, "language": 30, "qformer": 20}, 200, 40, 60),
}
_LEARNING_RATES = {"vision": (5e-3, 1.5e-3), "sound": (3e-3, 1e-3), "language": (5e-3, 2e-3), "qformer": (3e-3, 1e-3)}
"""Of matrices, and of all else."""


def pretrain(part: str, corpus: Path, folder: Path, scale: Scale, seed: int = 1) -> None:
    """Train one of `PARTS`; a finished part is read, and an interrupted one continues.

    Args:
        part: which.
        corpus: what `make_clipworld.py` wrote.
        folder: for states, logs and pools.
        scale: how much to train on.
        seed: of the initial weights.

    Raises:
        FileNotFoundError: a part that this one needs is not finished.
    """
    model, processor = prepare(folder, seed)
    media = processor.media_processor
    schedule = StepSchedule(scale.steps[part], *_LEARNING_RATES[part], warmup_steps=min(100, scale.steps[part] // 5))
    if part == "sound":
        media = replace(media, num_audio_segments=2)
        pool = load_segment_pool(folder / "sounds.npz", corpus, media, scale.sound_files)
        assert model.audio_branch is not None
        train_audio_encoder(model.audio_branch.audio_encoder, pool, schedule, folder)
        return
    if part == "language":
        train_language_model(model, processor, schedule, folder)
        return
    frames = load_frame_pool(folder / "frames.npz", corpus, media, scale.drawn_frames, scale.clips)
    if part == "vision":
        train_vision_encoder(_published(model), media, frames, schedule, folder)
        return
    _read_frozen(folder, model)
    train_qformer(model, processor, frames.named(), schedule, folder)


def _published(model: VideoLlamaForConditionalGeneration) -> VideoBranch:
    assert isinstance(model.video_branch, VideoBranch)
    return model.video_branch


def write_parts(folder: Path, output: Path, seed: int = 1) -> None:
    """Write the trained parts in the original's layout, for the stage configurations to load."""
    model, _ = prepare(folder, seed)
    video, audio = _published(model), model.audio_branch
    assert audio is not None
    _read_state(folder / "sound.pt", {"encoder": audio.audio_encoder})
    _read_frozen(folder, model)
    _read_state(folder / "qformer.pt", {"qformer": video.qformer})
    queries = torch.load(folder / "qformer.pt", weights_only=True)["modules"]["queries.parameter"]
    video.query_tokens.data.copy_(queries)
    # What the stages train starts from values of the size that fits a width of 128; the default is for one of 768.
    model.config.initializer_range = model.config.video_qformer_config.hidden_size**-0.5
    output.mkdir(parents=True, exist_ok=True)
    write_original_folder(
        _PretrainedWeights(model), model.config, output, language_model_files=folder / "language_model", name=_NAME
    )


def prepare(folder: Path, seed: int = 1) -> tuple[VideoLlamaForConditionalGeneration, VideoLlamaProcessor]:
    """Return the untrained model and its processor; trains the tokenizer if `folder/language_model` has none yet."""
    language_model = folder / "language_model"
    language_model.mkdir(parents=True, exist_ok=True)
    if (language_model / "generation_config.json").exists():
        config = read_config(language_model)
    else:
        config = write_language_model_files(tokenizer_texts(seed), language_model)
    return build_untrained_model(config, seed), build_processor(config, language_model, CONV_TEMPLATE)


def _read_frozen(folder: Path, model: VideoLlamaForConditionalGeneration) -> None:
    """Load the frame encoder and the language model, which the Q-Former connects."""
    video = _published(model)
    _read_state(folder / "vision.pt", {"encoder": video.vision_encoder, "norm": video.vision_norm})
    _read_state(folder / "language.pt", {"model": model.language_model})


def _read_state(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    state = torch.load(file, weights_only=True)["modules"]
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})


class _PretrainedWeights(Weights):
    """The weights of a model that the stages do not train."""

    def __init__(self, model: VideoLlamaForConditionalGeneration) -> None:
        trained = {VIDEO_BRANCH, PROJECTION, AUDIO_BRANCH}
        kept = {name: value for name, value in model.state_dict().items() if part_of(name) not in trained}
        self._tensors = {to_saved_name(name): value for name, value in kept.items()}
        super().__init__(Path("pretrained"), {name: value.to("meta") for name, value in self._tensors.items()})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensors[name].to(dtype or self._tensors[name].dtype)
