"""From an example to what the model learns from: media decoded, text tokenised, labels set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from video_llama.constants import IMAGE_MEAN, IMAGE_STD, Modality
from video_llama.data.examples import Example, MediaSource, open_media, source_of
from video_llama.data.features import FeatureStore
from video_llama.data.tokenization import (
    build_caption_sample,
    build_conversation_sample,
    build_dialogue_sample,
    dialogue_template,
    llava_instruct_turns,
    video_instruct_turns,
)
from video_llama.errors import DatasetError
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.messages import MessageReader

__all__ = ["MediaInput", "ProcessedSample", "SampleProcessor", "TextSettings"]

InputName = Literal["pixel_values", "audio_values", "audio_pixel_values"]


@dataclass
class MediaInput:
    """One media item on its way to the model.

    Args:
        name: the model input it is meant for.
        values: (frames, 3, height, width), uint8 or normalised, or (segments, 1, mel_bins, mel_frames); if
            `is_encoded`, what the frozen encoder makes of it: (frames, queries, width) or (segments, joint_width).
        key: where the feature cache keeps it; None without a cache.
        message: the sentence on sampled frames, which the cache keeps with the features.
        is_encoded: the values come from the cache.
    """

    name: InputName
    values: Tensor
    key: str | None = None
    message: str = ""
    is_encoded: bool = False


@dataclass(frozen=True)
class MediaItem:
    """One file that was read.

    Args:
        kind: how it was read.
        message: which frames were sampled; "" for images and sounds.
        input: for the model.
    """

    kind: Modality
    message: str
    input: MediaInput


@dataclass
class ProcessedSample:
    """A sample ready for a batch.

    Args:
        id: of the example.
        input_ids, labels: of equal length.
        media: in order of appearance.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    media: list[MediaInput]


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens.

    Args:
        tokenizer: of the language model.
        placeholder_ids, placeholder_lengths: by kind, "image" and, if the model can hear, "audio".
        max_txt_len: longest text, in tokens.
        end_sym: what ends a caption.
        prompts: of captions; one is drawn for each. Empty puts the media alone in front.
        template: of dialogues: "vicuna", "llama_v2" or the name of a conversation template.
        caption_processor: cleans captions; None leaves them.
    """

    tokenizer: PreTrainedTokenizerBase
    placeholder_ids: Mapping[str, int]
    placeholder_lengths: Mapping[str, int]
    max_txt_len: int
    end_sym: str
    prompts: Sequence[str] = ()
    template: str = "llama_v2"
    caption_processor: Any = None


@dataclass(frozen=True)
class SampleProcessor:
    """Encodes the examples of one dataset.

    All randomness comes from torch's global generator.

    Args:
        text: how text becomes tokens.
        media: how files are read.
        images_as_audio: pictures go to the audio branch, as the original trains it.
        features: encoder outputs kept on disk; files found there are not decoded.
    """

    text: TextSettings
    media: MediaProcessor
    images_as_audio: bool = False
    features: FeatureStore | None = None

    def __call__(self, example: Example) -> ProcessedSample:
        """Read the media and tokenise the text.

        Raises:
            MediaError: a file cannot be read.
            DatasetError: the annotation has another form than it should, or nothing is left to learn.
        """
        if "messages" in example.text:
            return self._encode_messages(example)
        assert example.source is not None, "only messages name their own media"
        item = self.read(example.kind, example.source)
        kind = "audio" if item.input.name != "pixel_values" else "image"
        placeholder = (self.text.placeholder_ids[kind], self.text.placeholder_lengths[kind])
        tokens = self._tokenise(example.text, placeholder, item)
        return ProcessedSample(example.id, **tokens, media=[item.input])

    def _tokenise(self, text: Mapping[str, Any], placeholder: tuple[int, int], item: MediaItem) -> dict[str, list[int]]:
        settings = self.text
        if "caption" in text:
            if not isinstance(text["caption"], str):
                raise DatasetError(f"the caption is no text: {text['caption']!r}")
            clean = settings.caption_processor
            return build_caption_sample(
                text["caption"] if clean is None else clean(text["caption"]),
                settings.tokenizer,
                placeholder=placeholder,
                prompt=self._draw_prompt(),
                end_sym=settings.end_sym,
                max_txt_len=settings.max_txt_len,
            )
        if "QA" in text:
            turns = video_instruct_turns(text["QA"], item.message, is_sound=item.kind == "audio")
        else:
            turns = llava_instruct_turns(text["conversations"])
        silent = next((number for number, (_, answer) in enumerate(turns, start=1) if not answer.strip()), None)
        if silent is not None:
            raise DatasetError(f"answer {silent} of {len(turns)} says nothing: there is no answer to learn")
        return build_dialogue_sample(
            turns,
            settings.tokenizer,
            template=dialogue_template(settings.template),
            placeholder=placeholder,
            max_txt_len=settings.max_txt_len,
        )

    def _draw_prompt(self) -> str | None:
        prompts = self.text.prompts
        return prompts[int(torch.randint(len(prompts), ()))] if prompts else None

    def _encode_messages(self, example: Example) -> ProcessedSample:
        conversation = dialogue_template(self.text.template).copy()
        # Messages name their media one by one, so no picture has to stand in for sound.
        media = _InputReader(dataclasses.replace(self, images_as_audio=False))
        reader = MessageReader(media, listen=False, strict=True)
        reader.fill(conversation, [_with_heard_clips(message) for message in example.text["messages"]])
        tokens = build_conversation_sample(
            conversation,
            self.text.tokenizer,
            placeholder_ids=self.text.placeholder_ids,
            placeholder_lengths=self.text.placeholder_lengths,
            max_txt_len=self.text.max_txt_len,
        )
        return ProcessedSample(example.id, **tokens, media=[item.input for item in (*reader.visuals, *reader.sounds)])

    def read(self, kind: Modality, source: MediaSource) -> MediaItem:
        """One file as model input, from the feature cache if it is there."""
        name: InputName = "audio_values"
        if kind != "audio":
            name = "audio_pixel_values" if self.images_as_audio else "pixel_values"
        key = None if self.features is None else self.features.key(source, kind, name, self.media)
        found = None if self.features is None or key is None else self.features.load(key)
        if found is not None:
            return MediaItem(kind, found.message, MediaInput(name, found.values, key, found.message, is_encoded=True))
        with open_media(source) as path:
            item = self._decode(kind, path)
        return MediaItem(kind, _message(item), MediaInput(name, _values(item, self.media), key, _message(item)))

    def _decode(self, kind: Modality, path: str | os.PathLike[str]) -> VideoFrames | AudioSegments:
        if kind == "video":
            return self.media.process_video(path, audio=False)[0]
        return self.media.process_image(path) if kind == "image" else self.media.process_audio(path)


@dataclass(frozen=True)
class _HeardClip:
    """The path of a video whose sound is read, too."""

    path: Any


def _with_heard_clips(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message in which a video right before its own sound is one item: `Chat` has words of their own for both."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    items: list[Any] = []
    for item in content:
        before = items[-1] if items else {}
        if item["type"] == "audio" and before.get("type") == "video" and item["path"] == before["path"]:
            items[-1] = {"type": "video", "path": _HeardClip(item["path"])}
        else:
            items.append(item)
    return {**message, "content": items}


@dataclass(frozen=True)
class _InputReader:
    """Reads the files of messages as `MediaProcessor` does, but through the encoder and its cache."""

    encoder: SampleProcessor

    def process_video(self, path: Any, *, audio: bool = False) -> tuple[MediaItem, MediaItem | None]:
        if isinstance(path, _HeardClip):
            return self.encoder.read("video", source_of(path.path)), self.process_audio(path.path)
        return self.encoder.read("video", source_of(path)), None

    def process_image(self, image: Any) -> MediaItem:
        return self.encoder.read("image", source_of(image))

    def process_audio(self, sound: Any) -> MediaItem:
        if "audio" not in self.encoder.text.placeholder_ids:
            raise DatasetError("the model has no audio branch (model.equip_audio_branch: False), so it hears no sound")
        return self.encoder.read("audio", source_of(sound))


def _values(item: VideoFrames | AudioSegments, media: MediaProcessor) -> Tensor:
    """What goes to the model: frames as bytes if it normalises them as the processor does, a quarter of the memory."""
    if isinstance(item, AudioSegments):
        return item.values
    if (media.mean, media.std) != (IMAGE_MEAN, IMAGE_STD):
        return item.pixel_values
    return torch.tensor(item.frames).permute(0, 3, 1, 2).contiguous()


def _message(item: VideoFrames | AudioSegments) -> str:
    return item.message if isinstance(item, VideoFrames) else ""
