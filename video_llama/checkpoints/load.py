"""Load a model from files: one way for every layout and every option of transformers' `from_pretrained`.

The files are matched against the model by name and shape first (`report.py`). Then transformers builds the model
without memory and asks for the tensors one by one; each is copied from its file straight to where it stays.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from video_llama.checkpoints.chosen_parts import PUBLISHED, chosen_part, chosen_sizes, connector_sizes
from video_llama.checkpoints.integrity import check_finite
from video_llama.checkpoints.language_model import guess_conv_template, read_language_config
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.checkpoints.quantization import prepare_quantized_layers
from video_llama.checkpoints.report import POSITION_TABLE, LoadReport, match_checkpoint
from video_llama.checkpoints.weight_files import TensorRef, converted_dtype
from video_llama.checkpoints.weight_mapping import TRAINABLE_PARTS, part_of
from video_llama.config import ModelConfig
from video_llama.errors import CheckpointError, ConfigError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_configuration import AudioEncoderConfig
from video_llama.model.eva_vit import interpolate_position_table
from video_llama.model.parts import part_of_parameter
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name
from video_llama.processor.audio_features import LogMelSettings
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.tokenizer import load_tokenizer

__all__ = ["build_processor", "check_sizes", "configured_config", "configured_sizes", "load_model", "original_config"]

# Keys of the model section, and where their value is in the model's own configuration.
_PLACES = {
    "image_size": "vision_config.image_size",
    "fusion_head_layers": "video_qformer_config.num_hidden_layers",
    "num_query_token": "num_query_tokens",
    "num_video_query_token": "num_video_query_tokens",
    "num_audio_query_token": "num_audio_query_tokens",
    "max_frame_pos": "max_frame_positions",
}


def original_config(files: OriginalFiles, **changes: Any) -> VideoLlamaConfig:
    """Return the sizes of the model that the files hold: of the `config.json` beside them, else the published ones.

    The language model's part always comes from its own folder. There is an audio branch if there are files for it.

    Args:
        files: where everything is.
        changes: fields of `VideoLlamaConfig` to change.

    Raises:
        CheckpointError: a configuration file is missing or damaged.
    """
    # Later entries override earlier ones: published sizes, the file beside the weights, what is loaded, then `changes`.
    fields: dict[str, Any] = {}
    if files.config is not None:
        fields, _ = VideoLlamaConfig.get_config_dict(files.config)
    # The placeholders' ids follow the vocabulary of the language model that is loaded.
    fields |= {"image_token_id": None, "audio_token_id": None}
    has_audio = files.imagebind is not None or files.audio_encoder is not None
    fields |= {"use_audio": has_audio, "text_config": read_language_config(files.language_model)}
    return VideoLlamaConfig(**{**fields, **changes})


def configured_config(section: ModelConfig, files: OriginalFiles) -> VideoLlamaConfig:
    """Return the sizes of the model that a configuration's model section and its files describe.

    Raises:
        ConfigError: the section contradicts the config.json beside the files.
        CheckpointError: a configuration file is missing or damaged.
    """
    if files.config is None:
        return original_config(files, **configured_sizes(section))
    config = original_config(files)
    if section.connector:
        # The file speaks of the weights beside it, of which the connector that is named here need not be one.
        config = original_config(files, **_named_connector(section, config, files.config))
    check_sizes(section, config, files.config)
    return config


def _named_connector(section: ModelConfig, config: VideoLlamaConfig, file: Path) -> dict[str, Any]:
    """Return the fields that `model.connector` changes; published sizes of the section count as not set."""
    if "frame_layers" in section.connector:
        raise ConfigError(f"{file} has the sizes of the weights beside it: leave out model.connector.frame_layers")
    fields = connector_sizes(section)
    # The Q-Formers on each frame and on audio keep the sizes of their weights.
    fields.pop("qformer_config", None)
    fields.pop("audio_qformer_config", None)
    sizes = config.video_qformer_config.to_dict() | fields.pop("video_qformer_config", {})
    if section.fusion_head_layers != ModelConfig.fusion_head_layers:
        sizes["num_hidden_layers"] = section.fusion_head_layers
    if section.num_video_query_token != ModelConfig.num_video_query_token:
        fields.setdefault("num_video_query_tokens", section.num_video_query_token)
    return {**fields, "video_qformer_config": sizes}


def configured_sizes(section: ModelConfig) -> dict[str, Any]:
    """Return the sizes that a model section and its encoders set; all others are those of the published model.

    Raises:
        ConfigError: unknown parts, or keys that they do not have.
        CheckpointError: there is no encoder at a path.
    """
    head = {"num_hidden_layers": section.fusion_head_layers, "cross_attention_frequency": 1}
    connector = connector_sizes(section)
    encoders: dict[str, Any] = {
        "vision_config": {"image_size": section.image_size, "drop_path_rate": section.drop_path_rate}
    }
    frames = chosen_part(section, "frame_encoder")
    if frames is not None:
        if (section.image_size, section.drop_path_rate) != (ModelConfig.image_size, ModelConfig.drop_path_rate):
            raise ConfigError(
                "model.image_size and drop_path_rate are of EVA ViT-g: leave them out, or set "
                "model.frame_encoder.image_size"
            )
        encoders["vision_config"] = chosen_sizes("frame_encoder", frames)
    audio = chosen_part(section, "audio_encoder") if section.equip_audio_branch else None
    if audio is not None:
        encoders["audio_config"] = chosen_sizes("audio_encoder", audio)
    sizes = {
        **encoders,
        "video_qformer_config": head | connector.pop("video_qformer_config", {}),
        "audio_qformer_config": head | connector.pop("audio_qformer_config", {}),
        "num_query_tokens": section.num_query_token,
        "num_video_query_tokens": section.num_video_query_token,
        "num_audio_query_tokens": section.num_audio_query_token,
        "max_frame_positions": section.max_frame_pos,
    }
    return sizes | connector


def check_sizes(section: ModelConfig, config: VideoLlamaConfig, file: Path) -> None:
    """Compare a model section with the configuration that a config.json describes.

    The published sizes, which are the section's defaults, count as not set.

    Raises:
        ConfigError: they differ; the message names all keys and the file.
    """
    published, differences = ModelConfig(), []
    for key, place in _PLACES.items():
        value, built = getattr(section, key), attrgetter(place)(config)
        if value not in (getattr(published, key), built):
            differences.append(f"model.{key} is {value}, but there it is {built}")
    for key, built in _part_names(config).items():
        named = getattr(section, key).get("name", built)
        if named != built:
            differences.append(f"model.{key}.name is {named}, but there it is {built}")
    if differences:
        raise ConfigError(
            f"{file} has the sizes of the weights beside it: {'; '.join(differences)}. Leave out what it says, or name "
            "the files of another model"
        )


def _part_names(config: VideoLlamaConfig) -> dict[str, str]:
    """Return the names of a model's parts, by the key of the model section."""
    names = {"frame_encoder": config.vision_config.name, "connector": PUBLISHED["connector"]}
    if config.use_audio:
        names["audio_encoder"] = config.audio_config.name
    if config.connector is not None:
        names["connector"] = config.connector["name"]
    return names


