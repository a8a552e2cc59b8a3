"""The command `video-llama download`: the published files of one model to one folder."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from video_llama.cli.command import CommandParser, run_command
from video_llama.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

__all__ = ["main"]

OWNER = "DAMO-NLP-SG"
PUBLISHED = tuple(f"Video-LLaMA-2-{size}-{stage}" for size in ("7B", "13B") for stage in ("Finetuned", "Pretrained"))
LICENCES = """\
licences: LLaMA-2 (the language model; the branches were trained on non-commercial data), CC BY-NC-SA 4.0 (ImageBind:
non-commercial), MIT (EVA), BSD-3 (BLIP-2). Use of the files means that you accept them."""
DESCRIPTION = f"""\
Download the published files of a model to FOLDER/NAME. An interrupted download continues where it stopped, and every
large file is compared with its checksum.

    video-llama download Video-LLaMA-2-7B-Finetuned checkpoints

NAME is one of {", ".join(PUBLISHED)}, or any hub id (owner/name).
EVA ViT-g and BLIP-2's Q-Former are not among the files: loading the model downloads those that are not in its folder.
"""
_BLOCK = 2**24


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = CommandParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="a published model, or a hub id")
    where = "the folder that gets a folder of the model's name (default: checkpoints)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("checkpoints"), metavar="FOLDER", help=where)
    parser.add_argument("--revision", metavar="COMMIT", help="a commit, tag or branch (default: the newest)")
    parser.add_argument("--no-audio", action="store_true", help="leave the large files of the audio branch out")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """List what is downloaded, download it, and compare the checksums."""
    from video_llama.checkpoints.hub import (
        CHECKPOINT_PATTERNS,
        WITHOUT_AUDIO_PATTERNS,
        download_repository,
        list_repository,
    )

    hub_id = to_hub_id(arguments.name)
    folder = arguments.folder.expanduser() / hub_id.partition("/")[2]
    patterns: Sequence[str] = CHECKPOINT_PATTERNS
    if arguments.no_audio:
        patterns = WITHOUT_AUDIO_PATTERNS
    commit, files = list_repository(hub_id, patterns, arguments.revision)
    if not files:
        raise CheckpointError(f"{hub_id}: this repository holds no files of weights")
    for file in files:
        print(f"  {(file.size or 0) / 1e6:10.1f} MB  {file.rfilename}")
    print(f"{len(files)} files of {hub_id}, {sum(file.size or 0 for file in files) / 1e9:.2f} GB, to {folder}")
    if hub_id.startswith(f"{OWNER}/"):
        print(LICENCES)
    sys.stdout.flush()
    download_repository(hub_id, patterns, commit, folder)
    # The hub's library goes by size and time: a file that was damaged within a second looks right to it.
    damaged = [file for file in files if not _is_whole(folder, file)]
    if damaged:
        for file in damaged:
            (folder / file.rfilename).unlink()
        download_repository(hub_id, patterns, commit, folder)
        for file in damaged:
            check_file(folder, file)
    checked = sum(file.lfs is not None for file in files)
    print(f"{checked} checksums are right. Use it: video-llama chat clip.mp4 --model {folder}")
    return 0


def to_hub_id(name: str) -> str:
    """Return the hub id of a name.

    Raises:
        ConfigError: it is neither a published model nor a hub id.
    """
    if "/" in name:
        return name
    if name in PUBLISHED:
        return f"{OWNER}/{name}"
    near = "".join(f"; did you mean {match}?" for match in get_close_matches(name, PUBLISHED, 1))
    raise ConfigError(f"{name}: not a published model{near} (published: {', '.join(PUBLISHED)})")


def _is_whole(folder: Path, file: RepoSibling) -> bool:
    try:
        check_file(folder, file)
    except CheckpointError:
        return False
    return True


def check_file(folder: Path, file: RepoSibling) -> bool:
    """Compare a file with the checksum that the hub has for it; False if it has none, as for small files.

    Raises:
        CheckpointError: the file is another one.
    """
    if file.lfs is None:
        return False
    path, digest = folder / file.rfilename, hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != file.lfs.sha256:
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the one at the hub); remove it and download again")
    return True


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status."""
    interrupted = "interrupted; the same command continues the download"
    return run_command(run, build_parser(prog).parse_args(argv), interrupted)
