"""What is looked at in a language model's folder before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from tests.helpers.checkpoints import HeldWeights
from tests.helpers.tokenizers import CHAT_TEMPLATE, build_chat_tokenizer
from video_llama.checkpoints.language_model import check_language_model, guess_conv_template, read_language_config
from video_llama.errors import CheckpointError

LLAMA = LlamaConfig(max_position_embeddings=4096)
QWEN = AutoConfig.for_model("qwen2")


LLAMA_2_CHAT = "{% for m in messages %}[INST] <<SYS>> {{ m.content }} [/INST]{% endfor %}"


@pytest.mark.parametrize(
    ("folder", "config", "chat_template", "eos", "template"),
    [
        ("llama-2-7b-chat-hf", LLAMA, None, "</s>", "llama_2"),
        ("llama-2-7b-chat-hf", LLAMA, LLAMA_2_CHAT, "</s>", "llama_2"),  # what the published weights were trained with
        ("vicuna-7b-v0", LLAMA, None, "</s>", "v1"),
        ("BiLLa-7B-SFT", LLAMA, CHAT_TEMPLATE, "</s>", "v1"),
        ("Ziya-LLaMA-13B", LLAMA, None, "</s>", "v1"),
        ("language_model", LlamaConfig(name_or_path="lmsys/vicuna-7b-v1.5"), None, "</s>", "v1"),
        ("language_model", LlamaConfig(max_position_embeddings=2048), None, "</s>", "v1"),
        ("language_model", LlamaConfig(max_position_embeddings=2048), CHAT_TEMPLATE, "</s>", "tokenizer"),
        ("Llama-3.1-8B-Instruct", LLAMA, CHAT_TEMPLATE, "<|eot_id|>", "tokenizer"),
        ("language_model", LLAMA, LLAMA_2_CHAT, "<|eot_id|>", "tokenizer"),
        ("qwen", QWEN, CHAT_TEMPLATE, "<|im_end|>", "tokenizer"),
        ("qwen", QWEN, None, "<|im_end|>", "llama_2"),
    ],
)
def test_the_template_follows_the_language_model(
    folder: str, config: PreTrainedConfig, chat_template: str | None, eos: str, template: str
) -> None:
    tokenizer = build_chat_tokenizer(chat_template)
    tokenizer.eos_token = eos
    assert guess_conv_template(Path("models") / folder, config, tokenizer) == template


def test_a_configuration_is_read(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=96).save_pretrained(tmp_path)
    config = read_language_config(tmp_path)
    assert (config.model_type, config.hidden_size) == ("llama", 96)


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"model_type": "unheard_of"}'])
def test_a_missing_or_damaged_configuration_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        CheckpointError,
        match=f"{tmp_path}/config.json: (missing|damaged or cut off|.* no configuration of a language model)",
    ):
        read_language_config(tmp_path)


def llama_weights(folder: Path, norm: float = 1.0, rows: int = 32000) -> HeldWeights:
    tensors = {"model.norm.weight": torch.full((8,), norm), "model.embed_tokens.weight": torch.empty(rows, 1)}
    return HeldWeights(str(folder), tensors)


def test_a_usual_llama_passes(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 32000}))
    check_language_model(llama_weights(tmp_path, rows=32001), LLAMA)
    (tmp_path / "added_tokens.json").unlink()
    check_language_model(llama_weights(tmp_path, norm=-0.4), LLAMA)
    check_language_model(HeldWeights(str(tmp_path), {}), LLAMA)  # what is missing, the loader reports


@pytest.mark.parametrize("norm", [0.0, 0.003, -0.003])
def test_delta_weights_are_recognised(tmp_path: Path, norm: float) -> None:
    with pytest.raises(CheckpointError, match=r"delta weights, not a language model .* add them to LLaMA's weights"):
        check_language_model(llama_weights(tmp_path, norm=norm), LLAMA)


@pytest.mark.parametrize("name", ["", "model.safetensors"])  # shards are known by their folder, one file by its own
def test_a_tokenizer_with_more_tokens_than_the_weights_is_vicunas_on_llama(tmp_path: Path, name: str) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "[PAD]": 32000}))
    sentence = r"the tokenizer adds \[PAD\], but the weights have only 32000 tokens. Vicuna's first release has 32001"
    with pytest.raises(CheckpointError, match=sentence):
        check_language_model(llama_weights(tmp_path / name), LLAMA)


@pytest.mark.parametrize("content", ["[]", '{"<unk>": "0"}', '{"<unk>": null}'])
def test_a_damaged_table_of_added_tokens_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: (not a table of tokens|holds a list)"):
        check_language_model(llama_weights(tmp_path), LLAMA)


def test_other_language_models_are_not_judged_by_llamas_rules(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 99_999}))
    check_language_model(llama_weights(tmp_path, norm=0.0), QWEN)
