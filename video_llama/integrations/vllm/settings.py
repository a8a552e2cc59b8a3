"""What vLLM must know of every Video-LLaMA folder, so that no option is needed."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

__all__ = ["ARCHITECTURE", "TOKENIZER_MODE", "VideoLlamaSettings"]

ARCHITECTURE = "VideoLlamaForConditionalGeneration"
"""What `config.json` of a saved folder names."""
TOKENIZER_MODE = "video_llama"
"""What selects the renderer."""


class VideoLlamaSettings(VerifyAndUpdateConfig):
    """Adjusts vLLM's settings when a Video-LLaMA folder is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Select the renderer: any other would let typed text pass for media and special tokens."""
        model_config.tokenizer_mode = TOKENIZER_MODE
