"""Messages in the form of transformers' chat templates, with media items, as a conversation.

{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What?"}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from video_llama.conversation import Conversation
from video_llama.pieces import (
    Placeholder,
    introduce_image,
    introduce_media,
    introduce_sound,
    introduce_video,
)
from video_llama.processor.media import AudioSegments, VideoFrames

__all__ = ["MessageReader", "Messages"]

Messages = Sequence[Mapping[str, Any]]


class MediaReader(Protocol):
    """What reads the files: a `MediaProcessor`, or whatever returns items with a `kind` and a `message` as it does."""

    def process_video(self, path: Any, *, audio: bool = True) -> tuple[Any, Any]: ...
    def process_image(self, image: Any) -> Any: ...
    def process_audio(self, sound: Any) -> Any: ...


@dataclass
class MessageReader:
    """Turns messages into a conversation and gathers their media.

    Args:
        media_processor: reads the files; None leaves them unread, and so says nothing on sampled frames.
        listen: read the sound of videos, too.
        visuals, sounds: what was read, in order of appearance.
    """

    media_processor: MediaReader | None
    listen: bool
    visuals: list[Any] = field(default_factory=list)
    sounds: list[Any] = field(default_factory=list)

    def fill(self, conversation: Conversation, messages: Messages) -> None:
        """Append the messages to a conversation; one in the role "system" replaces its system text.

        Raises:
            ValueError: an unknown role or item type, or a media item without its file.
            MediaError: a file cannot be read.
        """
        roles = {"user": conversation.roles[0], "assistant": conversation.roles[1]}
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role == "system":
                conversation.system = "".join(str(item) for item in self._content(content))
            elif role in roles:
                conversation.append_message(roles[role], self._content(content))
            else:
                raise ValueError(f"the role of a message must be system, user or assistant, not {role!r}")

    def _content(self, content: Any) -> list[str | Placeholder]:
        """Text and introduced media, joined by single spaces."""
        if isinstance(content, str):
            return [content]
        joined: list[str | Placeholder] = []
        for item in content or ():
            joined += [*([" "] if joined else []), *self._item(item)]
        return joined

    def _item(self, item: Mapping[str, Any]) -> list[str | Placeholder]:
        kind = item.get("type")
        if kind == "text":
            if "text" not in item:
                raise ValueError(f"the text item {dict(item)} has no text")
            return [str(item["text"])]
        if kind not in ("image", "video", "audio"):
            raise ValueError(f"the type of a content item must be text, image, video or audio, not {kind!r}")
        source = next((item[key] for key in (kind, "path", "url") if item.get(key) is not None), None)
        if self.media_processor is None:
            introductions = {"image": introduce_image, "video": introduce_video, "audio": introduce_sound}
            return introductions[kind]()
        if source is None:
            raise ValueError(f"the {kind} item {dict(item)} names no file; give it as {kind!r} or 'path'")
        return self._read(kind, source, self.media_processor)

    def _read(self, kind: str, source: Any, media: MediaReader) -> list[str | Placeholder]:
        frames: list[Any] = []
        sound: Any = None
        if isinstance(source, VideoFrames):
            frames = [source]
        elif isinstance(source, AudioSegments):
            sound = source
        elif kind == "video":
            video, sound = media.process_video(source, audio=self.listen)
            frames = [video]
        elif kind == "image":
            frames = [media.process_image(source)]
        else:
            sound = media.process_audio(source)
        self.visuals += frames
        self.sounds += [] if sound is None else [sound]
        return introduce_media(frames, sound)[:-1]  # without the joining space