def build_processor(
    config: VideoLlamaConfig, language_model: Path, conv_template: str | None = None
) -> VideoLlamaProcessor:
    """Build the processor of a model that has none saved with it.

    Args:
        config: the model's, for the sizes of images, audio and placeholders.
        language_model: folder with the tokenizer.
        conv_template: the conversation template; by default the one that belongs to the language model.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
        ConfigError: no such template, or a tokenizer with more ids than the language model.
    """
    tokenizer = load_tokenizer(language_model)
    return VideoLlamaProcessor(
        tokenizer,
        config.image_token_id,
        config.audio_token_id,
        media_processor=_media_processor(config),
        num_video_query_tokens=config.num_video_query_tokens,
        num_audio_query_tokens=config.num_audio_query_tokens,
        use_audio=config.use_audio,
        conv_template=conv_template or guess_conv_template(language_model, config.text_config, tokenizer),
    )


def _media_processor(config: VideoLlamaConfig) -> MediaProcessor:
    """Return how the encoders of a model want their media."""
    vision, audio = config.vision_config, config.audio_config
    size, frames = audio.input_size
    media = MediaProcessor(vision.image_size, mean=tuple(vision.mean), std=tuple(vision.std))
    if not isinstance(audio, AudioEncoderConfig):
        return replace(media, log_mel=LogMelSettings(num_mel_bins=size, num_mel_frames=frames))
    log_mel = LogMelSettings(
        sample_rate_hz=audio.sample_rate_hz,
        segment_seconds=audio.segment_seconds,
        num_mel_bins=size,
        num_mel_frames=frames,
        extractor=audio.extractor,
    )
    return replace(media, log_mel=log_mel, num_audio_segments=audio.num_segments)


