"""Turn a path, the name of a packaged model, a hub id or a web address into a local path."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from video_llama.errors import CheckpointError

__all__ = [
    "CHECKPOINT_PATTERNS",
    "LANGUAGE_MODEL_PATTERNS",
    "WITHOUT_AUDIO_PATTERNS",
    "download_repository",
    "is_packaged",
    "list_repository",
    "local_path",
    "resolve_source",
    "upload_folder",
]

logger = logging.getLogger(__name__)

PACKAGED_MODELS = Path(__file__).parent.parent / "models"
"""Folders of models that come with the package, by name."""

# Files to take of a hub repository: of a language model in safetensors, of a checkpoint, and of a checkpoint without
# the large files that only the audio branch needs.
LANGUAGE_MODEL_PATTERNS = ("*.json", "*.jinja", "*tokenizer*", "*.safetensors")
CHECKPOINT_PATTERNS = (*LANGUAGE_MODEL_PATTERNS, "*.bin", "*.pth")
WITHOUT_AUDIO_PATTERNS = (*LANGUAGE_MODEL_PATTERNS, "*.bin", "VL*.pth", "eva_vit_g.pth", "blip2*.pth")

# A broken connection raises an error of the hub's HTTP library, which differs between its releases.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]

_WEIGHT_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors", ".json"}


def resolve_source(source: str | os.PathLike[str], wanted: str, patterns: Sequence[str] = CHECKPOINT_PATTERNS) -> Path:
    """Return the local path of a file or folder.

    A hub id (`owner/name`) is downloaded through huggingface_hub: an interrupted download goes on where it stopped, and
    a finished one is found in the cache. A web address is downloaded to torch's hub cache, where the original code
    keeps the same files.

    Args:
        source: path, name of a packaged model, hub id or web address.
        wanted: what it should be, for the error message: "eva_vit_g.pth (vit_ckpt)".
        patterns: files to take of a hub repository.

    Raises:
        CheckpointError: no such file, or it cannot be downloaded; the message says what to put where.
    """
    text = os.fspath(source)
    if urlparse(text).scheme in ("http", "https"):
        return _download_file(text, wanted)
    # Local paths go first, so that an existing folder is never taken for a hub id of the same form.
    path = Path(text).expanduser()
    if path.exists():
        return path
    if is_packaged(text):
        _warn_of_small_model(text)
        return PACKAGED_MODELS / text
    # A relative path looks like a hub id. If it ends like a file of weights, a file was meant, so report it as missing.
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and path.suffix not in _WEIGHT_SUFFIXES
    if not is_hub_id:
        raise CheckpointError(f"{path}: no such file or folder{_near_names(path)}; it should be {wanted}")
    return _download_repository(text, wanted, patterns)


def upload_folder(folder: Path, hub_id: str, message: str, private: bool | None = None, token: Any = None) -> str:
    """Upload the files of a folder to a repository of the hub, which is made if need be.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: the hub cannot be reached, or does not let this account write there.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message=message))
    except (OSError, HFValidationError, _HTTP_ERROR) as error:
        raise CheckpointError(
            f"{hub_id}: cannot be written at the hub ({_first_line(error)}); log in with `hf auth login`, "
            "as an account that may write there"
        ) from error


def is_packaged(name: str) -> bool:
    """Whether a model of this name comes with the package."""
    return len(Path(name).parts) == 1 and (PACKAGED_MODELS / name / "config.json").exists()


def local_path(source: str) -> Path:
    """Return the path of a folder or file, or the folder of a model that comes with the package."""
    path = Path(source).expanduser()
    if is_packaged(source) and not path.exists():
        return PACKAGED_MODELS / source
    return path


@cache
def _warn_of_small_model(name: str) -> None:
    """Log, once in a process, what a packaged model cannot do: it answers questions about anything."""
    logger.warning(
        "%s is a toy model: it only knows moving shapes and simple sounds, its answers about real videos are wrong. "
        "Load the published weights for those",
        name,
    )


def _near_names(path: Path) -> str:
    """Return a suggestion: a packaged model, or a file or folder beside the one that is missing."""
    packaged = [folder.name for folder in PACKAGED_MODELS.iterdir() if (folder / "config.json").exists()]
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [file.name for file in path.parent.iterdir()]
    near = get_close_matches(path.name, beside, 1)
    if len(path.parts) == 1:
        # People shorten the long name to its last word.
        near = [*get_close_matches(path.name, packaged, 1), *(name for name in packaged if path.name in name), *near]
        return "".join(f" (did you mean {name}?)" for name in near[:1])
    return "".join(f" (did you mean {path.parent / name}?)" for name in near)


def list_repository(
    hub_id: str, patterns: Sequence[str], revision: str | None = None
) -> tuple[str | None, list[RepoSibling]]:
    """Return the newest commit of a repository of the hub, and its files that match, with their sizes and checksums.

    Raises:
        CheckpointError: it cannot be reached, or its owners ask for an account.
    """
    with _translated_hub_errors(hub_id, "a hub id, owner/name"):
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    names = set(filter_repo_objects([file.rfilename for file in info.siblings or ()], allow_patterns=list(patterns)))
    return info.sha, [file for file in info.siblings or () if file.rfilename in names]


def download_repository(hub_id: str, patterns: Sequence[str], revision: str | None, folder: Path) -> None:
    """Download files of a repository of the hub to a folder; what is there already is not downloaded again.

    Raises:
        CheckpointError: it cannot be reached, or its owners ask for an account.
    """
    with _translated_hub_errors(hub_id, "a hub id, owner/name"):
        snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), local_dir=folder)


def _download_repository(hub_id: str, wanted: str, patterns: Sequence[str]) -> Path:
    with _translated_hub_errors(hub_id, wanted):
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))


@contextlib.contextmanager
def _translated_hub_errors(hub_id: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        # This error is one of the HTTP errors below, so it must be caught before them to get its own advice.
        raise CheckpointError(
            f"{hub_id}: a gated model: accept its licence on its page at the Hugging Face Hub, then run `hf auth login`"
        ) from error
    except (OSError, HFValidationError, _HTTP_ERROR) as error:
        raise CheckpointError(
            f"{hub_id}: neither a local folder nor reachable on the Hugging Face Hub ({_first_line(error)}). Check the "
            f"spelling and the connection, or download it elsewhere and give the path of its folder; "
            f"it should be {wanted}"
        ) from error


def _download_file(address: str, wanted: str) -> Path:
    name = Path(urlparse(address).path).name
    if not name:
        raise CheckpointError(f"{address}: this address names no file; it should be {wanted}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", address, path)
    try:
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        # The errors of urllib are OSErrors, too.
        raise CheckpointError(
            f"{address}: cannot be downloaded ({_first_line(error)}). Download {name} on a machine with a network and "
            f"put it beside the other files, or into {folder}, or give its path; it should be {wanted}"
        ) from error
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
