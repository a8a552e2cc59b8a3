"""What `video-llama caption` says of files that it leaves out, and of clips at its end."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from video_llama.cli.command import FAILED, numbered

if TYPE_CHECKING:
    from video_llama.captioning import CaptionFile
    from video_llama.captioning.inputs import Clip

__all__ = ["report_left_out", "report_result"]

# Failed clips that are named at the end; the output holds all.
NUM_NAMED = 3


def report_left_out(paths: Sequence[Path]) -> None:
    """Print how many files of folders and patterns are not captioned, by kind."""
    if paths:
        kinds = ", ".join(numbered(number, kind) for kind, number in Counter(map(_kind, paths)).items())
        sys.stderr.write(f"left out of folders and patterns: {kinds} (to caption such a file, give its path)\n")


def _kind(path: Path) -> str:
    from video_llama.data.examples import SUFFIXES

    suffix = path.suffix.lower()
    if suffix in SUFFIXES["image"]:
        return "image"
    if suffix in SUFFIXES["audio"]:
        return "audio file"
    return "other file"


def report_result(clips: Sequence[Clip], file: CaptionFile) -> int:
    """Print how many clips have captions, and the first of those that have none; return the exit status."""
    failed = [clip.id for clip in clips if file.has_failed(clip.id)]
    captioned = f"{numbered(len(clips) - len(failed), 'clip')} captioned, in {file.path}"
    if not failed:
        sys.stderr.write(f"{captioned}\n")
        return 0
    sys.stderr.write(f"{len(failed)} of {numbered(len(clips), 'clip')} could not be captioned:\n")
    for name in failed[:NUM_NAMED]:
        sys.stderr.write(f"  {name}: {file.error_of(name)}\n")
    if len(failed) > NUM_NAMED:
        sys.stderr.write(f"  and {len(failed) - NUM_NAMED} more\n")
    advice = "to try them again, remove those lines and add --resume"
    sys.stderr.write(f"{captioned}; the others have an error there in place of a caption ({advice})\n")
    return FAILED
