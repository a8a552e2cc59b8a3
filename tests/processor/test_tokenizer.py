"""Loading tokenizers; the recorded ids are in tests/parity/test_text_parity.py."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from tests.helpers.tokenizers import build_chat_tokenizer
from video_llama.errors import CheckpointError
from video_llama.processor.tokenizer import load_tokenizer

LLAMA = Path(__file__).parents[1] / "data" / "reference" / "tokenizer"
TEXTS = ["", " a", "  two  spaces ", "a\n b\t", "Çok güzel 视频 🎬", "###Human: hi", "▁", "e\u0301 ﬁ \u200b"]


@pytest.fixture(scope="module")
def pieces() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))


def assert_sentencepiece_ids(tokenizer: PreTrainedTokenizerBase, pieces: SentencePieceProcessor) -> None:
    for text in TEXTS:
        assert tokenizer(text).input_ids == [pieces.bos_id(), *pieces.encode(text)], text


def copy_model(folder: Path) -> Path:
    shutil.copy(LLAMA / "tokenizer.model", folder)
    return folder


def test_a_bare_sentencepiece_model_gets_bos_and_the_ids_of_sentencepiece(
    tmp_path: Path, pieces: SentencePieceProcessor
) -> None:
    assert_sentencepiece_ids(load_tokenizer(copy_model(tmp_path)), pieces)
    assert_sentencepiece_ids(load_tokenizer(tmp_path / "tokenizer.model"), pieces)
    assert_sentencepiece_ids(load_tokenizer(str(tmp_path)), pieces)


def test_random_text_has_the_ids_of_sentencepiece(pieces: SentencePieceProcessor) -> None:
    tokenizer, draw = load_tokenizer(LLAMA), random.Random(0)
    letters = [*"abehimnorstu   \n\t.,#<>/[]()019éüğ视频🎬▁", "</s>", "<s>", "###", "The ", "video", "<0x0A>"]
    for _ in range(500):
        text = "".join(draw.choices(letters, k=draw.randint(0, 15)))
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == pieces.encode(text), text


def test_the_ids_survive_saving_and_loading(tmp_path: Path, pieces: SentencePieceProcessor) -> None:
    tokenizer = load_tokenizer(LLAMA)
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert_sentencepiece_ids(again, pieces)
        assert again("a</s> b").input_ids == tokenizer("a</s> b").input_ids
        assert again.pad_token == "<unk>"


@pytest.mark.parametrize("model_type", ["llama", "video_llama"])
def test_a_config_beside_the_saved_tokenizer_changes_nothing(
    model_type: str, tmp_path: Path, pieces: SentencePieceProcessor
) -> None:
    load_tokenizer(LLAMA).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_sentencepiece_ids(AutoTokenizer.from_pretrained(tmp_path), pieces)


def test_a_folder_with_both_formats_gets_the_ids_of_sentencepiece(
    tmp_path: Path, pieces: SentencePieceProcessor
) -> None:
    LlamaTokenizer.from_pretrained(LLAMA).save_pretrained(tmp_path)
    assert_sentencepiece_ids(load_tokenizer(copy_model(tmp_path)), pieces)


def test_the_empty_names_of_early_llama_conversions_mean_the_usual_tokens(
    tmp_path: Path, pieces: SentencePieceProcessor
) -> None:
    names = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (copy_model(tmp_path) / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert_sentencepiece_ids(tokenizer, pieces)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_the_pad_token_is_unk_or_the_end_of_text(tmp_path: Path) -> None:
    assert load_tokenizer(LLAMA).pad_token_id == 0
    build_chat_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|im_end|>"


def test_other_tokenizers_are_left_as_they_are(tmp_path: Path) -> None:
    original = build_chat_tokenizer()
    original.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded(text).input_ids == original(text).input_ids
    assert loaded.chat_template == original.chat_template


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "git-LFS"),
        ((LLAMA / "tokenizer.model").read_bytes()[:5000], "cut off"),
    ],
)
def test_a_damaged_model_says_what_is_wrong_and_where(content: bytes, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=cause) as error:
        load_tokenizer(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_json_file_is_an_error(name: str, tmp_path: Path) -> None:
    (copy_model(tmp_path) / name).write_text("{half")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model|tokenizer_config\.json: damaged"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_says_what_belongs_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", "./absent", "~/absent/llama"):
        with pytest.raises(CheckpointError, match=r"no such file or folder.*tokenizer\.model"):
            load_tokenizer(path)


def test_a_folder_without_a_tokenizer_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs an intact tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"org/model.*nor reachable on the Hugging Face Hub.*give its path"):
        load_tokenizer("org/model")
