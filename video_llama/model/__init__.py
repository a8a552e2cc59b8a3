"""Tensors to loss and text: the two media branches, the language model, and their checkpoints.

Importing this package makes `transformers`' Auto classes know Video-LLaMA folders.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from video_llama.model.backbone import VideoLlamaModel
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import saved_weight_renamings
from video_llama.processor.media_parts import (
    VideoLlamaFeatureExtractor,
    VideoLlamaImageProcessor,
    VideoLlamaVideoProcessor,
)
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = [
    "VideoLlamaConfig",
    "VideoLlamaFeatureExtractor",
    "VideoLlamaForConditionalGeneration",
    "VideoLlamaImageProcessor",
    "VideoLlamaModel",
    "VideoLlamaProcessor",
    "VideoLlamaVideoProcessor",
]

AutoConfig.register(VideoLlamaConfig.model_type, VideoLlamaConfig, exist_ok=True)
AutoModel.register(VideoLlamaConfig, VideoLlamaModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(VideoLlamaConfig, VideoLlamaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoLlamaConfig, VideoLlamaProcessor, exist_ok=True)
AutoImageProcessor.register(
    VideoLlamaConfig, image_processor_classes={"torchvision": VideoLlamaImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(VideoLlamaConfig, VideoLlamaVideoProcessor, exist_ok=True)
AutoFeatureExtractor.register(VideoLlamaConfig, VideoLlamaFeatureExtractor, exist_ok=True)
# `transformers serve` knows models by these names alone.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(
    VideoLlamaConfig.model_type, VideoLlamaForConditionalGeneration.__name__
)
register_checkpoint_conversion_mapping(VideoLlamaConfig.model_type, saved_weight_renamings(), overwrite=True)
