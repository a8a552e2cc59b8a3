"""Messages in the form of transformers' chat templates, with media items, as a conversation.

{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What?"}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from video_llama.conversation import Conversation
from video_llama.errors import MessagesError
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.prompt_parts import (
    Placeholder,
    audio_prefix,
    image_prefix,
    media_prefix,
    video_prefix,
)

__all__ = ["MessageReader", "Messages"]

Messages = Sequence[Mapping[str, Any]]

_MEDIA = ("image", "video", "audio")
_ROLES = ("system", "user", "assistant")
_EXPECTED = "expected are one system message or none, then user and assistant in turn, media in user messages only"


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
        strict: of messages to learn from: user messages in a row, which else become one, and an assistant message that
            says nothing are errors, too.
        visuals, sounds: what was read, in order of appearance.
    """

    media_processor: MediaReader | None
    listen: bool
    strict: bool = False
    visuals: list[Any] = field(default_factory=list)
    sounds: list[Any] = field(default_factory=list)

    def fill(self, conversation: Conversation, messages: Messages) -> None:
        """Append the messages to a conversation; one in the role "system" replaces its system text.

        Raises:
            MessagesError: an unknown role or item type, roles out of order, media that are not the user's, a user
                message that says nothing, or a media item without its file.
            MediaError: a file cannot be read.
        """
        _check_order(messages, self.strict)
        for message in messages:
            role, content = message["role"], self._content(message.get("content"))
            if role == "system":
                conversation.system = "".join(item for item in content if isinstance(item, str))
            elif role == "assistant":
                conversation.append_message(conversation.roles[1], content)
            elif conversation.messages and conversation.messages[-1][0] == conversation.roles[0]:
                conversation.messages[-1][1] = [*conversation.messages[-1][1], " ", *content]
            else:
                conversation.append_message(conversation.roles[0], content)

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
                raise MessagesError(f"the text item {dict(item)} has no text")
            return [str(item["text"])]
        if kind not in _MEDIA:
            raise MessagesError(f"the type of a content item must be text, image, video or audio, not {kind!r}")
        source = next((item[key] for key in (kind, "path", "url") if item.get(key) is not None), None)
        if self.media_processor is None:
            introductions = {"image": image_prefix, "video": video_prefix, "audio": audio_prefix}
            return introductions[kind]()
        if source is None:
            raise MessagesError(f"the {kind} item {dict(item)} names no file; give it as {kind!r} or 'path'")
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
        return media_prefix(frames, sound)[:-1]  # without the joining space


def _check_order(messages: Messages, strict: bool) -> None:
    """See that a template, which may tell questions from answers by their place alone, will write what is meant.

    Raises:
        MessagesError: it would not.
    """
    before = None
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in _ROLES:
            raise MessagesError(f"the role of a message must be system, user or assistant, not {role!r}")
        is_out_of_turn = {
            "system": before is not None,
            "user": strict and before == "user",
            "assistant": before != "user",
        }
        if is_out_of_turn[role]:
            place = "stands first" if before is None else f"follows one of the {before}"
            raise MessagesError(f"message {number} is the {role}'s and {place}; {_EXPECTED}")
        _check_content(message.get("content"), f"message {number} ({role})", role, strict)
        before = role


def _check_content(content: Any, where: str, role: str, strict: bool) -> None:
    items = [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None else content
    if not isinstance(items, Sequence) or not all(isinstance(item, Mapping) for item in items):
        raise MessagesError(f"{where}: the content must be text or a list of items, but is {content!r}")
    media = next((item["type"] for item in items if item.get("type") in _MEDIA), None)
    if media is not None and role != "user":
        raise MessagesError(f"{where}: holds {media}; {_EXPECTED}")
    says_nothing = all(item.get("type") == "text" and not str(item.get("text")).strip() for item in items)
    if says_nothing and role == "user":
        raise MessagesError(f"{where}: says nothing; a question needs text or media")
    if says_nothing and role == "assistant" and strict:
        raise MessagesError(f"{where}: says nothing: there is no answer to learn")
