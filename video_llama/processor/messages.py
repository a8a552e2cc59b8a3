"""Messages in the form of transformers' chat templates, with media items, as a conversation.

{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What?"}]}

A video stands for its frames. Right behind it, an audio item of the same file adds its audio track, and both are
introduced together, as `Chat` introduces a video with its audio. Training, `apply_chat_template` and whatever else
takes messages read them here, so one form of messages is one prompt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from video_llama.conversation import Conversation
from video_llama.errors import MessagesError
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.prompt_parts import Placeholder, audio_prefix, image_prefix, media_prefix, video_prefix

__all__ = ["MessageReader", "Messages"]

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]

_PREFIXES = {"image": image_prefix, "video": video_prefix, "audio": audio_prefix}
_ROLES = ("system", "user", "assistant")
_EXPECTED = "expected are one system message or none, then user and assistant in turn, media in user messages only"


class MediaReader(Protocol):
    """Reader of the files: a `MediaProcessor`, or an object that returns items with `kind` and `message` as it does."""

    def process_video(self, path: Any, /, *, audio: bool = True) -> tuple[Any, Any]: ...
    def process_image(self, image: Any, /) -> Any: ...
    def process_audio(self, audio: Any, /) -> Any: ...


@dataclass
class _Item:
    """One item of a message: text, or media and where to read them; None where the item names no file."""

    kind: str
    source: Any
    is_heard: bool = False


@dataclass
class MessageReader:
    """Turn messages into a conversation and gather their media.

    Args:
        media_processor: reads the files.
        read_audio: read the audio tracks of all videos that have one.
        strict: for training data: consecutive user messages, which are otherwise joined, and an empty assistant
            message are errors.
        has_audio: the model has an audio branch; without it audio items are errors.
        allow_unnamed: media items may name no file; they get their place, without a sentence on sampled frames.
        visuals, audios: what was read, in order of appearance.
    """

    media_processor: MediaReader
    read_audio: bool
    strict: bool = False
    has_audio: bool = True
    allow_unnamed: bool = False
    visuals: list[Any] = field(default_factory=list)
    audios: list[Any] = field(default_factory=list)

    def fill(self, conversation: Conversation, messages: Messages) -> None:
        """Append the messages to a conversation; one in the role "system" replaces its system text.

        Raises:
            MessagesError: an unknown role or item type, roles out of order, media outside user messages, an empty
                user message, or a media item without its file.
            MediaError: a file cannot be read.
        """
        _check_order(messages, self.strict)
        user, assistant = conversation.roles
        for message in messages:
            role, content = message["role"], self._content(message.get("content"))
            if role == "system":
                conversation.system = "".join(item for item in content if isinstance(item, str))
            elif role == "assistant":
                conversation.append_message(assistant, content)
            # Consecutive user messages are one question.
            elif conversation.messages and conversation.messages[-1][0] == user:
                conversation.messages[-1][1] = [*conversation.messages[-1][1], " ", *content]
            else:
                conversation.append_message(user, content)

    def _content(self, content: Any) -> list[str | Placeholder]:
        """Return text and media with their prefixes, joined by single spaces."""
        if isinstance(content, str):
            return [content]
        joined: list[str | Placeholder] = []
        for item in _join_tracks(self._item(item) for item in content or ()):
            if joined:
                joined.append(" ")
            joined += self._read(item)
        return joined

    def _item(self, item: Mapping[str, Any]) -> _Item:
        kind = item.get("type")
        if kind == "text":
            if "text" not in item:
                raise MessagesError(f"the text item {dict(item)} has no text")
            return _Item(kind, str(item["text"]))
        if kind not in _PREFIXES:
            raise MessagesError(f"the type of a content item must be text, image, video or audio, not {kind!r}")
        if kind == "audio" and not self.has_audio:
            raise MessagesError(f"the audio item {dict(item)} cannot be used: the model has no audio branch")
        _tell_unread(kind, item)
        # transformers names the file of an item by any of these keys.
        for key in (kind, "path", "url"):
            if item.get(key) is not None:
                return _Item(kind, item[key])
        if item.get("base64") is not None:
            return _Item(kind, f"data:;base64,{item['base64']}")
        if not self.allow_unnamed:
            raise MessagesError(f"the {kind} item {dict(item)} names no file; give it as {kind!r} or 'path'")
        return _Item(kind, None)

    def _read(self, item: _Item) -> list[str | Placeholder]:
        kind, source, media = item.kind, item.source, self.media_processor
        if kind == "text":
            return [source]
        if source is None:
            return _PREFIXES[kind]()
        frames: Any = None
        audio: Any = None
        if isinstance(source, VideoFrames):
            frames = source
        elif isinstance(source, AudioSegments):
            audio = source
        elif kind == "video":
            frames, audio = media.process_video(source, audio=self.read_audio or item.is_heard)
            if audio is None and item.is_heard:
                # Audio that the messages name must be there: this raises the error that says why it is not.
                audio = media.process_audio(source)
        elif kind == "image":
            frames = media.process_image(source)
        else:
            audio = media.process_audio(source)
        visuals = [] if frames is None else [frames]
        self.visuals += visuals
        if audio is not None:
            self.audios.append(audio)
        # Without the joining space: `_content` joins the items.
        return media_prefix(visuals, audio)[:-1]


def _tell_unread(kind: str, item: Mapping[str, Any]) -> None:
    """Say of keys in a media item that nothing reads; nulls are what tables fill up with."""
    read = {"type", "path", "url", "base64", kind}
    unread = sorted(str(key) for key, value in item.items() if key not in read and value is not None)
    if unread:
        logger.warning(
            "%s of the %s item is not read; num_frames and fps are keywords of the processor, for all of a call",
            ", ".join(unread),
            kind,
        )


def _join_tracks(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items, a video and right behind it the audio of the same file as one."""
    before: _Item | None = None
    for item in items:
        if before is not None and _is_track_of(before, item):
            before.is_heard = True
            continue
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def _is_track_of(video: _Item, item: _Item) -> bool:
    """Return whether an item is the audio track of a video before it; a second one is audio of its own."""
    if video.kind != "video" or video.is_heard or item.kind != "audio":
        return False
    return _is_same_file(video.source, item.source)


