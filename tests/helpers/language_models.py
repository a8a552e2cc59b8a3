"""Language models of other families, tiny and random: their special tokens, their chat template, their architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Each: architecture, BOS, EOS, other special tokens, and what an answer ends with. The templates are written for these
# tests after what the families' documentation says of their turns.
_CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "eos": "<|im_end|>",
        "others": ["<|im_start|>", "<|endoftext|>"],
        "chat_template": _CHATML,
        "ending": "<|im_end|>",
    },
    "llama": {  # Llama-3: the architecture of LLaMA-2, with other tokens and turns
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "others": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        "chat_template": _HEADERS,
        "ending": "<|eot_id|>",
    },
    "phi3": {
        "eos": "<|endoftext|>",
        "others": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "chat_template": _PHI,
        "ending": "<|end|>\n<|endoftext|>",
    },
    "gemma": {
        "bos": "<bos>",
        "eos": "<eos>",
        "others": ["<start_of_turn>", "<end_of_turn>"],
        "chat_template": _NO_SYSTEM,
        "ending": "<end_of_turn>",
    },
    "gpt2": {"eos": "<|endoftext|>", "others": [], "chat_template": None, "ending": ""},
}


def build_family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, one id per byte, with the special tokens and the chat template of a family."""
    about = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {key: about[key.removesuffix("_token")] for key in ("bos_token", "eos_token") if key[:3] in about}
    backend.add_special_tokens([*names.values(), *about["others"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = about["chat_template"]
    return tokenizer


def make_language_model(family: str, folder: Path) -> Path:
    """Write a language model's folder as `save_pretrained` does."""
    tokenizer = build_family_tokenizer(family)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **({"head_dim": 8} if family == "gemma" else {}),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
