"""Files of object stores and web servers: fetched whole, with retries, into a folder on the local disk of limited size.

A file is read from its local copy, so decoders seek in it and a shard's members are found by their offsets. What can go
wrong on the way (a server that answers with an error, hangs, or breaks off) is tried again and then an error of that
file, which this process does not ask for again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from video_llama.errors import ConfigError, DatasetError
from video_llama.media.reasons import describe_error
from video_llama.utils.extras import import_extra

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

__all__ = ["RemoteError", "RemoteFile", "cache_folder", "is_remote", "list_shards", "local_file"]

logger = logging.getLogger(__name__)

_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "http", "https")
_ADDRESS = re.compile(rf"({'|'.join(_SCHEMES)})://", re.IGNORECASE)
# The packages that fsspec needs for them; huggingface_hub brings what reads hf:// addresses.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

_FOLDER, _LIMIT_GB, _PATIENCE = "VIDEO_LLAMA_CACHE", "VIDEO_LLAMA_CACHE_GB", "VIDEO_LLAMA_TIMEOUT"
_DEFAULT_LIMIT_GB, _DEFAULT_PATIENCE = 100.0, 60.0
_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
# One request fetches so much.
_PIECE_BYTES = 8 << 20

# What stores call the mark of a file's content, or else its time.
_MARKS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime")
# What this process has given up on.
_FAILED: dict[str, str] = {}


class RemoteError(DatasetError):
    """A remote file that cannot be fetched, after all attempts.

    Args:
        address: of the file.
        reason: why not.
    """

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(f"{address}: {reason}")

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return type(self), (self.address, self.reason)


def is_remote(name: object) -> bool:
    """Return whether this is an address of an object store or of the web."""
    return isinstance(name, str) and _ADDRESS.match(name) is not None and "::" not in name


def cache_folder() -> Path:
    """Return the folder of local copies: VIDEO_LLAMA_CACHE, or `~/.cache/video_llama`."""
    return Path(os.environ.get(_FOLDER, "~/.cache/video_llama")).expanduser()


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address that `is_remote`."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def stem(self) -> str:
        """Return the file's name without its last suffix."""
        return PurePosixPath(self.address).stem

    @property
    def identity(self) -> list[Any]:
        """Return what changes with the file: its address, its size in bytes, and the store's mark of its content.

        Raises:
            RemoteError: it cannot be reached.
        """
        return list(_find(self.address))

    @property
    def index_stem(self) -> Path:
        """Return the beginning of the path for the file's index."""
        return cache_folder() / "index" / _digest(self.address)

    @contextmanager
    def open(self) -> Iterator[str]:
        """Yield the path of the local copy, which stays until the context ends.

        Raises:
            RemoteError: it cannot be fetched.
        """
        if self.address in _FAILED:
            raise RemoteError(self.address, _FAILED[self.address])
        try:
            path, file = _acquire(self.address)
        except RemoteError as error:
            _FAILED[self.address] = error.reason
            raise
        # While it is open, other processes do not remove it.
        with file:
            yield str(path)


@contextmanager
def local_file(path: str) -> Iterator[str]:
    """Yield a path on this machine, of the local copy if it is an address."""
    if not is_remote(path):
        yield path
        return
    with RemoteFile(path).open() as copy:
        yield copy


def list_shards(address: str) -> list[str]:
    """Return the addresses of the tar files in a remote folder, sorted.

    Raises:
        RemoteError: it cannot be listed.
    """

    def find() -> list[str]:
        files, path = _file_system(address)
        return sorted(files.unstrip_protocol(name) for name in files.glob(f"{path.rstrip('/')}/*.tar"))

    return list(_try(address, find))


def _file_system(address: str) -> tuple[Any, str]:
    """Return the file system of fsspec for an address, and the path in it."""
    scheme = address.partition("://")[0].lower()
    if scheme in _PACKAGES:
        import_extra(_PACKAGES[scheme], address)
    core = import_extra("fsspec.core", address)
    try:
        files, path = core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: {error}") from error
    return files, str(path)


def _patience() -> float:
    return float(os.environ.get(_PATIENCE, _DEFAULT_PATIENCE))


