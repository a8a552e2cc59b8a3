"""Train and run Video-LLaMA, the audio-visual language model.

The public names are imported when they are first used, so that `import video_llama` itself loads neither torch nor
anything else that is heavy, and uses no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from video_llama.config import load_config
    from video_llama.conversation import Conversation, conv_templates
    from video_llama.inference.chat import Chat
    from video_llama.inference.engine import VideoLlama
    from video_llama.inference.generation import GenerationOptions
    from video_llama.inference.load import build_model, load_pretrained_model
    from video_llama.model.backbone import VideoLlamaModel
    from video_llama.model.configuration import VideoLlamaConfig
    from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
    from video_llama.processor.processing_video_llama import VideoLlamaProcessor

_HOME = {
    "Chat": "video_llama.inference.chat",
    "Conversation": "video_llama.conversation",
    "GenerationOptions": "video_llama.inference.generation",
    "VideoLlama": "video_llama.inference.engine",
    "VideoLlamaConfig": "video_llama.model",
    "VideoLlamaForConditionalGeneration": "video_llama.model",
    "VideoLlamaModel": "video_llama.model",
    "VideoLlamaProcessor": "video_llama.model",
    "build_model": "video_llama.inference.load",
    "conv_templates": "video_llama.conversation",
    "load_config": "video_llama.config",
    "load_pretrained_model": "video_llama.inference.load",
}

__all__ = [
    "Chat",
    "Conversation",
    "GenerationOptions",
    "VideoLlama",
    "VideoLlamaConfig",
    "VideoLlamaForConditionalGeneration",
    "VideoLlamaModel",
    "VideoLlamaProcessor",
    "__version__",
    "build_model",
    "conv_templates",
    "load_config",
    "load_pretrained_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