def load_model(
    source: OriginalFiles | Path,
    config: VideoLlamaConfig,
    dtype: torch.dtype,
    *,
    trainable_dtype: torch.dtype | None = None,
    trained: Collection[str] = (),
    override: Path | None = None,
    skeleton: VideoLlamaForConditionalGeneration | None = None,
    **options: Any,
) -> VideoLlamaForConditionalGeneration:
    """Load a model, in evaluation mode.

    Args:
        source: the files of the original layout, or a folder that `save_pretrained` wrote.
        config: the model to build. It may leave out parts that the files have, and its image size may differ from that
            of the original's files: the position table is interpolated.
        dtype: of all parameters.
        trainable_dtype: of the parts that train in the published recipe and of `trained`, if it differs; their
            weights are not rounded on the way.
        trained: more parts that train, by the names of `model/parts.py`.
        override: a checkpoint whose weights count in the place of those of a folder.
        skeleton: what `build_skeleton(config)` gave, to save its time.
        options: `device_map`, `attn_implementation`, `quantization_config` and whatever else transformers'
            `from_pretrained` takes.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model or are not finite numbers.
        ConfigError: the device map leaves weights on the disk, from where these files cannot be read piece by piece.
    """
    folder = source if isinstance(source, Path) else None
    is_quantized = folder is not None and getattr(config, "quantization_config", None) is not None
    # Weights that were saved quantized have names of their own.
    report = LoadReport() if is_quantized else match_checkpoint(source, config, skeleton, override)
    # transformers reads a folder of its own itself, but would keep all that it has read mapped until the end: four
    # times what remains in 4 bit.
    is_direct = folder is not None and (is_quantized or options.get("quantization_config") is None)
    is_direct = is_direct and override is None
    if not is_direct:
        options["state_dict"] = _stored_tensors(report.found, dtype, config)
    with _reported_by_us():
        model, info = VideoLlamaForConditionalGeneration.from_pretrained(
            folder if is_direct else None,
            config=config,
            dtype=dtype,
            # Weights of another shape are reported by name and part, before or below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_language_model_is_whole(source, info)
    prepare_quantized_layers(model, for_training=trainable_dtype is not None)
    if is_quantized:
        # Beside quantized weights transformers keeps some others in float32.
        for branch in filter(None, (model.video_branch, model.audio_branch)):
            branch.to(dtype)
    if folder is not None and not is_direct and (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if trainable_dtype is not None:
        _reload_trainable(model, report, trainable_dtype, trained)
    check_finite(model, folder or "the checkpoint")
    return model


@dataclass(frozen=True)
class _StoredTensor:
    """A weight that is read when transformers slices it (`tensor[...]`), as it does with safetensors' own slices."""

    place: TensorRef
    dtype: torch.dtype
    num_patches: int | None = None

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self.place.read(self.dtype)
        # Interpolate before slicing: transformers expects the shape of the model, not that of the file.
        if self.num_patches is not None:
            tensor = interpolate_position_table(tensor, self.num_patches)
        return tensor[index]


def _stored_tensors(found: Mapping[str, TensorRef], dtype: torch.dtype, config: VideoLlamaConfig) -> dict[str, Any]:
    """Return a `state_dict` of weights that are still on disk."""
    # The image size may differ from that of the file. The model needs one position for each patch of its own images.
    stored = {name: _StoredTensor(place, converted_dtype(name, place.header, dtype)) for name, place in found.items()}
    if POSITION_TABLE in stored and config.vision_config.name == PUBLISHED["frame_encoder"]:
        num_patches = config.vision_config.num_patches
        stored[POSITION_TABLE] = replace(stored[POSITION_TABLE], num_patches=num_patches)
    return stored


@contextlib.contextmanager
def _reported_by_us() -> Iterator[None]:
    """Drop transformers' warnings, which list by single parameters what our report says by part; translate its error.

    Raises:
        ConfigError: weights of the original's files would stay on the disk.
    """
    theirs = logging.getLogger("transformers.modeling_utils")
    # Not by its level: with one set there, transformers says more.
    theirs.disabled = True
    try:
        yield
    except ValueError as error:
        # transformers raises a plain ValueError here, so only its message tells this case from others.
        if "offload_folder" not in str(error):
            raise
        raise ConfigError(
            "device_map leaves weights on the disk, as only a folder in transformers' layout allows: convert the "
            "checkpoint first (scripts/convert_checkpoint.py), or keep more of it on the CPU"
        ) from error
    finally:
        theirs.disabled = False


def _check_language_model_is_whole(source: OriginalFiles | Path, info: Mapping[str, Any]) -> None:
    """Refuse what transformers could not place or fill, for the models whose weights it renames."""
    folder = source if isinstance(source, Path) else source.language_model
    prefix = "language_model."
    missing = map(to_saved_name, info["missing_keys"])
    names = sorted(name.removeprefix(prefix) for name in missing if name.startswith(prefix))
    problem = "are missing"
    if not names:
        names = sorted(to_saved_name(entry[0]).removeprefix(prefix) for entry in info["mismatched_keys"])
        problem = "have another shape"
    if names:
        raise CheckpointError(
            f"{folder}: {len(names)} weights {problem} ({', '.join(names[:3])}, …); config.json and weights may be of "
            f"different models. If transformers alone can load this folder, save it anew with its save_pretrained"
        )


def _reload_trainable(
    model: VideoLlamaForConditionalGeneration, report: LoadReport, dtype: torch.dtype, trained: Collection[str]
) -> None:
    """Give the parts that train their own dtype, with values read anew so that none was rounded."""
    for name, parameter in model.named_parameters():
        if part_of(name) in TRAINABLE_PARTS or part_of_parameter(name) in trained:
            # The loaded value was rounded to the dtype of the frozen parts, so read the stored one again. A part
            # without a file keeps its initial values.
            stored = report.found.get(to_saved_name(name))
            value = stored.read() if stored else parameter.data
            if to_saved_name(name) == POSITION_TABLE:
                value = interpolate_position_table(value, parameter.shape[1] - 1)
            parameter.data = value.to(device=parameter.device, dtype=dtype)