def _try(address: str, work: Any) -> Any:
    """Return what some work with a store returns; what fails is tried again after a pause, then it is an error."""
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return work()
        except (FileNotFoundError, PermissionError) as error:
            # Another attempt would find the same.
            raise RemoteError(address, f"cannot be read: {describe_error(error)}") from error
        except ConfigError:
            raise
        # Each store's library has errors of its own.
        except Exception as error:
            reason = describe_error(error) or type(error).__name__
            logger.info("%s: attempt %d of %d: %s", address, attempt + 1, _ATTEMPTS, reason)
    raise RemoteError(address, f"cannot be fetched, in {_ATTEMPTS} attempts; the last says: {reason}")


@cache
def _find(address: str) -> tuple[str, int, str]:
    """Return address, size (-1 if the server does not say) and content mark of a file."""

    def ask() -> tuple[str, int, str]:
        files, path = _file_system(address)
        info = _call(files, "info", path)
        size = info.get("size")
        marks = [str(info[key]) for key in _MARKS if key in info]
        if size is None:
            size = -1
        return address, int(size), ",".join(marks[:1])

    found: tuple[str, int, str] = _try(address, ask)
    return found


def _call(files: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a method of a file system; one that waits on the network ends after some time without an answer."""
    if files.async_impl:
        # fsspec hands on `timeout` to what waits for the network.
        keywords["timeout"] = _patience()
    return getattr(files, method)(*arguments, **keywords)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _acquire(address: str) -> tuple[Path, IO[bytes]]:
    """Return the path of a file's copy, fetched if it is not there, and the copy opened and locked."""
    folder = cache_folder() / "files"
    # Decoders may look at the suffix.
    key, suffix = _digest("\n".join(map(str, _find(address)))), PurePosixPath(address).suffix[:12]
    path = folder / f"{key}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process fetches it, others wait for that.
        with (folder / f"{key}.lock").open("w") as lock:
            _lock(lock, exclusive=True)
            while True:
                if not path.exists():
                    _fetch(address, path)
                file = path.open("rb")
                _lock(file, exclusive=False)
                # It may have been removed before it was locked.
                if path.exists():
                    break
                file.close()
        # What was used last is removed last.
        os.utime(path)
    except OSError as error:
        raise RemoteError(address, f"its local copy in {folder} fails: {describe_error(error)}") from error
    return path, file


def _lock(file: IO[Any], exclusive: bool) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def _fetch(address: str, path: Path) -> None:
    """Fetch a file whole and give it its name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    _, size, _ = _find(address)
    make_room(size)
    try:
        with partial.open("wb") as file:
            for start in range(0, max(size, 1), _PIECE_BYTES):
                end = min(start + _PIECE_BYTES, size)
                piece = _try(address, lambda start=start, end=end: _fetch_piece(address, start, end, size))
                file.write(piece)
                # A server that knows no ranges sends all at once.
                if file.tell() >= size:
                    break
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _fetch_piece(address: str, start: int, end: int, size: int) -> bytes:
    files, path = _file_system(address)
    if size < 0:
        return bytes(_call(files, "cat_file", path))
    piece = bytes(_call(files, "cat_file", path, start=start, end=end))
    if len(piece) != end - start and not (start == 0 and len(piece) == size):
        raise OSError(f"{len(piece)} of {end - start} bytes came")
    return piece


def make_room(num_bytes: int) -> None:
    """Remove copies that were not used for longest, until there is room for a file within VIDEO_LLAMA_CACHE_GB."""
    limit = float(os.environ.get(_LIMIT_GB, _DEFAULT_LIMIT_GB)) * 1e9
    copies = []
    for path in (cache_folder() / "files").iterdir():
        with suppress(FileNotFoundError):
            if path.suffix not in (".lock", ".part"):
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in copies) + max(num_bytes, 0)
    for _, size, path in sorted(copies):
        if total <= limit:
            return
        if _remove(path):
            total -= size


def _remove(path: Path) -> bool:
    """Remove a copy that nobody reads; return whether it is gone."""
    try:
        with path.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True
