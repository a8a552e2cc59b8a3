"""Read the configuration in a language model's folder, and check its weights before gigabytes of them are read."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from video_llama.checkpoints.weight_files import Weights
from video_llama.errors import CheckpointError

__all__ = ["check_language_model", "guess_conv_template", "read_language_config"]

FINAL_NORM = "model.norm.weight"
EMBEDDINGS = "model.embed_tokens.weight"

LLAMA_2_CONTEXT = 4096

# LLaMA's final norm scales by 1 and more on average; in the difference of two LLaMAs it is around 0.
SMALLEST_FINAL_NORM = 0.1


def read_language_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the language model in a folder.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json is no configuration of a language model ({error})") from error


def guess_conv_template(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the conversation template that a language model was trained with.

    The Vicunas of 2023 are known by name, or by their context of 2048 tokens (LLaMA-2 has 4096). A model that is no
    LLaMA takes its tokenizer's chat template, if there is one.
    """
    if config.model_type != "llama" and tokenizer.chat_template:
        return "tokenizer"
    name = f"{folder.name} {config.name_or_path}".lower()
    is_vicuna_like = any(family in name for family in ("vicuna", "billa", "ziya"))
    short_context = getattr(config.get_text_config(), "max_position_embeddings", 0) < LLAMA_2_CONTEXT
    if is_vicuna_like or short_context:
        return "v1"
    return "llama_2"


def check_language_model(weights: Weights, config: PreTrainedConfig) -> None:
    """Refuse a LLaMA that would load and then answer nonsense.

    Args:
        weights: the opened folder.
        config: its configuration; models other than LLaMA are not checked.

    Raises:
        CheckpointError: delta weights, or tokens added to the tokenizer that the model has no embedding for.
    """
    if config.model_type != "llama":
        return
    # Delta weights load without an error, because their names and shapes are right. Only the values show what they are.
    if FINAL_NORM in weights:
        size = weights[FINAL_NORM].float().abs().mean().item()
        if size < SMALLEST_FINAL_NORM:
            raise CheckpointError(
                f"{weights.path}: delta weights, not a language model ({FINAL_NORM} is {size:.4f} on average, "
                f"a model's is around 1). Vicuna's first releases are differences to LLaMA: add them to LLaMA's "
                f"weights (FastChat's apply_delta does) and give the folder of the sum"
            )
    if EMBEDDINGS in weights:
        # The path of shards is their folder, that of a single file the file.
        folder = weights.path if weights.path.is_dir() else weights.path.parent
        _check_added_tokens(folder, rows=weights.header(EMBEDDINGS).shape[0])


def _check_added_tokens(folder: Path, rows: int) -> None:
    """Refuse Vicuna's tokenizer (32001 tokens) with LLaMA's weights (32000): the first padded batch would fail."""
    file = folder / "added_tokens.json"
    if not file.exists():
        return
    try:
        added = {token: int(number) for token, number in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a table of tokens ({error}); download it again") from error
    # Ids count from 0, so an id that equals the number of rows is already without an embedding.
    beyond = [token for token, number in added.items() if number >= rows]
    if beyond:
        raise CheckpointError(
            f"{folder}: the tokenizer adds {', '.join(beyond)}, but the weights have only {rows} tokens. Vicuna's "
            f"first release has 32001 tokens, LLaMA and later Vicunas have 32000: take tokenizer and weights of one "
            f"release"
        )
