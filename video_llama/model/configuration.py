"""Sizes of every part of Video-LLaMA; the defaults are the published Video-LLaMA-2-7B."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig

from video_llama.constants import IMAGE_MEAN, IMAGE_STD
from video_llama.model.encoder_configuration import AudioEncoderConfig, FrameEncoderConfig
from video_llama.model.precision import spare_parts
from video_llama.utils.remote_code import auto_map, write_remote_code

__all__ = ["ImageBindTrunkConfig", "VideoLlamaConfig", "VideoLlamaVisionConfig"]


class VideoLlamaVisionConfig(PreTrainedConfig):
    """EVA ViT-g/14 as BLIP-2 uses it (Fang et al. 2022; Li et al. 2023, section 4.1).

    Args:
        image_size: side of a frame in pixels; the position table is interpolated when a checkpoint has another.
        output_norm_eps: epsilon of the LayerNorm between the encoder and the Q-Former (`ln_vision`).
        drop_path_rate: stochastic depth of the last block, when the encoder itself is trained.
    """

    model_type = "video_llama_vision"
    base_config_key = "vision_config"
    # Under which it is registered, and what is fixed about it: as for `FrameEncoderConfig`, but not saved.
    name: ClassVar[str] = "eva_vit_g"
    module: ClassVar[None] = None
    mean: ClassVar[tuple[float, float, float]] = IMAGE_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGE_STD
    num_prefix_tokens: ClassVar[int] = 1

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    layer_norm_eps: float = 1e-6
    output_norm_eps: float = 1e-5
    drop_path_rate: float = 0.0

    @property
    def num_patches(self) -> int:
        """Return the number of patches of one frame."""
        side = self.image_size // self.patch_size
        return side * side

    @property
    def num_tokens(self) -> int:
        """Return the number of patches of one frame, plus the class token."""
        return self.num_patches + 1


class ImageBindTrunkConfig(PreTrainedConfig):
    """One modality of ImageBind-Huge (Girdhar et al. 2023, section 3.3 and appendix B).

    Args:
        modality: "audio" reads log-mel spectrograms with overlapping patches, "vision" reads RGB frames.
        input_size: (height, width) of one input: (mel bins, mel frames), or pixels.
        stride: distance between patches; below `patch_size` they overlap.
        temporal_patch_size: frames one vision patch spans; a still frame is repeated to fill it.
        output_size: length of the joint embedding.
    """

    model_type = "video_llama_imagebind_trunk"
    name: ClassVar[str] = "imagebind"
    module: ClassVar[None] = None

    modality: Literal["audio", "vision"] = "audio"
    input_size: tuple[int, ...] | list[int] = (128, 204)
    patch_size: int = 16
    stride: int = 10
    temporal_patch_size: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    output_size: int = 1024
    layer_norm_eps: float = 1e-6

    @classmethod
    def vision_huge(cls) -> ImageBindTrunkConfig:
        """Return the vision trunk of ImageBind-Huge, needed only to train the audio branch on images."""
        return cls(
            modality="vision",
            input_size=(224, 224),
            patch_size=14,
            stride=14,
            hidden_size=1280,
            num_hidden_layers=32,
            num_attention_heads=16,
            intermediate_size=5120,
        )

    @property
    def num_tokens(self) -> int:
        """Return the number of patches of one input, plus the class token."""
        height, width = ((side - self.patch_size) // self.stride + 1 for side in self.input_size)
        return height * width + 1


class VideoLlamaConfig(PreTrainedConfig):
    """The whole model (Zhang, Li and Bing 2023, section 2).

    Args:
        vision_config: the frame encoder; a `FrameEncoderConfig` for another than the published one.
        qformer_config: BLIP-2's Q-Former, applied to each frame (cross-attention in every second layer).
        video_qformer_config: the Q-Former over the tokens of all frames (cross-attention in every layer).
        audio_config: ImageBind's audio trunk; an `AudioEncoderConfig` for another encoder.
        imagebind_vision_config: ImageBind's vision trunk; None, the default, leaves it out. It is needed only
            to train the audio branch on images.
        audio_qformer_config: the Q-Former over the vectors of all audio segments.
        text_config: the language model; any configuration `AutoModelForCausalLM` knows.
        connector: what leads from the frame encoder to the language model, other than the published Q-Formers: its name
            in the registry `CONNECTORS`, under "name", and its settings.
        use_audio: build the audio branch.
        max_frame_positions: rows of the frame position table; longer videos interpolate it.
        max_segment_positions: rows of the segment position table; longer audio interpolates it.
        image_token_id, audio_token_id: ids that mark where features go. They default to the two ids above the
            language model's vocabulary, so that no text produces them.

    Example:
        >>> config = VideoLlamaConfig(use_audio=False)
        >>> config.num_video_query_tokens, config.image_token_id
        (32, 32000)
    """

    model_type = "video_llama"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "vision_config": VideoLlamaVisionConfig,
        "qformer_config": Blip2QFormerConfig,
        "video_qformer_config": Blip2QFormerConfig,
        "audio_config": ImageBindTrunkConfig,
        "imagebind_vision_config": ImageBindTrunkConfig,
        "audio_qformer_config": Blip2QFormerConfig,
        "text_config": AutoConfig,
    }

    # Each is given as a configuration, a dict of its keys or None, and is a configuration from then on.
    vision_config: Any = None
    qformer_config: Any = None
    video_qformer_config: Any = None
    audio_config: Any = None
    imagebind_vision_config: Any = None
    audio_qformer_config: Any = None
    text_config: Any = None

    connector: Any = None
    use_audio: bool = True
    num_query_tokens: int = 32
    num_video_query_tokens: int = 32
    num_audio_query_tokens: int = 8
    max_frame_positions: int = 32
    max_segment_positions: int = 8
    image_token_id: Any = None
    audio_token_id: Any = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # The sizes that follow from another part are filled in here, so that a config file need not repeat them.
        self.vision_config = _encoder_config(VideoLlamaVisionConfig, FrameEncoderConfig, self.vision_config)
        self.audio_config = _encoder_config(ImageBindTrunkConfig, AudioEncoderConfig, self.audio_config)
        if self.imagebind_vision_config is not None:
            self.imagebind_vision_config = _sub_config(ImageBindTrunkConfig, self.imagebind_vision_config)
        self.qformer_config = _sub_config(
            Blip2QFormerConfig, self.qformer_config, encoder_hidden_size=self.vision_config.hidden_size
        )
        two_layers = {"num_hidden_layers": 2, "cross_attention_frequency": 1}
        frames = {"encoder_hidden_size": self.qformer_config.hidden_size, **two_layers}
        if self.connector is not None:
            # No frame Q-Former lies between.
            frames["encoder_hidden_size"] = self.vision_config.hidden_size
        segments = {"encoder_hidden_size": self.audio_config.output_size, **two_layers}
        self.video_qformer_config = _sub_config(Blip2QFormerConfig, self.video_qformer_config, **frames)
        self.audio_qformer_config = _sub_config(Blip2QFormerConfig, self.audio_qformer_config, **segments)
        # Placeholder ids lie above the vocabulary, where no text can reach them.
        self.text_config = _text_config(self.text_config)
        vocab_size = self.text_config.get_text_config().vocab_size
        if self.image_token_id is None:
            self.image_token_id = vocab_size
        if self.audio_token_id is None:
            self.audio_token_id = vocab_size + 1
        # A folder that was saved quantized says what was left alone, by the names of that time.
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_parts(kwargs["quantization_config"])
        super().__post_init__(**kwargs | {"auto_map": auto_map()})

    @property
    def video_token_id(self) -> int:
        """Return the id that marks the features of a video: that of images."""
        return int(self.image_token_id)

    @property
    def frame_tokens_shape(self) -> tuple[int, int]:
        """Return what the frozen encoders give for one frame: (tokens, width)."""
        if self.connector is None:
            return self.num_query_tokens, self.qformer_config.hidden_size
        vision = self.vision_config
        return self.connector.get("tokens_per_frame") or vision.num_tokens, vision.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """Return all settings; those of a connector only where there is another than the published one."""
        values: dict[str, Any] = super().to_dict()
        if values.get("connector") is None:
            values.pop("connector", None)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `config.json`, and the module in which `trust_remote_code=True` finds the classes."""
        super().save_pretrained(save_directory, **kwargs)
        write_remote_code(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: `save_pretrained` does what transformers would do from here on, without copying the source."""


def _sub_config(
    config_class: type[PreTrainedConfig], given: dict[str, Any] | PreTrainedConfig | None, **defaults: Any
) -> PreTrainedConfig:
    """Return `given` as an instance of `config_class`; `defaults` stand in for keys that are not given."""
    if isinstance(given, PreTrainedConfig):
        return given
    return config_class(**{**defaults, **(given or {})})


def _encoder_config(
    published: type[PreTrainedConfig],
    other: type[PreTrainedConfig],
    given: dict[str, Any] | PreTrainedConfig | None,
) -> PreTrainedConfig:
    """Return the configuration of an encoder; what is given says by its `model_type` if it is another one."""
    if isinstance(given, dict) and given.get("model_type") == other.model_type:
        return other(**given)
    return _sub_config(published, given)


def _text_config(given: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """Return the language model's configuration; LLaMA-2-7B when none is given."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = {"model_type": "llama", **(given or {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})}
    return AutoConfig.for_model(values.pop("model_type"), **values)
