"""The settings in a folder that `save_pretrained` wrote: read as given by a stranger, and compared with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from video_llama.checkpoints.weight_files import Weights, open_weights
from video_llama.errors import CheckpointError, ConfigError, shown, translate_foreign
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.utils.files import read_json_object

__all__ = ["read_saved_config", "read_saved_processor"]

# Of a clip, in saved settings: thousands of times what the published models take.
_MAX_PARTS = 100_000

# Keys whose values are sizes of weights, by their endings.
_SIZES = ("size", "heads", "frequency", "tokens", "positions", "_dim", "_stride", "stride")


def read_saved_config(folder: Path) -> VideoLlamaConfig:
    """Return the configuration of a saved folder, with sizes that its weights can have.

    Raises:
        CheckpointError: config.json is missing, damaged, or says what cannot be true of the weights beside it.
    """
    file = folder / "config.json"
    content = read_json_object(file)
    _check_sizes_against(open_weights(folder), content, file)
    with translate_foreign(CheckpointError, file, "it must be the one that was saved with the weights"):
        return VideoLlamaConfig.from_pretrained(folder)


def read_saved_processor(folder: Path, config: VideoLlamaConfig, **overrides: Any) -> VideoLlamaProcessor:
    """Return the processor of a saved folder.

    Args:
        folder: what `save_pretrained` wrote.
        config: of the model in it.
        overrides: settings to replace, e.g. `use_audio`.

    Raises:
        CheckpointError: a file is missing or damaged, or is another model's; the message names it.
        ConfigError: settings that contradict each other.
    """
    # One by one, because transformers does not say which of them it stumbled over.
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        if name == "processor_config.json" or (folder / name).exists() or (folder / name).is_symlink():
            read_json_object(folder / name)
    where = f"{folder}: tokenizer.json, tokenizer_config.json or processor_config.json"
    file = folder / "processor_config.json"
    try:
        with translate_foreign(CheckpointError, where, "download or convert the folder again"):
            processor = VideoLlamaProcessor.from_pretrained(folder, **overrides)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    _check_processor_fits(processor, config, file)
    return processor


def _check_processor_fits(processor: VideoLlamaProcessor, config: VideoLlamaConfig, file: Path) -> None:
    """Refuse settings with which the model could not take what the processor makes."""
    media = processor.media_processor
    pairs: dict[str, tuple[Any, Any]] = {
        "image_size": (media.image_size, config.vision_config.image_size),
        "num_video_query_tokens": (processor.num_video_query_tokens, config.num_video_query_tokens),
    }
    if config.use_audio:
        mel = [media.log_mel.num_mel_bins, media.log_mel.num_mel_frames]
        pairs["num_mel_bins and num_mel_frames"] = (mel, list(config.audio_config.input_size))
        pairs["num_audio_query_tokens"] = (processor.num_audio_query_tokens, config.num_audio_query_tokens)
    for name, (value, of_model) in pairs.items():
        if value != of_model:
            raise CheckpointError(f"{file}: {name} is {shown(value)}, but the model beside it takes {of_model}")
    for name in ("num_frames", "num_audio_segments"):
        if getattr(media, name) > _MAX_PARTS:
            raise CheckpointError(f"{file}: {name} is {shown(getattr(media, name))}; at most {_MAX_PARTS} make sense")


def _check_sizes_against(weights: Weights, config: dict[str, Any], file: Path) -> None:
    """Refuse sizes that no model with these weights has, before modules of such sizes are built.

    Every layer has at least one tensor, and every size is one of a tensor's, or divides one.
    """
    num_values = sum(weights.header(name).numel() for name in weights)
    for key, value in _numbers(config):
        limit = num_values
        if key.endswith("layers"):
            limit = len(weights)
        elif not key.endswith(_SIZES):
            continue
        if not 0 <= value <= limit:
            raise CheckpointError(
                f"{file}: {key} is {shown(value)}, but the weights beside it hold {len(weights):,} tensors with "
                f"{num_values:,} values; it must be the file that was saved with them"
            )


def _numbers(section: dict[str, Any], above: str = "") -> Iterator[tuple[str, int]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{above}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{above}{name}", value
