"""The import path of `load_pretrained_model` in users' scripts; the code is in `video_llama.inference.load`."""

from __future__ import annotations

from video_llama.inference.load import build_model, load_pretrained_model

__all__ = ["build_model", "load_pretrained_model"]
