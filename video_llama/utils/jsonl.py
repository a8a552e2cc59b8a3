"""Files of JSON objects, one on each line, whose last line a kill or a full disk may have cut off."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from video_llama.errors import VideoLlamaError

__all__ = ["append_jsonl", "drop_cut_line", "read_jsonl"]

logger = logging.getLogger(__name__)


def read_jsonl(path: Path, error: type[VideoLlamaError] | None, what: str = "JSON object") -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, in order.

    A last line without its line break is skipped if it cannot be read: it is being written, or was cut off.

    Args:
        path: the file.
        error: raised for any other line that is not a JSON object; None logs a warning and skips the line.
        what: what a line should be, in the words of the message.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                # With its line break the line was written as a whole, so it was not cut off but is damaged.
                message = f"{path}, line {number}: not a {what}"
                if error is not None:
                    raise error(message)
                logger.warning("%s; the line is skipped", message)


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line; the operating system has all of it when this returns.

    Text that UTF-8 cannot encode, such as a file name in another encoding, is escaped and read back unchanged.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    try:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        line = json.dumps(record).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        # An unbuffered write may take only a part of the line.
        while line:
            line = line[file.write(line) :]


def drop_cut_line(path: Path) -> None:
    """End a file with a whole line: complete the last one if only its line break is missing, else remove it.

    Call it before a file of an earlier run is continued, and only if no other process writes to it.
    """
    line, end = b"", 0
    with path.open("r+b") as file:
        for line in file:
            end += len(line)
        if not line or line.endswith(b"\n"):
            return
        file.seek(end)
        if _parse(line) is not None:
            file.write(b"\n")
            return
        logger.warning("%s: the last line is cut off and is removed (%d bytes)", path, len(line))
        file.truncate(end - len(line))


def _parse(line: bytes) -> dict[str, Any] | None:
    # A character that was cut in half is a ValueError as well, and brackets without an end are a RecursionError.
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
