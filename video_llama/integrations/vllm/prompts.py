"""Chat messages of OpenAI's form as prompts for vLLM: ids, and the tensors of their media. Needs no vLLM.

The prompts are those of `VideoLlamaProcessor.apply_chat_template`. Each media item keeps its run of ids, in which marks
say what goes there: ids above the vocabulary, which no text can produce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from video_llama.conversation import conv_templates
from video_llama.errors import ConfigError, MessagesError
from video_llama.inference.captioning import ask_about
from video_llama.processor.clips import Window
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import encode_parts

__all__ = ["Marks", "MediaPart", "make_prompt", "request_keywords", "to_messages", "window_prompt"]

_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "audio_url": "audio",
    "input_audio": "audio",
}
# Newer clients of OpenAI write the first for the second.
_ROLES = {"developer": "system"}
# What a request may set; `apply_chat_template` knows more, such as addresses to download.
_REQUEST_KEYWORDS = ("num_frames", "load_audio_from_video")
# The numbers of transformers' `mm_token_type_ids`.
_KINDS = {1: "image", 2: "video", 3: "audio"}


@dataclass(frozen=True)
class Marks:
    """The ids that say what goes where, and how many of them one item takes.

    Args:
        ids, lengths: by kind: image, video, audio. An image and a video differ, so that vLLM can tell them apart.
    """

    ids: Mapping[str, int]
    lengths: Mapping[str, int]

    @classmethod
    def of(cls, processor: VideoLlamaProcessor) -> Marks:
        """Return the marks of a model."""
        image, audio = processor.image_token_id, processor.audio_token_id
        frames = processor.num_video_query_tokens
        return cls(
            {"image": image, "video": max(image, audio) + 1, "audio": audio},
            {"image": frames, "video": frames, "audio": processor.num_audio_query_tokens},
        )

    def run(self, kind: str) -> list[int]:
        """Return the ids of one item."""
        return [self.ids[kind]] * self.lengths[kind]


@dataclass
class MediaPart:
    """A media item of a message.

    Args:
        kind: image, video or audio.
        name: for error messages.
        address: where the file is: a `data:`, `file:` or `https:` address.
        item: the content item of our form; whoever has loaded the file puts it in as `item[kind]`.
    """

    kind: str
    name: str
    address: str
    item: dict[str, Any] = field(default_factory=dict)


def to_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """Return OpenAI's messages in our form, and their media items, whose files are still to be loaded.

    Raises:
        MessagesError: a part that is neither text nor media, a media part without its address, tool calls, or no
            message of the user.
    """
    converted: list[dict[str, Any]] = []
    media: list[MediaPart] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if message.get("tool_calls"):
            raise MessagesError("the model calls no tools: leave tool_calls out")
        if not isinstance(content, str) and content is not None:
            content = [_convert_part(part, media) for part in content]
        converted.append({"role": _ROLES.get(str(role), role), "content": content})
    if not any(message["role"] == "user" for message in converted):
        raise MessagesError("there is no message of the user to answer")
    return converted, media


def _convert_part(part: Any, media: list[MediaPart]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text") or ""}
    if kind not in _MEDIA_PARTS:
        known = ", ".join((*_TEXT_PARTS, *_MEDIA_PARTS))
        raise MessagesError(f"the type of a part must be one of {known}, not {kind!r}")
    address = part.get("image_url") if kind == "input_image" else part.get(kind)
    if isinstance(address, Mapping):
        address = _address_in(address)
    if not isinstance(address, str) or not address:
        raise MessagesError(f"the part {kind} names no file: give its url, or the data of input_audio")
    found = MediaPart(_MEDIA_PARTS[kind], f"{kind} {len(media) + 1}", address, {"type": _MEDIA_PARTS[kind]})
    media.append(found)
    return found.item


def _address_in(given: Mapping[str, Any]) -> Any:
    """Return the address in a part's mapping: `{"url": …}`, or base64 in `{"data": …, "format": …}`."""
    if given.get("data"):
        return f"data:audio/{given.get('format') or 'wav'};base64,{given['data']}"
    return given.get("url")


