"""Read the configuration in a language model's folder, and check its weights before gigabytes of them are read."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from video_llama.checkpoints.weight_files import Weights
from video_llama.conversation import conv_templates
from video_llama.errors import CheckpointError, translate_foreign
from video_llama.utils.files import read_json_object

__all__ = ["check_language_model", "family_of", "guess_conv_template", "named_template", "read_language_config"]

FINAL_NORM = "model.norm.weight"
EMBEDDINGS = "model.embed_tokens.weight"

LLAMA_2_CONTEXT = 4096

# The templates of each family of the original's language models; the first is that of chats, the second the one that
# dialogues are learnt in.
_FAMILIES = {
    "llama_v2": ("llama_2", "video_llama_2"),
    "vicuna": ("v1", "instruct_vicuna", "default", "video_vicuna", "vision"),
}

# LLaMA's final norm scales by 1 and more on average; in the difference of two LLaMAs it is around 0.
SMALLEST_FINAL_NORM = 0.1


def read_language_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the language model in a folder.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that transformers does not know.
    """
    file = folder / "config.json"
    read_json_object(file)
    with translate_foreign(CheckpointError, file, "no configuration of a language model that transformers knows"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def guess_conv_template(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the conversation template that a language model was trained with.

    The Vicunas of 2023 are known by name, or by their context of 2048 tokens (LLaMA-2 has 4096). LLaMA-2 is known by
    its own chat template, or as a LLaMA without one. Every other model, and so LLaMA-3, takes its tokenizer's chat
    template, if there is one.
    """
    name = f"{folder.name} {config.name_or_path}".lower()
    if any(family in name for family in ("vicuna", "billa", "ziya")):
        return "v1"
    if tokenizer.chat_template and not _is_llama_2(config, tokenizer):
        return "tokenizer"
    short_context = getattr(config.get_text_config(), "max_position_embeddings", 0) < LLAMA_2_CONTEXT
    if config.model_type == "llama" and short_context and not tokenizer.chat_template:
        return "v1"
    return "llama_2"


def _is_llama_2(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template is the one that "llama_2" writes: later LLaMAs have other end tokens."""
    is_llama = config.model_type == "llama" and tokenizer.eos_token == "</s>"
    return is_llama and "[INST]" in str(tokenizer.chat_template)


def named_template(model_type: str | None, *, learnt: bool = False) -> str | None:
    """Return the conversation template that a `model_type` names; None for an unknown name.

    Args:
        model_type: a family of the original's ("llama_v2", "pretrain_vicuna", …), or the name of a template.
        learnt: of the family's two templates, that of dialogues in training, not that of chats.
    """
    family = str(model_type).removeprefix("pretrain_")
    if family in _FAMILIES:
        return _FAMILIES[family][int(learnt)]
    return family if family in conv_templates else None


def family_of(template: str) -> str:
    """Return the family that a template belongs to; one without a family is its own."""
    for family, names in _FAMILIES.items():
        if template in names:
            return family
    return template


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
    added = read_json_object(file)
    if not all(isinstance(number, int) for number in added.values()):
        raise CheckpointError(f"{file}: not a table of tokens and their numbers; download it again")
    # Ids count from 0, so an id that equals the number of rows is already without an embedding.
    beyond = [token for token, number in added.items() if number >= rows]
    if beyond:
        raise CheckpointError(
            f"{folder}: the tokenizer adds {', '.join(beyond)}, but the weights have only {rows} tokens. Vicuna's "
            f"first release has 32001 tokens, LLaMA and later Vicunas have 32000: take tokenizer and weights of one "
            f"release"
        )
