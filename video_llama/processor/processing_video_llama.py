"""The transformers processor: text and media files to model inputs, ids to text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData

from video_llama.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER
from video_llama.conversation import conv_templates
from video_llama.errors import CheckpointError, ConfigError, MessagesError
from video_llama.media.image import ImageInput
from video_llama.processor.batch import BatchOptions, convert_batch, make_batch, text_types
from video_llama.processor.jinja import write_jinja
from video_llama.processor.media_parts import PARTS, MediaPart, PartSettings, change_settings, join_parts
from video_llama.processor.media_processor import AudioInput, MediaProcessor, VideoFrames
from video_llama.processor.messages import MessageReader, Messages
from video_llama.processor.prompt import (
    Prompt,
    RenderedPrompt,
    begins_with_bos,
    check_positions,
    encode_parts,
    find_visual_kinds,
    parse_prompts,
)
from video_llama.processor.request import MediaRequest, as_list, flat_list, split_keywords, videos_of_prompts
from video_llama.prompt_parts import PromptPart, Text
from video_llama.utils.remote_code import auto_map, write_remote_code

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
        media_processor: how files are read; its settings, as a mapping, serve as well (folders of before had it so).
        num_video_query_tokens: ids that one video or image takes.
        num_audio_query_tokens: ids that one audio item takes.
        use_audio: the model has an audio branch; without it audio items are errors.
        conv_template: name of the conversation template that the weights were trained with.
        chat_template: not used; transformers passes what it finds in `chat_template.jinja`, that of `conv_template`.
        image_processor, video_processor, feature_extractor: the settings of `media_processor` in parts, of which each
            reads one modality alone; those that are not given are made of it. Saved settings serve as well.
        padding_side: of the tokenizer from here on: where prompts of a batch are padded.

    Raises:
        ConfigError: an unknown template, a placeholder id that the tokenizer can produce, or contradicting parts.

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
        image_processor: PartSettings | None = None,
        video_processor: PartSettings | None = None,
        feature_extractor: PartSettings | None = None,
        padding_side: str = "left",
    ) -> None:
        if conv_template not in conv_templates:
            known = ", ".join(sorted(conv_templates))
            raise ConfigError(f"unknown conversation template {conv_template!r}. Known: {known}")
        if min(image_token_id, audio_token_id) < len(tokenizer) or image_token_id == audio_token_id:
            raise ConfigError(
                f"image_token_id ({image_token_id}) and audio_token_id ({audio_token_id}) must differ and "
                f"be above the {len(tokenizer)} ids of the tokenizer, or text could pass for media"
            )
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        if not isinstance(media_processor, MediaProcessor):
            # The setting is the user's: a checkpoint that somebody else wrote must not make it.
            saved = {name: value for name, value in (media_processor or {}).items() if name != "allow_urls"}
            media_processor = MediaProcessor(**saved)
        given = zip(PARTS, (image_processor, video_processor, feature_extractor), strict=True)
        self.media_processor = join_parts(media_processor, dict(given))
        super().__init__(tokenizer, chat_template=None, **{name: getattr(self, name) for name in PARTS})
        # Prompts to be answered end where the answer begins, whatever the tokenizer of a language model says.
        tokenizer.padding_side = padding_side
        self.num_video_query_tokens = num_video_query_tokens
        self.num_audio_query_tokens = num_audio_query_tokens
        self.use_audio = use_audio
        self.conv_template = conv_template
        bos = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
        # For other programs: this class writes prompts by parts, which keep typed text apart.
        self.chat_template = write_jinja(conv_templates[conv_template], bos) or tokenizer.chat_template
        self.auto_map = auto_map("AutoProcessor")

    image_processor = MediaPart()
    video_processor = MediaPart()
    feature_extractor = MediaPart()
    # A video and an image are the same to the model: frames.
    image_token = video_token = IMAGE_PLACEHOLDER
    audio_token = AUDIO_PLACEHOLDER

    @property
    def video_token_id(self) -> int:
        """Return the id that marks the features of a video: that of images."""
        return self.image_token_id

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
        saved = {name: value for name, value in super().to_dict().items() if name != "media_processor"}
        return {**saved, **{name: getattr(self, name).to_dict() for name in PARTS}}

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Return the tokenizer alone: other parts are settings in `processor_dict`, and not in folders of before."""
        return [AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the processor from the tokenizer and saved settings; keywords, also those of parts, replace them.

        Raises:
            CheckpointError: there are none, as in a folder that a pipeline saved.
        """
        if "image_token_id" not in {**processor_dict, **kwargs}:
            raise CheckpointError(
                "the folder has no processor_config.json, or another model's: write one with save_pretrained of the "
                "VideoLlamaProcessor"
            )
        # transformers would drop the settings of parts; a whole `media_processor` in keywords replaces them.
        names = [name for name in PARTS if name in processor_dict and "media_processor" not in kwargs]
        parts = {name: processor_dict[name] for name in names}
        processor = super().from_args_and_dict(args, processor_dict, **{**parts, **kwargs})
        processor.media_processor = change_settings(processor.media_processor, kwargs)
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Write settings and tokenizer, and the module in which `trust_remote_code=True` finds this class."""
        files = super().save_pretrained(save_directory, **kwargs)
        write_remote_code(Path(save_directory))
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Do nothing: `save_pretrained` does what transformers would do from here on, without copying the source."""

    def __call__(
        self,
        text: Prompt | Sequence[Prompt],
        videos: VideoItem | Sequence[VideoItem] | None = None,
        images: ImageItem | Sequence[ImageItem] | None = None,
        audios: AudioItem | Sequence[AudioItem] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Process prompts and their media into model inputs.

        Args:
            text: a prompt or a list of them. A prompt is what `apply_chat_template` returns, a list of
                parts, or a string in which every `<ImageHere>` and `<AudioHere>` is a media position (so a
                string must not hold text typed by users).
            videos: whatever `MediaProcessor.process_video` reads, `VideoFrames`, or floating point tensors
                (frames, 3, height, width) as the model takes them; the audio track of files is not read. A list
                holds those of all prompts, in order of appearance, or a list of videos for each prompt.
            images: whatever `process_image` reads, or as for videos; also lists of them, one for each prompt. With
                videos given too, `<Image>` or `<Video>` before a position says which it is.
            audios: whatever `process_audio` reads, `AudioSegments`, or tensors (segments, 1, bins, frames). `audio` is
                another name for it.
            kwargs: the fields of `MediaRequest` (`num_frames`, `fps`, `video_metadata`, …) and of `BatchOptions`
                (`padding`, `padding_side`, `max_length`, …); also in transformers' groups (`videos_kwargs={…}`).

        Returns:
            input_ids, attention_mask: (prompts, length), int64; lists without `return_tensors`.
            pixel_values: (items, frames, 3, height, width), with videos or images.
            audio_values: (audios, segments, 1, bins, frames), with audio.
            frame_mask, segment_mask: (items, frames), (audios, segments), bool; only where items are padded.
            video_metadata: a list, one `VideoMetadata` for each video, with `return_metadata`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: media and positions do not match, or prompts of unequal length without padding.
            MediaError: a file cannot be read.
        """
        kwargs = _ungrouped(kwargs)
        audio = kwargs.pop("audio", None)
        if audio is not None and audios is not None:
            raise TypeError("audio and audios are two names of one argument; give one")
        request, options = self._split(kwargs)
        if text is None:
            raise ValueError("give text: a prompt, or a list of them, with a position for each media item")
        prompts = parse_prompts(text)
        visuals = _order_visuals(request, prompts, videos_of_prompts(videos, prompts), flat_list(images))
        read_audios = [request.read_audio(item) for item in as_list(audios if audio is None else audio)]
        # What `apply_chat_template` wrote begins as chats do; other strings as the caller says.
        are_chats = isinstance(text, RenderedPrompt) or any(isinstance(prompt, RenderedPrompt) for prompt in text)
        return self._batch(prompts, visuals, read_audios, request, options, options.add_special_tokens or are_chats)

    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write messages with media items in the conversation template that belongs to the weights.

        Args:
            conversation: messages, or a list of conversations. Items are `{"type": "text", "text": …}` and
                `{"type": "image" | "video" | "audio", "path": …}`, as in training (docs/own_data.md); typed text stays
                text. User and assistant take turns after an optional system message; a user's in a row are one.
            chat_template: None, or the processor's own.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last answer open, to be continued.
            tokenize: True returns model inputs. False returns strings, to be passed to `__call__` with the media. Both
                read the files, since the text names the frames that were sampled; only with False an item may name no
                file, and then has no such sentence.
            return_dict: with `tokenize`, False returns the input_ids alone.
            load_audio_from_video: read the audio tracks of all videos that have one, if the model has an audio branch.
                By default a video is its frames, and an audio item of the same file right behind it adds its audio.
            processor_kwargs, kwargs: keywords of `__call__`.

        Raises:
            MessagesError: a `ValueError`: as `MessageReader.fill`.
            ConfigError: another `chat_template`, in which typed text could not be kept apart from media.
            MediaError: a file cannot be read.
        """
        if chat_template not in (None, self.chat_template):
            raise ConfigError(
                f"prompts are written in the conversation template {self.conv_template!r} of the weights, not in "
                "another chat_template; leave it out, or set conv_template"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt begins a new answer, continue_final_message goes on with one")
        # Trainers and pipelines pass these empty; no template here takes them.
        kwargs = {name: value for name, value in kwargs.items() if value or name not in ("tools", "documents")}
        request, options = self._split(_ungrouped({**(processor_kwargs or {}), **kwargs}))
        # One conversation is a list of messages (mappings); several are a list of such lists.
        is_single = not conversation or not isinstance(conversation[0], Sequence)
        conversations: Any = [conversation] if is_single else conversation
        reader = MessageReader(
            request,
            read_audio=self.use_audio and load_audio_from_video,
            has_audio=self.use_audio,
            allow_unnamed=not tokenize,
        )
        prompts = [self._parts(messages, add_generation_prompt, reader) for messages in conversations]
        if continue_final_message:
            prompts = [_open_answer(prompt, messages) for prompt, messages in zip(prompts, conversations, strict=True)]
        if not tokenize:
            request.check_used()
            rendered = [RenderedPrompt(parts) for parts in prompts]
            return rendered[0] if is_single else rendered
        audios = [request.read_audio(item) for item in reader.audios]
        batch = self._batch(prompts, reader.visuals, audios, request, options, add_bos=True)
        return batch if return_dict else batch["input_ids"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, audio_lengths: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """Return how many ids each item takes: always the same number, whatever its size. vLLM asks this."""
        numbers: dict[str, list[int]] = {}
        if image_sizes is not None:
            numbers["num_image_tokens"] = [self.num_video_query_tokens] * len(image_sizes)
            numbers["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            numbers["num_video_tokens"] = [self.num_video_query_tokens] * len(video_sizes)
        if audio_lengths is not None:
            numbers["num_audio_tokens"] = [self.num_audio_query_tokens] * len(audio_lengths)
        return MultiModalData(**numbers)

    def _split(self, kwargs: dict[str, Any]) -> tuple[MediaRequest, BatchOptions]:
        """Return the keywords of `__call__` by what they are for.

        Raises:
            TypeError: an unknown keyword.
        """
        of_media, of_batch = split_keywords(kwargs, MediaRequest, BatchOptions)
        return MediaRequest(self.media_processor, **of_media), BatchOptions(**of_batch)

    def _parts(self, messages: Messages, add_generation_prompt: bool, reader: MessageReader) -> list[PromptPart]:
        conversation = conv_templates[self.conv_template].copy()
        reader.fill(conversation, messages)
        if add_generation_prompt:
            conversation.append_message(conversation.roles[1], None)
        return conversation.get_parts(self.tokenizer)

    def _batch(
        self,
        prompts: Sequence[Sequence[PromptPart]],
        visuals: list[Any],
        audios: list[Tensor],
        request: MediaRequest,
        options: BatchOptions,
        add_bos: bool,
    ) -> BatchFeature:
        check_positions(prompts, "image", len(visuals), "videos and images")
        check_positions(prompts, "audio", len(audios), "audio items")
        request.check_used()
        ids, lengths, tokenizer = self.placeholder_ids, self.placeholder_lengths, self.tokenizer
        encoded = [encode_parts(prompt, tokenizer, ids, lengths, add_bos) for prompt in prompts]
        encoded = [options.truncate(prompt, [*ids.values()], tokenizer.truncation_side) for prompt in encoded]
        batch = make_batch(encoded, visuals, audios, tokenizer, options)
        if options.return_mm_token_type_ids:
            is_video = [_is_video(item) for item in visuals]
            batch["mm_token_type_ids"] = text_types(
                batch["input_ids"], self.image_token_id, self.audio_token_id, is_video, lengths["image"]
            )
        if request.return_metadata:
            batch["video_metadata"] = [request.metadata_of(item) for item in visuals if _is_video(item)]
        return convert_batch(batch, options)


def _ungrouped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of transformers' groups (`text_kwargs={…}`) as plain ones."""
    plain: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs"):
            plain |= value or {}
        else:
            plain[name] = value
    return plain


def _is_video(item: Any) -> bool:
    """Whether frames are a video's; a tensor of one frame is an image."""
    kind = getattr(item, "kind", None)
    return len(item) > 1 if kind is None else kind == "video"


def _open_answer(parts: list[PromptPart], messages: Messages) -> list[PromptPart]:
    """Return a prompt without what ends its last answer.

    Raises:
        MessagesError: there is no last answer, or it says nothing.
    """
    answers = [place for place, part in enumerate(parts) if isinstance(part, Text) and part.answer and not part.trusted]
    if not messages or messages[-1].get("role") != "assistant" or not answers:
        raise MessagesError("continue_final_message needs a last message of the assistant that says something")
    return parts[: answers[-1] + 1]


def _order_visuals(
    request: MediaRequest, prompts: Sequence[Sequence[PromptPart]], videos: list[Any], images: list[Any]
) -> list[Any]:
    """Return the frames of all videos and images in the order of their positions in the prompts."""
    # One list alone is in the order of the positions already, so no tags are needed.
    if not videos or not images:
        return [request.read_frames(item, is_image=bool(images)) for item in videos or images]
    ordered = []
    given = {"video": videos, "image": images}
    # The tag before each position says from which list the next item comes.
    for kind in find_visual_kinds(prompts):
        if given[kind]:
            ordered.append(request.read_frames(given[kind].pop(0), is_image=kind == "image"))
    if videos or images:
        raise ValueError(f"{len(videos)} video(s) and {len(images)} image(s) have no place in the text")
    return ordered
