"""The loaded model with its processor: ask it about media, get text."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.generation import BaseStreamer, StoppingCriteriaList

from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import VideoLlamaError
from video_llama.inference.cache import MediaCache
from video_llama.inference.generation import (
    GenerationOptions,
    PrefixCache,
    TextStream,
    check_names,
    cut_at_stop,
    stop_arguments,
    stop_test,
    stream_text,
)
from video_llama.inference.inputs import check_conversation, given_audio, given_frames
from video_llama.inference.static_decoder import Request, StaticDecoder, why_not_static
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration, find_placeholders
from video_llama.processor.clips import ClipReader
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import encode_parts
from video_llama.processor.tensor_like import as_frames, as_segments
from video_llama.processor.transforms import normalize_pixels
from video_llama.prompt_parts import media_prefix
from video_llama.utils.devices import computing_on, execution_device, resolve_device, resolve_dtype, to_device

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
        self._decoders: list[StaticDecoder] = []
        self._warned_of: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device that looks up the token embeddings."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; of those that are quantised, what they compute in."""
        return self.model.dtype

    @property
    def config(self) -> VideoLlamaConfig:
        """The model's configuration."""
        return self.model.config

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self.model.parameters(recurse)

    def state_dict(self) -> dict[str, Any]:
        """The model's weights by name."""
        return self.model.state_dict()

    def train(self, mode: bool = True) -> VideoLlama:
        """Put the model in training mode; returns this object, as everything does that changes the model."""
        self.model.train(mode)
        return self

    def eval(self) -> VideoLlama:
        """Put the model in evaluation mode, in which it is loaded."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> VideoLlama:
        """Move or convert the model; arguments as of `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        self.media_cache.clear()
        self._decoders.clear()  # their memory lies where the model lay
        return self

    def cpu(self) -> VideoLlama:
        """Move the model to the CPU's memory."""
        return self.to("cpu")

    def cuda(self, device: str | int | torch.device | None = None) -> VideoLlama:
        """Move the model to a GPU, the current one unless another is named.

        Raises:
            ConfigError: there is none.
        """
        return self.to(resolve_device("cuda" if device is None else torch.device(device)))

    def half(self) -> VideoLlama:
        """Convert the model to half precision where its device is good at that, as `load_pretrained_model` does.

        That is bfloat16, or float16 on an older GPU; on a CPU without bfloat16 nothing changes. `to(torch.float16)`
        converts in any case.
        """
        precision = resolve_dtype("auto", self.device)
        return self if precision == torch.float32 else self.to(precision)

    def float(self) -> VideoLlama:
        """Convert the model to float32."""
        return self.to(torch.float32)

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
                (frames, 3, height, width) for frames, (segments, 1, mel_bins, mel_frames) for sound. What was read for
                another model (`load_processor()` knows none) is brought to this one's form: frames are resized, and
                sound becomes the log-mel that this model's processor gives.

        Raises:
            ValueError: a sound, and the model was built without its audio branch.
            MediaError: a tensor of another form.
            OutOfMemoryError: the device has no room for it.
        """
        values = self.prepare_values(media)
        kind: Literal["image", "audio"] = "audio" if values.shape[-3] == 1 else "image"
        encode = self.model.get_audio_features if kind == "audio" else self.model.get_video_features
        branch = self.model.audio_branch if kind == "audio" else self.model.video_branch
        with computing_on(self.device):
            features = self.media_cache.get(values, branch, lambda: encode(to_device(values[None], self.device))[0])
        return EncodedMedia(kind, features)

    def prepare_values(self, media: VideoFrames | AudioSegments | Tensor) -> Tensor:
        """The tensor that a branch takes of an item: frames in the model's size, or segments in its log-mel.

        Raises:
            ValueError: a tensor of segments of another size than the model's, which cannot be brought to it.
            MediaError: a tensor of another form.
        """
        if isinstance(media, VideoFrames):
            media = media.pixel_values
            if media.dtype == torch.uint8:  # what the branch normalises itself
                return media if self._is_fit(media) else self._fit(normalize_pixels(media))
        elif isinstance(media, AudioSegments):
            media = (self.processor.media_processor.adapt_audio(media) if self.has_audio else media).values
        if media.ndim < 3 or media.shape[-3] != 1:
            return self._fit(as_frames(media))
        values = as_segments(media)
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
        batch_size: int | None = None,
        num_workers: int = 0,
        num_frames: int | None = None,
        audio: bool = True,
        on_error: Callable[[int, VideoLlamaError], object] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer one question about each of many clips.

        Greedy, in float32, the texts are those of one clip at a time. In half precision products round otherwise in
        batches of another size, so that a near tie of two tokens may fall the other way.

        Args:
            clips: files (videos, images, sounds), arrays (frames, height, width, 3) of uint8, images, tensors as
                the model takes them, `VideoFrames`, `AudioSegments`, or pairs of what is seen and what is heard.
            prompt: the question; by default, to describe the clip.
            batch_size: clips that are answered together; by default what fits the free memory of a GPU (at most
                128), and 8 on other devices. Where memory runs out all the same, half as many go on.
            num_workers: processes that decode ahead; 0 decodes in this one.
            num_frames: to look at in each video; by default as many as the model was trained with.
            audio: listen to videos, if the model can hear.
            on_error: called with the number of a clip that has no caption and the error; its caption is "".
            options: fields of `GenerationOptions`.

        Returns:
            the captions, in the order of the clips.

        Raises:
            MediaError: a clip cannot be read, and there is no `on_error`.
            OutOfMemoryError: a clip does not fit the device's memory even by itself, and there is no `on_error`.
            TypeError: `clips` is a single path.
        """
        if isinstance(clips, (str, os.PathLike)):
            raise TypeError(f"clips is one path ({os.fspath(clips)}): give a list, [path]")
        # That module drives this class.
        from video_llama.inference.captioning import DEFAULT_PROMPT, BatchCaptioner, caption_clips

        reader = ClipReader(self.processor.media_processor, audio and self.has_audio, num_frames)
        captioner = BatchCaptioner(self, prompt or DEFAULT_PROMPT, _chosen(options), batch_size)
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
        imgs: VideoFrames | Tensor | Sequence[VideoFrames | Tensor] | None = None,
        audio: AudioSegments | Tensor | None = None,
        conv: Conversation | None = None,
        *,
        keep_template: bool = False,
        max_length: int | None = None,
        min_length: int | None = None,
        use_cache: bool = True,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> str:
        """Answer the last question of a conversation about a video, images or a sound.

        Args:
            imgs: a video or an image as `process_video` / `process_images` return it, or as a tensor (frames, 3,
                height, width), also (1, frames, 3, height, width) or one frame (3, height, width); several of them as
                a list; or None.
            audio: the sound that goes with it, or a sound alone, or None.
            conv: the conversation. A last assistant message stands for the answer to come and is not read. The
                media are introduced in the first user message, unless the messages hold placeholders already.
                Of a conversation longer than the model's context the oldest turns are not read, which is logged.
                One in another template than the weights were trained with is written in theirs, which is logged once;
                a system text of your own stays.
            keep_template: write the conversation in its own template in any case.
            max_length, min_length: bounds of prompt and answer together, in tokens, as `transformers` counts them. An
                answer may be as long as `max_length` allows unless `max_new_tokens` is given, too.
            use_cache: False has no effect: earlier tokens are never computed twice, the answer would be the same.
            streamer: of `transformers`, is given the tokens as they come; not with beams. See `stream` for text.
            options: fields of `GenerationOptions`, e.g. `temperature=0.2`, `max_new_tokens=64`.

        Returns:
            the answer, without template text around it.

        Raises:
            VideoLlamaError: even without earlier turns the question is too long for the model's context.
            TypeError: an argument of another kind, such as a file that was not read, or an option that there is not.
            MediaError: a tensor of another form.
            ValueError: an option out of range, or a message with a role that is none of the conversation's.
            OutOfMemoryError: the device has no room for media, prompt and answer.
        """
        frames, sound = given_frames(imgs), given_audio(audio)
        conversation = check_conversation(conv) or self.new_conversation()
        chosen = _chosen(options, ("keep_template", "max_length", "min_length", "use_cache", "streamer"))
        if not use_cache:
            logger.warning("use_cache=False has no effect: the answer is the same, without computing tokens twice")
        if not keep_template:
            conversation = self._in_own_template(conversation)
        conversation = conversation.up_to_answer()
        if not conversation.has_media():
            conversation.introduce(media_prefix(frames, sound))
        items = [*frames] if sound is None else [sound, *frames]
        prompt = self._fitting_prompt(conversation, [self.encode(item) for item in items], chosen)
        if max_length is not None:
            max_length = min(max_length, self.max_length)
            if options.get("max_new_tokens") is None:
                chosen = replace(chosen, max_new_tokens=max_length)
        chosen = chosen.within(len(prompt.keys), max_length, min_length)
        if streamer is None:
            return self.complete(prompt, chosen)
        ids = self._run(prompt, chosen, None, streamer=streamer)
        return cut_at_stop(self.processor.tokenizer.decode(ids, skip_special_tokens=True), prompt.stop_strings)

    @torch.inference_mode()
    def prepare(self, conversation: Conversation, media: Sequence[EncodedMedia]) -> Prompt:
        """Tokenise a conversation that ends with a question and splice the media in.

        Args:
            conversation: its placeholders, in order of appearance, are the media of their kind.
            media: encoded items; the order between kinds is free.

        Raises:
            ValueError: the conversation's placeholders do not fit the media.
        """
        ids = encode_parts(
            conversation.get_parts(self.processor.tokenizer),
            self.processor.tokenizer,
            self.processor.placeholder_ids,
            self.processor.placeholder_lengths,
        ).input_ids
        of_kind = {kind: [item for item in media if item.kind == kind] for kind in ("image", "audio")}
        features = {kind: torch.stack([item.features for item in items]) for kind, items in of_kind.items() if items}
        input_ids = torch.tensor([ids])
        places = find_placeholders(input_ids, self.model.config)  # on the CPU, so that nothing waits for a GPU
        with computing_on(self.device):
            input_ids = to_device(input_ids, self.device)
            embeds = self.model.get_inputs_embeds(input_ids, features.get("image"), features.get("audio"), places)
        return Prompt(self._keys(ids, of_kind), embeds, conversation.stop_strings)

    def complete(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None = None) -> str:
        """The answer to a prompt.

        Args:
            prompt: from `prepare`.
            options: how to draw it.
            cache: reuses and extends what an earlier prompt computed; see `GenerationOptions.reuses_states`.

        Raises:
            OutOfMemoryError: the device has no room for prompt and answer.
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

    def _in_own_template(self, conversation: Conversation) -> Conversation:
        """The conversation as the weights know conversations; once for each other template that is logged."""
        own = self.new_conversation()
        if conversation.is_written_as(own):
            return conversation
        other = f"{conversation.sep_style.name}, {'/'.join(conversation.roles)}, system {conversation.system[:40]!r}"
        if other not in self._warned_of:
            self._warned_of.add(other)
            logger.warning(
                "the conversation is in another template (%s) than these weights were trained with (%r): it is written "
                "in theirs. model.new_conversation() begins one in it; keep_template=True keeps another",
                other,
                self.processor.conv_template,
            )
        return conversation.in_template(own)

    def _is_fit(self, pixel_values: Tensor) -> bool:
        size = self.model.config.vision_config.image_size
        return pixel_values.shape[-2:] == (size, size)

    def _fit(self, pixel_values: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        if self._is_fit(pixel_values):
            return pixel_values
        return interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)

    @torch.inference_mode()
    def _run(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None, **extra: Any) -> list[int]:
        """Ids of the answer, the tokens of a stop string included."""
        if self.decodes_statically(options):
            return self._run_statically(prompt, options, cache, **extra)
        kwargs = {**options.to_generate_kwargs(), **extra}
        tokenizer = self.processor.tokenizer
        kwargs |= stop_arguments(prompt.stop_strings, tokenizer)
        if cache is not None and options.reuses_states:
            kwargs["past_key_values"] = states = cache.take(prompt.keys)
        kwargs |= {"inputs_embeds": prompt.inputs_embeds, "pad_token_id": tokenizer.pad_token_id}
        with computing_on(self.device):
            ids = self.model.generate(**kwargs)[0].tolist()
        if cache is not None and options.reuses_states:
            cache.put([*prompt.keys, *ids], states)
        return ids

    def _run_statically(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cache: PrefixCache | None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> list[int]:
        """As `_run`."""
        if streamer is not None:
            streamer.put(torch.empty(1, 0, dtype=torch.long))  # of transformers; takes what comes first for the prompt
        states = None if cache is None else cache.take(prompt.keys)
        has_stopped = stop_test(prompt.stop_strings, self.processor.tokenizer)

        def has_ended(ids: list[int]) -> bool:
            if streamer is not None:
                streamer.put(torch.tensor(ids[-1:]))
            wanted = stopping_criteria is None or not stopping_criteria(torch.tensor([ids]), None).any()
            return not wanted or has_stopped(ids)

        request = Request(prompt.inputs_embeds, states=states, keeps_states=cache is not None, has_ended=has_ended)
        with self.borrow_decoder(1, request.length, options) as decoder:
            for _ in decoder.run([request], options):
                pass
        if streamer is not None:
            streamer.end()
        if cache is not None and states is not None:
            cache.put([*prompt.keys, *request.ids], states)
        return request.ids

    def decodes_statically(self, options: GenerationOptions) -> bool:
        """Whether answers with these options come from a `StaticDecoder`."""
        wanted = self.device.type == "cuda" if options.static_cache is None else options.static_cache
        if not wanted or options.num_beams > 1:
            return False
        reason = why_not_static(self.model.language_model)
        if reason and options.static_cache and reason not in self._warned_of:
            self._warned_of.add(reason)
            logger.warning("static_cache has no effect on this language model: %s", reason)
        return not reason

    @contextlib.contextmanager
    def borrow_decoder(self, num_rows: int, longest_prompt: int, options: GenerationOptions) -> Iterator[StaticDecoder]:
        """A decoder that nobody else uses meanwhile, with room for prompts of this length and their answers.

        The last one given back is kept, as building it takes memory and time.
        """
        length = longest_prompt + options.max_new_tokens
        weights = [parameter.data_ptr() for parameter in self.model.language_model.parameters()]
        given_back, self._decoders = self._decoders, []
        kept = given_back.pop() if given_back else None
        if kept is not None and not kept.fits(num_rows, length, options.compile, weights):
            kept = None  # its memory may be needed for the other one
        with computing_on(self.device):
            decoder = kept or StaticDecoder(self.model.language_model, num_rows, length, options.compile)
            try:
                yield decoder
            except BaseException:
                decoder.free()  # the error's traceback holds the decoder as long as anybody holds the error
                raise
        self._decoders = [decoder]  # not after an error, which may have left it in any state

    def _keys(self, ids: list[int], of_kind: dict[str, list[EncodedMedia]]) -> list[Hashable]:
        keys: list[Hashable] = list(ids)
        for kind, items in of_kind.items():
            tokens = ((item, number) for item in items for number in range(len(item.features)))
            positions = (i for i, token in enumerate(ids) if token == self.processor.placeholder_ids[kind])
            for position, token_of_item in zip(positions, tokens, strict=True):
                keys[position] = token_of_item
        return keys


def _chosen(options: Mapping[str, Any], others: Sequence[str] = ()) -> GenerationOptions:
    """Options as a caller names them, with a word on those that have no effect.

    Args:
        options: fields of `GenerationOptions`.
        others: further names, to be told to whoever gives a wrong one.

    Raises:
        TypeError: a name that is no option.
        ValueError: a value out of range.
    """
    check_names(options, [*GenerationOptions.names(), *others])
    chosen = GenerationOptions().changed(options)
    unused = [name for name in ("top_p", "top_k") if options.get(name) is not None]
    if unused and chosen.temperature == 0:
        named = " and ".join(unused)
        logger.warning("no effect of %s: nothing is sampled without a temperature or do_sample=True", named)
    return chosen