def request_keywords(given: Mapping[str, Any] | None, max_num_frames: int, takes_audio: bool = True) -> dict[str, Any]:
    """Return what a request sets about its media, as keywords of `make_prompt`.

    Args:
        given: `mm_processor_kwargs` of the request.
        max_num_frames: more frames are refused: they would need more memory than vLLM has set aside.
        takes_audio: the server takes audio; otherwise videos are answered by their frames.

    Raises:
        ConfigError: something else than `num_frames` and `load_audio_from_video`, or too many frames.
    """
    keywords = dict(given or {})
    # The name that vLLM's own models have.
    if "use_audio_in_video" in keywords:
        keywords["load_audio_from_video"] = keywords.pop("use_audio_in_video")
    if unknown := sorted(set(keywords) - set(_REQUEST_KEYWORDS)):
        known = ", ".join(_REQUEST_KEYWORDS)
        raise ConfigError(f"mm_processor_kwargs can set {known}, not {', '.join(unknown)}")
    number = keywords.get("num_frames")
    if number is not None and (not isinstance(number, int) or not 1 <= number <= max_num_frames):
        raise ConfigError(f"num_frames must be from 1 to {max_num_frames}, not {number!r}")
    if not takes_audio:
        keywords["load_audio_from_video"] = False
    return keywords


def make_prompt(
    processor: VideoLlamaProcessor,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    load_audio_from_video: bool = True,
    **keywords: Any,
) -> dict[str, Any]:
    """Return messages of our form as a prompt of vLLM, for its renderer or `LLM.generate`.

    Args:
        processor: of the model.
        messages, keywords: as for `VideoLlamaProcessor.apply_chat_template`.

    Returns:
        `prompt_token_ids`, and `multi_modal_data`: by kind, a list of the tensors of each item,
        (frames, 3, height, width) or (segments, 1, mel_bins, mel_frames), float32.

    Raises:
        MessagesError, MediaError, ConfigError: as `apply_chat_template`.
    """
    batch = processor.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        load_audio_from_video=load_audio_from_video and processor.use_audio,
        return_mm_token_type_ids=True,
        **keywords,
    )
    ids, types = batch["input_ids"][0], batch["mm_token_type_ids"][0]
    marks = Marks.of(processor)
    media: dict[str, list[Tensor]] = {}
    for number, kind in _KINDS.items():
        ids = torch.where(types == number, marks.ids[kind], ids)
    # One type for each item: runs have a fixed length, and so neighbours need no gap between them.
    frame_types = types[(types == 1) | (types == 2)].view(-1, marks.lengths["image"])[:, 0]
    for number, frames in zip(frame_types.tolist(), _unpadded(batch, "pixel_values", "frame_mask"), strict=True):
        media.setdefault(_KINDS[number], []).append(frames)
    if audios := _unpadded(batch, "audio_values", "segment_mask"):
        media["audio"] = audios
    prompt: dict[str, Any] = {"prompt_token_ids": ids.tolist()}
    if media:
        prompt["multi_modal_data"] = media
    return prompt


def window_prompt(processor: VideoLlamaProcessor, window: Window, question: str) -> dict[str, Any]:
    """Return a question about a window as a prompt of vLLM, as `BatchCaptioner` asks it.

    Args:
        processor: of the model.
        window: what `ClipReader` has read; its frames may be bytes.
        question: about the window.

    Returns:
        as `make_prompt`. Frames of images, too, are of the kind "video": they are the same to the branch.
    """
    tokenizer, marks = processor.tokenizer, Marks.of(processor)
    conversation = ask_about(window, question, conv_templates[processor.conv_template].copy())
    ids = {"image": marks.ids["video"], "audio": marks.ids["audio"]}
    encoded = encode_parts(conversation.get_parts(tokenizer), tokenizer, ids, processor.placeholder_lengths)
    frames, audio = window.frames, window.audio
    if isinstance(frames, VideoFrames):
        frames = frames.pixel_values
    if isinstance(audio, AudioSegments):
        audio = audio.values
    media = {kind: [item] for kind, item in (("video", frames), ("audio", audio)) if item is not None}
    return {"prompt_token_ids": encoded.input_ids, "multi_modal_data": media}


def _unpadded(batch: Mapping[str, Any], name: str, mask_name: str) -> list[Tensor]:
    """Return the items of a batch at their own lengths."""
    items, masks = batch.get(name), batch.get(mask_name)
    if items is None:
        return []
    if masks is None:
        return list(items)
    return [item[mask] for item, mask in zip(items, masks, strict=True)]
