"""The transformers processor: text and media files to model inputs, ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from video_llama.conversation import conv_templates
from video_llama.errors import ConfigError
from video_llama.media.image import ImageInput
from video_llama.processor.collate import pad_ids, pad_items
from video_llama.processor.media_processor import AudioInput, AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.messages import MessageReader, Messages
from video_llama.processor.prompt import (
    Prompt,
    RenderedPrompt,
    check_positions,
    encode_parts,
    find_visual_kinds,
    parse_prompts,
)
from video_llama.processor.tensor_like import as_segments
from video_llama.prompt_parts import PromptPart

__all__ = ["VideoLlamaProcessor"]

# What a `MediaProcessor` reads, what it has read, or floating point tensors as the model takes them.
VideoItem = Any
ImageItem = ImageInput | VideoFrames
AudioItem = AudioInput


class VideoLlamaProcessor(ProcessorMixin):
    """Turn text and media files into the model's tensors.

    Args:
        tokenizer: from `load_tokenizer`.
        image_token_id, audio_token_id: ids that mark frames and audio; above the language model's vocabulary,
            so that no text can produce them.
        media_processor: how files are read; its settings, as a mapping, serve as well.
        num_video_query_tokens: ids that one video or image takes.
        num_audio_query_tokens: ids that one audio item takes.
        use_audio: the model has an audio branch; without it audio items are errors.
        conv_template: name of the conversation template that the weights were trained with.
        chat_template: not used; transformers passes it.

    Raises:
        ConfigError: an unknown template, or a placeholder id that the tokenizer can produce.

    Example:
        >>> from video_llama.checkpoints.hub import PACKAGED_MODELS
        >>> processor = VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")
        >>> messages = [{"role": "user", "content": "What is it?"}]
        >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        >>> sorted(inputs)
        ['attention_mask', 'input_ids']
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        audio_token_id: int,
        media_processor: MediaProcessor | dict[str, Any] | None = None,
        num_video_query_tokens: int = 32,
        num_audio_query_tokens: int = 8,
        use_audio: bool = True,
        conv_template: str = "llama_2",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        if conv_template not in conv_templates:
            known = ", ".join(sorted(conv_templates))
            raise ConfigError(f"unknown conversation template {conv_template!r}. Known: {known}")
        if min(image_token_id, audio_token_id) < len(tokenizer) or image_token_id == audio_token_id:
            raise ConfigError(
                f"image_token_id ({image_token_id}) and audio_token_id ({audio_token_id}) must differ and "
                f"lie above the {len(tokenizer)} ids of the tokenizer, or text could pass for media"
            )
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        if not isinstance(media_processor, MediaProcessor):
            # The setting is the user's: a checkpoint that somebody else wrote must not make it.
            saved = {name: value for name, value in (media_processor or {}).items() if name != "allow_urls"}
            media_processor = MediaProcessor(**saved)
        self.media_processor = media_processor
        self.num_video_query_tokens = num_video_query_tokens
        self.num_audio_query_tokens = num_audio_query_tokens
        self.use_audio = use_audio
        self.conv_template = conv_template

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Return the id that marks media features, by kind of `Placeholder`."""
        return {"image": self.image_token_id, "audio": self.audio_token_id}

    @property
    def placeholder_lengths(self) -> dict[str, int]:
        """Return the number of ids that one media item takes, by kind of `Placeholder`."""
        return {"image": self.num_video_query_tokens, "audio": self.num_audio_query_tokens}

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the tensors that the processor makes."""
        return ["input_ids", "attention_mask", "pixel_values", "frame_mask", "audio_values", "segment_mask"]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings but the tokenizer, in types of JSON."""
        return {**super().to_dict(), "media_processor": self.media_processor.to_dict()}

    def __call__(
        self,
        text: Prompt | Sequence[Prompt],
        videos: VideoItem | Sequence[VideoItem] | None = None,
        images: ImageItem | Sequence[ImageItem] | None = None,
        audios: AudioItem | Sequence[AudioItem] | None = None,
        padding: bool | Literal["longest"] = True,
        padding_side: Literal["left", "right"] = "left",
        return_tensors: str = "pt",
        allow_urls: bool = False,
    ) -> BatchFeature:
        """Process prompts and their media into model inputs.

        Args:
            text: a prompt or a list of them. A prompt is what `apply_chat_template` returns, a list of
                parts, or a string in which every `<ImageHere>` and `<AudioHere>` is a media position (so a
                string must not hold text typed by users).
            videos: whatever `MediaProcessor.process_video` reads, `VideoFrames`, or floating point tensors
                (frames, 3, height, width) as the model takes them; the audio track of files is not read. A list
                holds those of all prompts, in order of appearance.
            images: whatever `process_image` reads, or as for videos. With videos given too, `<Image>` or `<Video>`
                before a position says which it is.
            audios: whatever `process_audio` reads, `AudioSegments`, or tensors (segments, 1, bins, frames).
            padding: False requires prompts of equal length.
            padding_side: left for generation, right for training.
            allow_urls: download media that are http or https addresses.

        Returns:
            input_ids, attention_mask: (prompts, length), int64.
            pixel_values: (items, frames, 3, height, width), with videos or images.
            audio_values: (audios, segments, 1, bins, frames), with audio.
            frame_mask, segment_mask: (items, frames), (audios, segments), bool; only where items are padded.

        Raises:
            ValueError: media and positions do not match, or prompts of unequal length without padding.
            MediaError: a file cannot be read.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors can only be 'pt', not {return_tensors!r}")
        prompts = parse_prompts(text)
        media = self._media(allow_urls)
        visuals = _order_visuals(media, prompts, _as_list(videos), _as_list(images))
        read_audios = [_read_audio(media, item) for item in _as_list(audios)]
        return self._batch(prompts, visuals, read_audios, padding, padding_side)

    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        load_audio_from_video: bool = False,
        allow_urls: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write messages with media items in the conversation template that belongs to the weights.

        Args:
            conversation: messages, or a list of conversations. Items are `{"type": "text", "text": …}` and
                `{"type": "image" | "video" | "audio", "path": …}`, as in training (docs/own_data.md); typed text stays
                text. User and assistant take
                turns after an optional system message; consecutive user messages are joined by a space.
            add_generation_prompt: end with the beginning of an answer.
            tokenize: True returns model inputs. False returns strings, to be passed to `__call__` with the media. Both
                read the files, since the text names the frames that were sampled; only with False an item may name no
                file, and then has no such sentence.
            return_dict: with `tokenize`, False returns the input_ids alone.
            load_audio_from_video: read the audio tracks of all videos that have one, if the model has an audio branch.
                By default a video is its frames, and an audio item of the same file right behind it adds its audio.
            allow_urls: download media that are http or https addresses.
            kwargs: padding, padding_side and return_tensors of `__call__`.

        Raises:
            MessagesError: a `ValueError`: as `MessageReader.fill`.
            MediaError: a file cannot be read.
        """
        # One conversation is a list of messages (mappings); several are a list of such lists.
        is_single = not conversation or not isinstance(conversation[0], Sequence)
        conversations: Any = [conversation] if is_single else conversation
        reader = MessageReader(
            self._media(allow_urls),
            read_audio=self.use_audio and load_audio_from_video,
            has_audio=self.use_audio,
            allow_unnamed=not tokenize,
        )
        prompts = [self._parts(messages, add_generation_prompt, reader) for messages in conversations]
        if not tokenize:
            rendered = [RenderedPrompt(parts) for parts in prompts]
            return rendered[0] if is_single else rendered
        batch = self(prompts, videos=[*reader.visuals], audios=[*reader.audios], **kwargs)
        return batch if return_dict else batch["input_ids"]

    def _parts(self, messages: Messages, add_generation_prompt: bool, reader: MessageReader) -> list[PromptPart]:
        conversation = conv_templates[self.conv_template].copy()
        reader.fill(conversation, messages)
        if add_generation_prompt:
            conversation.append_message(conversation.roles[1], None)
        return conversation.get_parts(self.tokenizer)

    def _media(self, allow_urls: bool) -> MediaProcessor:
        if not allow_urls:
            return self.media_processor
        return replace(self.media_processor, allow_urls=True)

    def _batch(
        self,
        prompts: Sequence[Sequence[PromptPart]],
        visuals: list[Tensor],
        audios: list[Tensor],
        padding: bool | str,
        padding_side: Literal["left", "right"],
    ) -> BatchFeature:
        check_positions(prompts, "image", len(visuals), "videos and images")
        check_positions(prompts, "audio", len(audios), "audio items")
        lengths = self.placeholder_lengths
        encoded = [encode_parts(prompt, self.tokenizer, self.placeholder_ids, lengths) for prompt in prompts]
        ids = [prompt.input_ids for prompt in encoded]
        if not padding and len({len(prompt) for prompt in ids}) > 1:
            raise ValueError("prompts of unequal length cannot form a batch; pass padding=True")
        batch: dict[str, Tensor | None] = {}
        batch["input_ids"], batch["attention_mask"] = pad_ids(ids, self.tokenizer.pad_token_id, padding_side)
        if visuals:
            batch["pixel_values"], batch["frame_mask"] = pad_items(visuals)
        if audios:
            batch["audio_values"], batch["segment_mask"] = pad_items(audios)
        return BatchFeature({name: tensor for name, tensor in batch.items() if tensor is not None})


def _as_list(items: Any) -> list[Any]:
    if items is None:
        return []
    return list(items) if isinstance(items, list) else [items]


def _order_visuals(
    media: MediaProcessor, prompts: Sequence[Sequence[PromptPart]], videos: list[Any], images: list[Any]
) -> list[Tensor]:
    """Return the frames of all videos and images in the order of their positions in the prompts."""
    # One list alone is in the order of the positions already, so no tags are needed.
    if not videos or not images:
        return [_read_frames(media, item, is_image=bool(images)) for item in videos or images]
    ordered = []
    given = {"video": videos, "image": images}
    # The tag before each position says from which list the next item comes.
    for kind in find_visual_kinds(prompts):
        if given[kind]:
            ordered.append(_read_frames(media, given[kind].pop(0), is_image=kind == "image"))
    if videos or images:
        raise ValueError(f"{len(videos)} video(s) and {len(images)} image(s) have no place in the text")
    return ordered


def _read_frames(media: MediaProcessor, item: Any, is_image: bool) -> Tensor:
    # Other tensors are pixels of uint8.
    if isinstance(item, Tensor) and item.is_floating_point():
        return item
    if isinstance(item, VideoFrames):
        return item.pixel_values
    if is_image:
        return media.process_image(item).pixel_values
    return media.process_video(item, audio=False)[0].pixel_values


def _read_audio(media: MediaProcessor, item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return as_segments(item)
    if not isinstance(item, AudioSegments):
        item = media.process_audio(item)
    return media.adapt_audio(item).values
