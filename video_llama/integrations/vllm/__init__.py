"""Video-LLaMA in vLLM: a plug-in that vLLM finds by the entry point `vllm.general_plugins`.

vllm serve FOLDER, or `video-llama serve FOLDER` with the package's defaults; offline `vllm.LLM(FOLDER).chat(messages)`.
docs/serving.md has the requests. The media branches are the package's own; the language model, its cache, batches,
quantization and adapters are vLLM's.
"""

from __future__ import annotations

import logging
import os
import threading
import time

__all__ = ["OWNER", "register"]

logger = logging.getLogger(__name__)

OWNER = "VIDEO_LLAMA_VLLM_OWNER"
"""The variable with the id of the process that vLLM's processes must not outlive."""


def register() -> None:
    """Tell vLLM of the model; called in each of its processes, possibly more than once.

    vLLM runs every installed plug-in at each start, whatever model is wanted. An error here would stop them all, so it
    is logged, and only Video-LLaMA is missing then.
    """
    try:
        _end_with_owner()
        _register()
    except Exception:
        logger.exception("video_llama could not be registered with vLLM; other models are not affected")


def _end_with_owner() -> None:
    """End this process soon after its owner.

    vLLM's engine, which holds the memory of the GPU, would wait for ever for a client that was killed. Its own workers
    end with it.
    """
    owner = int(os.environ.get(OWNER, 0))
    if owner != os.getppid():
        return

    def wait() -> None:
        while os.getppid() == owner:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, name="video-llama-owner", daemon=True).start()


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    # Tells AutoConfig of the folders.
    import video_llama.model  # noqa: F401
    from video_llama.integrations.vllm.settings import ARCHITECTURE, TOKENIZER_MODE, VideoLlamaSettings

    if TOKENIZER_MODE in RENDERER_REGISTRY.renderers:
        return
    # Names only: model and renderer are imported where they are used.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.renderer", "VideoLlamaRenderer")
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = VideoLlamaSettings
