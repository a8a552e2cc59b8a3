"""Keep outputs of the frozen encoders on disk: one small file for each media file, found by what it depends on.

An entry's key is a digest of the file's content, of how the file is read, and of the encoder's weights, so an entry is
never stale: what changes gets another key. Files are written whole and carry a checksum, so any number of processes
may fill one cache and be stopped at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from video_llama.data.examples import MediaSource, read_media
from video_llama.data.remote import RemoteFile, is_remote
from video_llama.errors import ConfigError
from video_llama.media.containers import check_media_file
from video_llama.processor.media_processor import MediaProcessor
from video_llama.utils.files import write_whole

__all__ = ["FeatureStore", "Features", "decode_features", "encode_features", "fingerprint"]

logger = logging.getLogger(__name__)

Encoding = Literal["float32", "bfloat16", "int8"]

_DIGEST_BYTES = 16
_DAMAGED = "%s: damaged, will be computed again"


@dataclass(frozen=True)
class Features:
    """One cached entry.

    Args:
        values: (frames, queries, width) or (segments, joint_width), float32 or bfloat16.
        message: the sentence on the sampled frames of a video, "" for images and audio.
    """

    values: Tensor
    message: str


@dataclass(frozen=True)
class FeatureStore:
    """A folder of cached encoder outputs.

    Args:
        folder: made if need be.
        encoding: how values are stored.
        fingerprints: digest of the encoder's weights, by model input.
    """

    folder: Path
    encoding: Encoding
    fingerprints: dict[str, str]

    def key(self, source: MediaSource, kind: str, name: str, media: MediaProcessor) -> str:
        """Return the key of a media file's features.

        Args:
            source: the file.
            kind: its modality.
            name: the model input it is for.
            media: how it is read.

        Raises:
            MediaError, DatasetError: the file is absent or cut off.
        """
        # All that the features depend on goes into the key. Sorted keys give the same text in every process.
        settings = {"media": media.to_dict(), "kind": kind, "input": name, "encoder": self.fingerprints[name]}
        if source.is_part:
            settings["part"] = {"start": source.start_seconds, "end": source.end_seconds}
        parts = [self._content_digest(source), json.dumps(settings, sort_keys=True), self.encoding]
        return _digest("\n".join(parts).encode())

    def load(self, key: str) -> Features | None:
        """Return the entry, or None if it is absent or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        # The format of an entry: the digest of the body, then the body, which is a safetensors file.
        checksum, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        try:
            if bytes.fromhex(_digest(body)) != checksum:
                raise SafetensorError("wrong checksum")
            tensors = load(body)
        except SafetensorError:
            logger.warning(_DAMAGED, path)
            return None
        return Features(decode_features(tensors), bytes(tensors["message"].tolist()).decode())

    def save(self, key: str, features: Features) -> None:
        """Write an entry; an existing one is replaced.

        Raises:
            ConfigError: it cannot be written there.
        """
        tensors = encode_features(features.values, self.encoding)
        # safetensors files hold tensors only, so the message is stored as a tensor of its bytes.
        tensors["message"] = torch.tensor(list(features.message.encode()), dtype=torch.uint8)
        body = save(tensors)
        try:
            _write(self._path(key), bytes.fromhex(_digest(body)) + body)
        except OSError as error:
            raise ConfigError(f"features.dir: {self.folder} cannot be written ({error}); is the disk full?") from error

    def _path(self, key: str) -> Path:
        return self.folder / "features" / key[:2] / key

    def _content_digest(self, source: MediaSource) -> str:
        """Return the digest of a file's content, which is kept while `os.stat` of the file stays the same."""
        if source.content is not None:
            return hashlib.blake2b(source.content, digest_size=_DIGEST_BYTES).hexdigest()
        identity = _identity(source.path)
        if source.name is not None:
            identity += [source.offset, source.size]
        name = _digest("\n".join(map(str, identity)).encode())
        memo = self.folder / "digests" / name[:2] / name
        with contextlib.suppress(FileNotFoundError):
            content = memo.read_bytes()
            digest = content[: 2 * _DIGEST_BYTES]
            if content == _memo(name, digest):
                return digest.decode()
            logger.warning(_DAMAGED, memo)
        # Read in chunks: videos may be larger than the memory.
        blake = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for chunk in read_media(source):
            blake.update(chunk)
        # Without a memo, for instance because the disk is full, the next process computes the digest again.
        with contextlib.suppress(OSError):
            _write(memo, _memo(name, blake.hexdigest().encode()))
        return blake.hexdigest()


def _identity(path: str) -> list[Any]:
    """Return what changes when the content of a file does."""
    if is_remote(path):
        return RemoteFile(path).identity
    path = check_media_file(path)
    stat = os.stat(path)
    # Size and modification time alone would not do: a file of the same size can take another's place, and the time can
    # be set back. The inode shows the first, its time of change (ctime), which no program sets, the second.
    return [path, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _memo(name: str, content_digest: bytes) -> bytes:
    """Return the content of a memo: a digest, and a checksum of it with the name of the memo's file."""
    return content_digest + b" " + _digest(name.encode() + content_digest).encode()


def encode_features(values: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    """Return values as they are stored; in int8, each token (last dimension) has a scale of its own."""
    if encoding != "int8":
        return {"values": values.to(getattr(torch, encoding)).contiguous()}
    # The largest value of a token becomes 127. The lower limit avoids a division by zero for tokens of zeros.
    scale = values.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return {"values": (values.float() / scale).round().to(torch.int8), "scale": scale}


def decode_features(tensors: dict[str, Tensor]) -> Tensor:
    """Return the values of `encode_features`, in the stored precision; float32 for int8."""
    values = tensors["values"]
    if "scale" in tensors:
        return values.float() * tensors["scale"]
    return values


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the bytes of an encoder's weights, in order."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        # The same bytes mean other numbers in another dtype or shape. View as bytes, since numpy has no bfloat16.
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _write(path: Path, content: bytes) -> None:
    # Without waiting for the disk: after a power cut, the checksum shows what is damaged.
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_bytes(content), durable=False)
