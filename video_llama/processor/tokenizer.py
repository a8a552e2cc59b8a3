"""The language model's tokenizer, with the token ids that the trained weights expect.

The original tokenises with SentencePiece through transformers 4.28. The LLaMA class of transformers 5 gives other ids
for text that begins with a space, and after saving and loading also for text behind a special token. Here the
SentencePiece rule (put "▁" in front, write spaces as "▁") is the normaliser of a plain fast tokenizer, which
`tokenizer.json` keeps. (User-defined symbols, which no LLaMA vocabulary has, would be split off before that rule.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from video_llama.errors import CheckpointError, translate_foreign
from video_llama.utils.files import read_json_object

__all__ = ["load_tokenizer"]

_MODEL_FILE, _FAST_FILE = "tokenizer.model", "tokenizer.json"
# The last name is from before release 4.28 of transformers.
_LLAMA_CLASSES = {"LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer"}
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(path_or_id: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model.

    LLaMA's SentencePiece tokenizers (LLaMA-2, Vicuna, BiLLa, Ziya) give exactly the ids of SentencePiece and put
    BOS in front; every other one is loaded as transformers does. A missing pad token becomes `<unk>`, or else EOS.

    Args:
        path_or_id: a folder with `tokenizer.model` or `tokenizer.json`, such a file, or a hub id.

    Raises:
        CheckpointError: the files are absent, damaged, git-LFS pointers, or no fast tokenizer.
    """
    folder = _local_folder(path_or_id)
    source = str(folder or path_or_id)
    if folder and _is_sentencepiece_llama(folder):
        tokenizer = _load_sentencepiece(folder)
    else:
        tokenizer = _load_any(source, is_local=folder is not None)
    if isinstance(tokenizer, LlamaTokenizer):
        tokenizer = _with_sentencepiece_rule(tokenizer)
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{source}: {type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _local_folder(path_or_id: str | os.PathLike[str]) -> Path | None:
    """Return the folder that holds the files, checked; None for a hub id."""
    path = Path(path_or_id).expanduser()
    if not path.exists():
        # A hub id is a name or owner/name. Anything else that does not exist was meant as a path.
        if path.is_absolute() or str(path_or_id).startswith((".", "~")) or len(path.parts) > 2:
            raise CheckpointError(
                f"{path}: no such file or folder; give the language model's folder, "
                f"which holds {_MODEL_FILE} or {_FAST_FILE}"
            )
        return None
    folder = path if path.is_dir() else path.parent
    for file in (folder / _MODEL_FILE, folder / _FAST_FILE):
        if file.exists():
            _check_is_downloaded(file)
    return folder


def _check_is_downloaded(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(32)
    if not start:
        raise CheckpointError(f"{file}: the file is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a git-LFS pointer, not the file; run `git lfs pull` in its folder")


def _is_sentencepiece_llama(folder: Path) -> bool:
    """Whether the folder's tokenizer is LLaMA's, and given only as a SentencePiece model."""
    if (folder / _FAST_FILE).exists() or not (folder / _MODEL_FILE).exists():
        return False
    return _config(folder).get("tokenizer_class", "LlamaTokenizer") in _LLAMA_CLASSES


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    return read_json_object(file)


def _load_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    file, config = folder / _MODEL_FILE, _config(folder)
    with translate_foreign(CheckpointError, file):
        model = SentencePieceProcessor(model_file=str(file))
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    # The first conversions of LLaMA name these tokens "", on which the class of transformers 5 fails.
    settings: dict[str, Any] = {name: model.id_to_piece(ids[name]) for name in ids if not config.get(name)}
    settings["add_bos_token"] = config.get("add_bos_token", True)
    with translate_foreign(CheckpointError, f"{folder}: {_MODEL_FILE}, tokenizer_config.json"):
        return LlamaTokenizer.from_pretrained(folder, local_files_only=True, **settings)


def _load_any(source: str, is_local: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare Exception on a damaged file.
        missing = "neither a local folder nor reachable on the Hugging Face Hub"
        advice = f"{missing}; download the language model's folder and give its path"
        if is_local:
            advice = f"the folder needs an intact {_MODEL_FILE} or {_FAST_FILE}"
        raise CheckpointError(f"{source}: no tokenizer can be loaded; {advice} ({error})") from error


def _with_sentencepiece_rule(tokenizer: LlamaTokenizer) -> PreTrainedTokenizerBase:
    """Return the same vocabulary as a plain fast tokenizer that treats spaces as SentencePiece does."""
    backend = tokenizer.backend_tokenizer
    # The vocabulary holds spaces as this sign, and words are not split before, so merges work as in SentencePiece.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **{name: getattr(tokenizer, name) for name in _SPECIAL_NAMES},
    )
