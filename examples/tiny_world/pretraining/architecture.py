"""Sizes and tokenizer of the small model: every part of the full model, much narrower."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import GenerationConfig

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.tokenizer import load_tokenizer
from video_llama.utils.devices import set_seed

__all__ = ["CONV_TEMPLATE", "build_untrained_model", "write_language_model_files"]

CONV_TEMPLATE = "video_llama_2"
"""The template of instruction dialogues for LLaMA-2; the small model never saw the longer one for chats."""

_VOCABULARY_SIZE = 840
_QFORMER: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    # A generated world has more samples than a model this small can memorise.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SIZES: dict[str, Any] = {
    "vision_config": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
    },
    "qformer_config": {**_QFORMER, "num_hidden_layers": 4},
    "video_qformer_config": _QFORMER,
    "audio_config": {
        "input_size": (64, 204),
        "patch_size": 16,
        "stride": 12,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "output_size": 64,
    },
    "audio_qformer_config": _QFORMER,
    "num_query_tokens": 8,
    "num_video_query_tokens": 12,
    "num_audio_query_tokens": 4,
}
_TEXT_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def write_language_model_files(texts: Iterable[str], folder: Path) -> VideoLlamaConfig:
    """Train a LLaMA-like tokenizer, write it and the language model's configuration, and return that of the whole.

    Args:
        texts: to train the tokenizer on.
        folder: an existing folder; gets `tokenizer.model`, `config.json` and `generation_config.json`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=_VOCABULARY_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # Two spaces, which chats have behind media, are read like one.
        allow_whitespace_only_pieces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = read_config(folder)
    config.text_config.save_pretrained(folder)
    GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)
    return config


def read_config(folder: Path) -> VideoLlamaConfig:
    """Return the configuration of the whole model, for the tokenizer in a folder."""
    tokenizer = load_tokenizer(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = VideoLlamaConfig(
        **_SIZES, text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_TEXT_SIZES, **ids}
    )
    config.text_config.dtype = torch.float32
    config.text_config.architectures = ["LlamaForCausalLM"]
    return config


def build_untrained_model(config: VideoLlamaConfig, seed: int) -> VideoLlamaForConditionalGeneration:
    """Return the model with random weights, in float32."""
    set_seed(seed)
    model = VideoLlamaForConditionalGeneration(config)
    model.post_init()
    return model.float()
