"""What kind of media a file is, by its content and not by its name."""

from __future__ import annotations

import os
from typing import Literal

from av.stream import Disposition

from video_llama.media.containers import open_container
from video_llama.media.probe import check_media_file, describe_content

__all__ = ["media_kind"]


def media_kind(path: str | os.PathLike[str]) -> Literal["video", "image", "audio"]:
    """Whether a file is to be watched, looked at or listened to.

    A sound file with a cover picture is sound; an animated GIF is a video.

    Raises:
        MediaError: no such file, or nothing that can be decoded; the message says what it seems to be.
    """
    if "still image" in describe_content(check_media_file(path)):
        return "image"
    with open_container(path) as container:
        is_video = any(not stream.disposition & Disposition.attached_pic for stream in container.streams.video)
        return "video" if is_video or not container.streams.audio else "audio"
