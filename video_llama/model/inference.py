"""The loaded model with its processor: ask it about media, get text."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.generation import StoppingCriteriaList

from video_llama.conversation import Conversation, conv_templates, introduce_media
from video_llama.errors import VideoLlamaError
from video_llama.model.generation import GenerationOptions, PrefixCache, TextStream, cut_at_stop, stream_text
from video_llama.model.media_cache import MediaCache
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.clips import ClipReader
from video_llama.processor.media import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import encode_prompt
from video_llama.utils.utils import to_device

__all__ = ["EncodedMedia", "Prompt", "VideoLlama"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EncodedMedia:
    """One media item as the language model sees it.

    Args:
        kind: "image" for frames (a video or a still image), "audio" for sound.
        features: (tokens, language_width).
    """

    kind: Literal["image", "audio"]
    features: Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be continued.

    Args:
        keys: what stands at each position: a token id, or a media item and which of its tokens.
        inputs_embeds: (1, length, language_width).
        stop_strings: texts that end the answer.
    """

    keys: list[Hashable]
    inputs_embeds: Tensor
    stop_strings: list[str]


class VideoLlama:
    """A thin wrapper that holds a Video-LLaMA and its processor.

    Args:
        model: the transformers model; it is put in evaluation mode.
        processor: its processor, which knows the conversation template the weights were trained with.
    """

    def __init__(self, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.media_cache = MediaCache()

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def has_audio(self) -> bool:
        """Whether the model can hear."""
        return self.model.audio_branch is not None

    @property
    def max_length(self) -> int:
        """Positions the language model was trained for; prompt and answer together should not exceed them."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def new_conversation(self) -> Conversation:
        """An empty conversation in the template that belongs to the weights."""
        return conv_templates[self.processor.conv_template].copy()

    @torch.inference_mode()
    def encode(self, media: VideoFrames | AudioSegments | Tensor) -> EncodedMedia:
        """Run one media item through its branch; do it once and ask as often as you like.

        A model from `load_pretrained_model` keeps the features of the last items, found by what the items contain:
        whoever shows the same file again need not wait (`media_cache`).

        Args:
            media: what `process_video`, `process_images` or `process_audio` return, or a tensor:
                (frames, 3, height, width) for frames, (segments, 1, mel_bins, mel_frames) for sound. Frames of
                another size than the model's (`load_processor()` knows no model) are resized.

        Raises:
            ValueError: a sound, and the model was built without its audio branch.
        """
        values = self.prepare_values(media)
        kind: Literal["image", "audio"] = "audio" if values.shape[-3] == 1 else "image"
        encode = self.model.get_audio_features if kind == "audio" else self.model.get_video_features
        branch = self.model.audio_branch if kind == "audio" else self.model.video_branch
        features = self.media_cache.get(values, branch, lambda: encode(to_device(values[None], self.device))[0])
        return EncodedMedia(kind, features)

    def prepare_values(self, media: VideoFrames | AudioSegments | Tensor) -> Tensor:
        """The tensor that a branch takes of an item: frames in the model's size, or segments with one channel.

        Raises:
            ValueError: segments of another size than the model's, which cannot be brought to it.
        """
        if isinstance(media, AudioSegments):
            values = media.values
        else:
            values = media.pixel_values if isinstance(media, VideoFrames) else media
        if values.shape[-3] != 1:
            return self._fit(values)
        if self.has_audio and tuple(values.shape[-2:]) != (wanted := tuple(self.model.config.audio_config.input_size)):
            raise ValueError(
                f"this model hears segments of {wanted} mel bins and frames, not {tuple(values.shape[-2:])}: "
                "read the sound with its own processor (model.processor.media_processor)"
            )
        return values

    def caption(
        self,
        clips: Iterable[Any],
        prompt: str | None = None,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        num_frames: int | None = None,
        audio: bool = True,
        on_error: Callable[[int, VideoLlamaError], object] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer one question about each of many clips; greedy, the same text as one clip at a time.

        Args:
            clips: files (videos, images, sounds), arrays (frames, height, width, 3) of uint8, images, tensors as
                the model takes them, `VideoFrames`, `AudioSegments`, or pairs of what is seen and what is heard.
            prompt: the question; by default, to describe the clip.
            batch_size: clips that are answered together; more need more memory.
            num_workers: processes that decode ahead; 0 decodes in this one.
            num_frames: to look at in each video; by default as many as the model was trained with.
            audio: listen to videos, if the model can hear.
            on_error: called with the number of a clip that cannot be read and the error; its caption is "".
            options: fields of `GenerationOptions`.

        Returns:
            the captions, in the order of the clips.

        Raises:
            MediaError: a clip cannot be read, and there is no `on_error`.
            TypeError: `clips` is a single path.
        """
        if isinstance(clips, (str, os.PathLike)):
            raise TypeError(f"clips is one path ({os.fspath(clips)}): give a list, [path]")
        # That module drives this class.
        from video_llama.model.captioning import DEFAULT_PROMPT, BatchCaptioner, caption_clips

        reader = ClipReader(self.processor.media_processor, audio and self.has_audio, num_frames)
        captioner = BatchCaptioner(self, prompt or DEFAULT_PROMPT, GenerationOptions(**options), batch_size)
        texts: dict[int, str] = {}
        for result in caption_clips(captioner, clips, reader, num_workers):
            if result.error is not None:
                if on_error is None:
                    raise result.error
                on_error(result.key, result.error)
            texts[result.key] = result.text or ""
        return [texts[key] for key in sorted(texts)]

    def generate(
        self,
        imgs: VideoFrames | Tensor | Sequence[VideoFrames] | None = None,
        audio: AudioSegments | Tensor | None = None,
        conv: Conversation | None = None,
        **options: Any,
    ) -> str:
        """Answer the last question of a conversation about a video, images or a sound.

        Args:
            imgs: a video or an image as `process_video` / `process_images` return it, several images, or None.
            audio: the sound that goes with it, or a sound alone, or None.
            conv: the conversation. A last assistant message stands for the answer to come and is not read. The
                media are introduced in the first user message, unless the messages hold placeholders already.
                Of a conversation longer than the model's context the oldest turns are not read, which is logged.
            options: fields of `GenerationOptions`, e.g. `temperature=0.2`, `max_new_tokens=64`.

        Returns:
            the answer, without template text around it.

        Raises:
            VideoLlamaError: even without earlier turns the question is too long for the model's context.
        """
        frames = [] if imgs is None else [imgs] if isinstance(imgs, (VideoFrames, Tensor)) else list(imgs)
        items = [*frames] if audio is None else [audio, *frames]
        conversation = (conv or self.new_conversation()).up_to_answer()
        if not conversation.has_media():
            conversation.introduce(introduce_media(frames, audio))
        chosen = GenerationOptions(**options)
        encoded = [self.encode(item) for item in items]
        return self.complete(self._fitting_prompt(conversation, encoded, chosen), chosen)

    @torch.inference_mode()
    def prepare(self, conversation: Conversation, media: Sequence[EncodedMedia]) -> Prompt:
        """Tokenise a conversation that ends with a question and splice the media in.

        Args:
            conversation: its placeholders, in order of appearance, are the media of their kind.
            media: encoded items; the order between kinds is free.

        Raises:
            ValueError: the conversation's placeholders do not fit the media.
        """
        pieces = conversation.get_pieces(self.processor.tokenizer)
        ids = encode_prompt(
            pieces,
            self.processor.tokenizer,
            self.processor.placeholder_ids,
            self.processor.placeholder_lengths,
        )
        of_kind = {kind: [item for item in media if item.kind == kind] for kind in ("image", "audio")}
        features = {kind: torch.stack([item.features for item in items]) for kind, items in of_kind.items() if items}
        input_ids = torch.tensor([ids], device=self.device)
        embeds = self.model.get_inputs_embeds(input_ids, features.get("image"), features.get("audio"))
        return Prompt(self._keys(ids, of_kind), embeds, conversation.stop_strings)

    def complete(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None = None) -> str:
        """The answer to a prompt.

        Args:
            prompt: from `prepare`.
            options: how to draw it.
            cache: reuses and extends what an earlier prompt computed; see `GenerationOptions.reuses_states`.
        """
        ids = self._run(prompt, options, cache)
        return cut_at_stop(self.processor.tokenizer.decode(ids, skip_special_tokens=True), prompt.stop_strings)

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cache: PrefixCache | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Like `complete`, in pieces as they are generated; closing the iterator stops the generation.

        Beam search knows its answer only at the end and yields it whole.

        Args:
            prompt, options, cache: as for `complete`.
            stop: set from another thread, it ends the answer after the current token, with beams as well.
        """
        tokenizer = self.processor.tokenizer
        stream = TextStream(tokenizer, prompt.stop_strings)

        def run(stopping: StoppingCriteriaList) -> None:
            if options.num_beams == 1:
                self._run(prompt, options, cache, streamer=stream, stopping_criteria=stopping)
                return
            ids = self._run(prompt, options, cache, stopping_criteria=stopping)
            stream.pieces.put(cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), prompt.stop_strings))

        yield from stream_text(stream, run, stop)

    def too_long(self, prompt: Prompt, options: GenerationOptions) -> VideoLlamaError | None:
        """What to tell the user if prompt and answer together exceed the model's context; None if they fit."""
        length, room = len(prompt.keys), max(0, self.max_length - options.max_new_tokens)
        if length <= room:
            return None
        return VideoLlamaError(
            f"the question with its media takes {length} tokens, but {room} fit beside an answer of "
            f"{options.max_new_tokens}; ask a shorter question, upload less, or lower max_new_tokens"
        )

    def _fitting_prompt(
        self, conversation: Conversation, media: Sequence[EncodedMedia], options: GenerationOptions
    ) -> Prompt:
        """The prompt without as many of the oldest turns' words as would make it too long."""
        dropped = 0
        while error := self.too_long(prompt := self.prepare(conversation, media), options):
            if not conversation.drop_oldest_turn():
                raise error
            dropped += 1
        if dropped:
            logger.warning("the conversation is too long: its first %d turn(s) are not read", dropped)
        return prompt

    def _fit(self, pixel_values: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        if pixel_values.shape[-2:] == (size, size):
            return pixel_values
        return interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)

    @torch.inference_mode()
    def _run(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None, **extra: Any) -> list[int]:
        """Ids of the answer, the tokens of a stop string included."""
        kwargs = {**options.to_generate_kwargs(), **extra}
        tokenizer = self.processor.tokenizer
        if prompt.stop_strings:
            kwargs |= {"stop_strings": prompt.stop_strings, "tokenizer": tokenizer}
        if cache is not None and options.reuses_states:
            kwargs["past_key_values"] = states = cache.take(prompt.keys)
        output = self.model.generate(inputs_embeds=prompt.inputs_embeds, pad_token_id=tokenizer.pad_token_id, **kwargs)
        ids = output[0].tolist()
        if cache is not None and options.reuses_states:
            cache.put([*prompt.keys, *ids], states)
        return ids

    def _keys(self, ids: list[int], of_kind: dict[str, list[EncodedMedia]]) -> list[Hashable]:
        keys: list[Hashable] = list(ids)
        for kind, items in of_kind.items():
            tokens = ((item, number) for item in items for number in range(len(item.features)))
            positions = (i for i, token in enumerate(ids) if token == self.processor.placeholder_ids[kind])
            for position, token_of_item in zip(positions, tokens, strict=True):
                keys[position] = token_of_item
        return keys
