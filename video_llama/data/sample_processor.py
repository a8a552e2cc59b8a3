"""Turn an example into what the model learns from: decode media, tokenise text, set labels."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from video_llama.constants import IMAGE_MEAN, IMAGE_STD, Modality
from video_llama.data.examples import Example, MediaSource, open_media, source_of
from video_llama.data.features import FeatureStore
from video_llama.data.tokenization import (
    NoRoomError,
    build_caption_sample,
    build_conversation_sample,
    build_dialogue_sample,
    dialogue_template,
    llava_instruct_turns,
    video_instruct_turns,
)
from video_llama.errors import DatasetError, MediaError
from video_llama.media.audio import read_window
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.messages import MessageReader

__all__ = ["MediaInput", "ProcessedSample", "SampleProcessor", "TextSettings"]

InputName = Literal["pixel_values", "audio_values", "audio_pixel_values"]


@dataclass
class MediaInput:
    """One media file on its way to the model.

    Args:
        name: the model input it is for.
        values: (frames, 3, height, width), uint8 or normalised, or (segments, 1, mel_bins, mel_frames); if
            `is_encoded`, the output of the frozen encoder: (frames, queries, width) or (segments, joint_width).
        key: of its entry in the feature cache; None without a cache.
        message: the sentence on the sampled frames of a video; "" for others. The cache keeps it with the features.
        is_encoded: the values are from the cache.
        kind: how the file was read; prompts introduce each kind in other words.
    """

    name: InputName
    values: Tensor
    key: str | None = None
    message: str = ""
    is_encoded: bool = False
    kind: Modality = "video"


@dataclass
class ProcessedSample:
    """A sample ready for a batch: the id of its example, input_ids and labels of equal length, media in order."""

    id: str
    input_ids: list[int]
    labels: list[int]
    media: list[MediaInput]


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens.

    Args:
        tokenizer: of the language model.
        placeholder_ids, placeholder_lengths: by kind, "image" and, if the model has an audio branch, "audio".
        max_txt_len: longest text, in tokens.
        end_sym: ends a caption.
        prompts: of captions; one is drawn for each. Without any, a caption follows the media directly.
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
    """Processes the examples of one dataset. All randomness is from torch's global generator.

    Args:
        text: how text becomes tokens.
        media: how files are read.
        images_as_audio: frames go to the audio branch, as the original trains it.
        features: encoder outputs on disk; files found there are not decoded.
        skip_silent: samples whose file has no audio track are left out, and do not count as bad.
    """

    text: TextSettings
    media: MediaProcessor
    images_as_audio: bool = False
    features: FeatureStore | None = None
    skip_silent: bool = False

    def __call__(self, example: Example) -> ProcessedSample:
        """Read the media and tokenise the text.

        Raises:
            MediaError: a file cannot be read.
            DatasetError: the annotation has an unknown form, or nothing is left to learn.
        """
        if "messages" in example.text:
            return self._process_messages(example)
        assert example.source is not None, "only messages name their own media"
        item = self.read(example.kind, example.source)
        # The placeholder depends on the branch that gets the input, not on the file: frames may go to the audio branch.
        kind = "image" if item.name == "pixel_values" else "audio"
        placeholder = (self.text.placeholder_ids[kind], self.text.placeholder_lengths[kind])
        with self._explaining_length([item]):
            tokens = self._tokenise(example.text, placeholder, item)
        return ProcessedSample(example.id, **tokens, media=[item])

    def _tokenise(
        self, text: Mapping[str, Any], placeholder: tuple[int, int], item: MediaInput
    ) -> dict[str, list[int]]:
        settings = self.text
        if "caption" in text:
            return self._tokenise_caption(text["caption"], placeholder)
        if "QA" in text:
            turns = video_instruct_turns(text["QA"], item.message, is_audio=item.kind == "audio")
        else:
            turns = llava_instruct_turns(text["conversations"])
        for number, (_, answer) in enumerate(turns, start=1):
            if not answer.strip():
                raise DatasetError(f"answer {number} of {len(turns)} is empty: there is nothing to learn")
        return build_dialogue_sample(
            turns,
            settings.tokenizer,
            template=dialogue_template(settings.template),
            placeholder=placeholder,
            max_txt_len=settings.max_txt_len,
        )

    def _tokenise_caption(self, caption: Any, placeholder: tuple[int, int]) -> dict[str, list[int]]:
        settings = self.text
        if not isinstance(caption, str):
            raise DatasetError(f"the caption is not text: {caption!r}")
        if settings.caption_processor is not None:
            caption = settings.caption_processor(caption)
        prompt = None
        if settings.prompts:
            # The batch reader seeds this generator for each sample, so a resumed run draws the same prompts.
            prompt = settings.prompts[int(torch.randint(len(settings.prompts), ()))]
        return build_caption_sample(
            caption,
            settings.tokenizer,
            placeholder=placeholder,
            prompt=prompt,
            end_sym=settings.end_sym,
            max_txt_len=settings.max_txt_len,
        )

    def _process_messages(self, example: Example) -> ProcessedSample:
        # The reader for chats fills the template, so that training and inference see the same text.
        conversation = dialogue_template(self.text.template).copy()
        # Messages name their media one by one, so no frames stand in for audio here.
        media = _MessageMedia(dataclasses.replace(self, images_as_audio=False))
        reader = MessageReader(media, read_audio=False, strict=True)
        messages = example.text["messages"]
        reader.fill(conversation, messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        with self._explaining_length(reader.visuals):
            tokens = build_conversation_sample(
                conversation,
                self.text.tokenizer,
                placeholder_ids=self.text.placeholder_ids,
                placeholder_lengths=self.text.placeholder_lengths,
                max_txt_len=self.text.max_txt_len,
                unlearnt=[number for number, answer in enumerate(answers) if answer.get("loss") is False],
            )
        return ProcessedSample(example.id, **tokens, media=[*reader.visuals, *reader.audios])

    @contextlib.contextmanager
    def _explaining_length(self, media: Sequence[MediaInput]) -> Iterator[None]:
        """Add to an error about too little room how much of it the sentences on the sampled frames take."""
        try:
            yield
        except NoRoomError as error:
            messages = [item.message for item in media if item.message]
            if not messages:
                raise
            ids = [self.text.tokenizer(message, add_special_tokens=False).input_ids for message in messages]
            raise NoRoomError(
                f"{error}; {sum(map(len, ids))} text tokens are the sentence on the sampled frames and their times: "
                "take fewer frames (n_frms) or raise model.max_txt_len"
            ) from error

    def read(self, kind: Modality, source: MediaSource) -> MediaInput:
        """Return one file as model input, from the feature cache if it is there."""
        name: InputName = "audio_values"
        if kind != "audio":
            name = "audio_pixel_values" if self.images_as_audio else "pixel_values"
        # The cache is asked first: neither a shard's file is copied nor a video decoded for what it holds.
        key = None
        if self.features is not None:
            key = self.features.key(source, kind, name, self.media)
            found = self.features.load(key)
            if found is not None:
                if not found.values.isfinite().all():
                    hint = "the encoder's numbers overflow: cache them anew with model.dtype: float32"
                    raise MediaError(source.path, "its features in the cache hold NaN or infinity", hint)
                return MediaInput(name, found.values, key, found.message, is_encoded=True, kind=kind)
        with open_media(source) as path:
            item = self._decode(kind, path, source)
        message = item.message if isinstance(item, VideoFrames) else ""
        return MediaInput(name, _values(item, self.media), key, message, kind=kind)

    def _decode(self, kind: Modality, path: str | os.PathLike[str], source: MediaSource) -> VideoFrames | AudioSegments:
        start, end = source.start_seconds, source.end_seconds
        if source.is_part and kind == "video":
            return self.media.finish_frames(self.media.decoder(audio=False).video(path, start, end))
        if source.is_part:
            return self.media.finish_segments(read_window(path, start or 0.0, end, self.media.segment_settings))
        if kind == "video":
            return self.media.process_video(path, audio=False)[0]
        return self.media.process_image(path) if kind == "image" else self.media.process_audio(path)


@dataclass(frozen=True)
class _MessageMedia:
    """Reads the files of messages as `MediaProcessor` does, but with the settings and cache of a `SampleProcessor`."""

    processor: SampleProcessor

    def process_video(self, path: Any, *, audio: bool = False) -> tuple[MediaInput, MediaInput | None]:
        # Frames and audio apart, since the feature cache may hold one of them.
        track = self.process_audio(path) if audio else None
        return self.processor.read("video", source_of(path)), track

    def process_image(self, image: Any) -> MediaInput:
        return self.processor.read("image", source_of(image))

    def process_audio(self, sound: Any) -> MediaInput:
        if "audio" not in self.processor.text.placeholder_ids:
            raise DatasetError("an audio item, but the model has no audio branch (model.equip_audio_branch: False)")
        return self.processor.read("audio", source_of(sound))


def _values(item: VideoFrames | AudioSegments, media: MediaProcessor) -> Tensor:
    if isinstance(item, AudioSegments):
        return item.values
    # Frames stay uint8, a quarter of the memory, if the model normalises them in the same way.
    if (media.mean, media.std) != (IMAGE_MEAN, IMAGE_STD):
        return item.pixel_values
    return torch.tensor(item.frames).permute(0, 3, 1, 2).contiguous()