def _is_same_file(source: Any, other: Any) -> bool:
    """Return whether two items name one file; arrays and what is in memory are no files."""
    paths = (str, os.PathLike)
    if isinstance(source, paths) and isinstance(other, paths):
        return os.path.normpath(os.fspath(source)) == os.path.normpath(os.fspath(other))
    # The fields of a file in a shard.
    return isinstance(source, Mapping) and isinstance(other, Mapping) and source == other


def _check_order(messages: Messages, strict: bool) -> None:
    """Check the roles and contents: a template may tell questions from answers by their place alone."""
    before = None
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in _ROLES:
            raise MessagesError(f"the role of a message must be system, user or assistant, not {role!r}")
        # The system message comes first if at all, and an answer only after a question. Two questions in a row are an
        # error in training data only.
        is_out_of_turn = {
            "system": before is not None,
            "user": strict and before == "user",
            "assistant": before != "user",
        }
        if is_out_of_turn[role]:
            place = f"follows a message of the {before}" if before else "comes first"
            raise MessagesError(f"message {number} ({role}) {place}; {_EXPECTED}")
        _check_content(message.get("content"), f"message {number} ({role})", role, strict)
        before = role


def _check_content(content: Any, where: str, role: str, strict: bool) -> None:
    items = content
    if content is None:
        items = ()
    elif isinstance(content, str):
        items = ({"type": "text", "text": content},)
    if not isinstance(items, Sequence) or not all(isinstance(item, Mapping) for item in items):
        raise MessagesError(f"{where}: the content must be text or a list of items, but is {content!r}")
    media = [item["type"] for item in items if item.get("type") in _PREFIXES]
    if media and role != "user":
        raise MessagesError(f"{where}: holds {media[0]}; {_EXPECTED}")
    is_empty = all(item.get("type") == "text" and not str(item.get("text")).strip() for item in items)
    if is_empty and role == "user":
        raise MessagesError(f"{where}: is empty; a question needs text or media")
    if is_empty and role == "assistant" and strict:
        raise MessagesError(f"{where}: is empty, so there is no training target")
