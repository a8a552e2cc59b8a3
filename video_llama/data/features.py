"""Outputs of the frozen encoders on disk: one small file for each media file, found by what it depends on.

An entry's key is a digest of the file's content, of how the file is read, and of the encoder's weights, so an
entry can never be stale: what changes gets another key. Files appear under their final name when they are whole,
and carry a checksum, so any number of processes may fill one cache and be stopped at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from video_llama.data.examples import MediaSource, read_media
from video_llama.errors import ConfigError
from video_llama.media.containers import check_media_file
from video_llama.processor.media_processor import MediaProcessor
from video_llama.utils.files import write_whole

__all__ = ["FeatureStore", "Features", "decode_features", "encode_features", "fingerprint"]

logger = logging.getLogger(__name__)

Encoding = Literal["float32", "bfloat16", "int8"]

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Features:
    """One cached entry.

    Args:
        values: (frames, queries, width) or (segments, joint_width), float32 or bfloat16.
        message: the sentence on the sampled frames, "" for images and sounds.
    """

    values: Tensor
    message: str


@dataclass(frozen=True)
class FeatureStore:
    """A folder of cached encoder outputs.

    Args:
        folder: where; made if need be.
        encoding: how values are stored.
        fingerprints: digest of the weights of the encoder that each model input goes to.
    """

    folder: Path
    encoding: Encoding
    fingerprints: dict[str, str]

    def key(self, source: MediaSource, kind: str, name: str, media: MediaProcessor) -> str:
        """The key of a media file's features.

        Args:
            source: the file.
            kind: how it is read: video, image or audio.
            name: the model input it is meant for.
            media: how it is read.

        Raises:
            MediaError, DatasetError: there is no such file, or it is cut off.
        """
        settings = {"media": asdict(media), "kind": kind, "input": name, "encoder": self.fingerprints[name]}
        parts = [self._content_digest(source), json.dumps(settings, sort_keys=True), self.encoding]
        return _digest("\n".join(parts).encode())

    def load(self, key: str) -> Features | None:
        """The entry, or None if there is none that is whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        checksum, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != checksum:
            logger.warning("%s: damaged, will be computed again", path)
            return None
        try:
            tensors = load(body)
        except SafetensorError:
            logger.warning("%s: damaged, will be computed again", path)
            return None
        return Features(decode_features(tensors), bytes(tensors["message"].tolist()).decode())

    def save(self, key: str, features: Features) -> None:
        """Write an entry; an existing one is replaced.

        Raises:
            ConfigError: it cannot be written there.
        """
        tensors = encode_features(features.values, self.encoding)
        tensors["message"] = torch.tensor(list(features.message.encode()), dtype=torch.uint8)
        body = save(tensors)
        try:
            _write(self._path(key), hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() + body)
        except OSError as error:
            raise ConfigError(f"features.dir: {self.folder} cannot be written ({error}); is the disk full?") from error

    def _path(self, key: str) -> Path:
        return self.folder / "features" / key[:2] / key

    def _content_digest(self, source: MediaSource) -> str:
        """Digest of a file's content, remembered as long as nothing that `stat` says of the file changes.

        Size and time of change alone would not do: a file of the same size can take another's place, and its time
        can be set back. The inode tells the first, and the time of the inode's own change (ctime), which no program
        can set, tells the second.
        """
        path = check_media_file(source.path)
        stat = os.stat(path)
        state = f"{stat.st_size}\n{stat.st_mtime_ns}\n{stat.st_ino}\n{stat.st_ctime_ns}"
        place = f"\n{source.offset}\n{source.size}" if source.name is not None else ""
        identity = _digest(f"{path}\n{state}{place}".encode())
        memo = self.folder / "digests" / identity[:2] / identity
        remembered = _read_memo(memo, identity)
        if remembered is not None:
            return remembered
        content = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for piece in read_media(source):
            content.update(piece)
        with contextlib.suppress(OSError):  # a full disk: the next one to ask computes it again
            _write(memo, _memo(identity, content.hexdigest().encode()))
        return content.hexdigest()


def _memo(identity: str, content_digest: bytes) -> bytes:
    """A content digest as it is remembered: with a checksum over it and what it was computed of."""
    return content_digest + b" " + _digest(identity.encode() + content_digest).encode()


def _read_memo(path: Path, identity: str) -> str | None:
    """The content digest that a file remembers, or None if there is none that is whole and of this identity."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content_digest = content[: 2 * _DIGEST_BYTES]
    if content != _memo(identity, content_digest):
        logger.warning("%s: damaged, will be computed again", path)
        return None
    return content_digest.decode()


def encode_features(values: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    """Values as stored: in 8 bit, each token (last dimension) has a scale of its own."""
    if encoding != "int8":
        return {"values": values.to(getattr(torch, encoding)).contiguous()}
    scale = values.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return {"values": (values.float() / scale).round().to(torch.int8), "scale": scale}


def decode_features(tensors: dict[str, Tensor]) -> Tensor:
    """What `encode_features` stored, in its own precision; float32 of 8 bit."""
    values = tensors["values"]
    return values.float() * tensors["scale"] if "scale" in tensors else values


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Digest of the bytes of an encoder's weights, in order."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Nobody waits for the disk: all that is written here, entries and memos, has a checksum, which what a power cut
    left behind fails. It is then computed again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_bytes(content), durable=False)
