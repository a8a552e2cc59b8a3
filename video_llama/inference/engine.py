"""The loaded model with its processor: ask it about media, get text."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteriaList

from video_llama.conversation import Conversation
from video_llama.errors import VideoLlamaError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.captioning import DEFAULT_PROMPT, BatchCaptioner, caption_clips
from video_llama.inference.completion import answer_text, generate_one
from video_llama.inference.generation import GenerationOptions, TextStream, stream_text
from video_llama.inference.loaded_model import EncodedMedia, LoadedModel, Prompt
from video_llama.processor.clips import ClipReader
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.tensor_like import as_frames, as_segments
from video_llama.prompt_parts import media_prefix

__all__ = ["EncodedMedia", "Prompt", "VideoLlama"]

logger = logging.getLogger(__name__)


class VideoLlama(LoadedModel):
    """A Video-LLaMA with its processor, ready to answer; `load_pretrained_model` returns it.

    It also has the methods of a module that scripts use: `to`, `half`, `float`, `cpu`, `cuda`, `train`, `eval`,
    `parameters`, `requires_grad_` and `state_dict`.

    Example:
        >>> model = load_pretrained_model("video-llama-tiny")
        >>> imgs, audio = process_video("clip.mp4", model.processor.media_processor)
        >>> conv = model.new_conversation()
        >>> conv.ask("What is happening?")
        >>> answer = model.generate(imgs, audio, conv, temperature=0.2)

    Args:
        model: the transformers model; it is put in evaluation mode.
        processor: its processor, which knows the conversation template the weights were trained with.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the language model."""
        return self.processor.tokenizer

    @property
    def generation_config(self) -> GenerationConfig:
        """Return the settings of transformers' own `generate`."""
        return self.model.generation_config

    def requires_grad_(self, requires_grad: bool = True) -> VideoLlama:
        """Freeze or unfreeze all weights, and return this object."""
        self.model.requires_grad_(requires_grad)
        return self

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

        Greedy, in float32, the texts are those of one clip at a time. In half precision products of batches of
        another size round otherwise, so that a near tie of two tokens may fall the other way.

        Args:
            clips: whatever stands for a file (video, image, audio), arrays (frames, height, width, 3), images, samples
                with their rate, floating point tensors as the model takes them, `VideoFrames`, `AudioSegments`, or
                pairs of frames and audio.
            prompt: the question; by default, to describe the clip.
            batch_size: clips that are answered together; by default what fits the free memory of a GPU (at most
                128), and 8 on other devices. Where memory runs out all the same, half as many are tried.
            num_workers: processes that decode ahead; 0 decodes in this one.
            num_frames: frames to sample from each video; by default as many as the model was trained with.
            audio: use the audio tracks of videos, if the model has an audio branch.
            on_error: called with the number of a clip that has no caption and the error; its caption is "".
            options: fields of `GenerationOptions`.

        Returns:
            the captions, in the order of the clips.

        Raises:
            MediaError: a clip cannot be read, and there is no `on_error`.
            OutOfMemoryError: a clip alone does not fit the device's memory, and there is no `on_error`.
            TypeError: `clips` is a single path.
        """
        if isinstance(clips, (str, os.PathLike)):
            raise TypeError(f"clips is one path ({os.fspath(clips)}): give a list, [path]")
        reader = ClipReader(self.processor.media_processor, audio and self.has_audio, num_frames)
        chosen = GenerationOptions.from_call(options)
        captioner = BatchCaptioner(self, prompt or DEFAULT_PROMPT, chosen, batch_size)
        # Captions come in the order in which they are done.
        texts: dict[int, str] = {}
        for result in caption_clips(captioner, clips, reader, num_workers):
            if result.error is not None:
                if on_error is None:
                    raise result.error
                on_error(result.key, result.error)
            texts[result.key] = result.text or ""
        return [texts[key] for key in sorted(texts)]

    def __call__(self, clip: Any, question: str, **options: Any) -> str:
        """Answer one question about one file; arguments and errors as of `caption`, without a list.

        Example:
            >>> model("clip.mp4", "What happens?", max_new_tokens=64)
        """
        [text] = self.caption([clip], question, **options)
        return text

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
        """Answer the last question of a conversation about a video, images or audio.

        Args:
            imgs: a video or an image as `process_video` / `process_images` return it, or a tensor (frames, 3, height,
                width), (1, frames, 3, height, width) or (3, height, width); several of them as a list; or None.
            audio: the audio track of the first video, or audio alone; a tensor is (segments, 1, mel_bins, mel_frames).
            conv: the conversation; a last assistant message is ignored. The media are introduced in the first user
                message, unless the messages hold placeholders already. Of a conversation that is too long for the
                model the oldest turns are left out, which is logged. One in another template than that of the weights
                is converted to it, which is logged once; a system text of your own stays.
            keep_template: use the conversation's own template in any case.
            max_length, min_length: bounds of prompt and answer together, in tokens, as in `transformers`. An answer
                may be as long as `max_length` allows unless `max_new_tokens` is given, too.
            use_cache: False has no effect, and is logged: the answer would be the same.
            streamer: of `transformers`; gets the tokens as they come, not with beam search. See `stream` for text.
            options: fields of `GenerationOptions`, e.g. `temperature=0.2`, `max_new_tokens=64`.

        Returns:
            the answer, without template text around it.

        Raises:
            VideoLlamaError: even without earlier turns the question is too long for the model's context.
            TypeError: an argument of another type, such as a path, or an unknown option.
            MediaError: a tensor of another shape.
            ValueError: an option out of range, or a message with a role that is none of the conversation's.
            OutOfMemoryError: the device has no room for media, prompt and answer.
        """
        # What was given, in one form; whatever is wrong with it is an error before anything is computed.
        frames, segments = _check_frames(imgs), _check_audio(audio)
        conversation = _check_conversation(conv) or self.new_conversation()
        names = ("keep_template", "max_length", "min_length", "use_cache", "streamer")
        chosen = GenerationOptions.from_call(options, names)
        if not use_cache:
            logger.warning("use_cache=False has no effect: the answer is the same, without computing tokens twice")
        # The conversation that is answered is a copy: that of the caller stays as it is.
        if not keep_template:
            conversation = self.in_own_template(conversation)
        conversation = conversation.up_to_answer()
        if not conversation.has_media():
            conversation.introduce(media_prefix(frames, segments))
        # The bounds can be applied only now, as they count the prompt with its media.
        items = [*frames] if segments is None else [segments, *frames]
        prompt, num_dropped = self.prepare_fitting(conversation, [self.encode(item) for item in items], chosen)
        if num_dropped:
            logger.warning("the conversation is too long: its first %d turn(s) are left out", num_dropped)
        if max_length is not None:
            max_length = min(max_length, self.max_length)
            # Without `max_new_tokens` its default must not be the tighter bound; `within` takes the prompt off.
            if options.get("max_new_tokens") is None:
                chosen = replace(chosen, max_new_tokens=max_length)
        chosen = chosen.within(len(prompt.keys), max_length, min_length)
        return answer_text(self, self._run(prompt, chosen, None, streamer=streamer), prompt.stop_strings)

    def complete(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None = None) -> str:
        """Return the answer to a prompt.

        Args:
            prompt: from `prepare`.
            options: how it is generated.
            cache: reuses and extends what an earlier prompt computed; not used with beam search.
        """
        return answer_text(self, self._run(prompt, options, cache), prompt.stop_strings)

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cache: PrefixCache | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Yield the answer in pieces as it is generated; beam search yields it whole at the end.

        Closing the iterator ends the generation after the current token, and so does `stop` from another thread.
        """
        stream = TextStream(self.processor.tokenizer, prompt.stop_strings)

        def run(stopping: StoppingCriteriaList) -> None:
            # Tokens of a beam may still be given up, so transformers streams none.
            if options.num_beams == 1:
                self._run(prompt, options, cache, streamer=stream, stopping_criteria=stopping)
                return
            ids = self._run(prompt, options, cache, stopping_criteria=stopping)
            stream.pieces.put(answer_text(self, ids, prompt.stop_strings))

        yield from stream_text(stream, run, stop)

    def in_own_template(self, conversation: Conversation) -> Conversation:
        """Return the conversation in the template of the weights; log each other template once."""
        own = self.new_conversation()
        if conversation.is_written_as(own):
            return conversation
        other = f"{conversation.sep_style.name}, {'/'.join(conversation.roles)}, system {conversation.system[:40]!r}"
        if other not in self._logged:
            self._logged.add(other)
            logger.warning(
                "the conversation is in another template (%s) than these weights were trained with (%r) and is "
                "converted to theirs. model.new_conversation() begins one in it; keep_template=True keeps another",
                other,
                self.processor.conv_template,
            )
        return conversation.in_template(own)

    def _run(self, prompt: Prompt, options: GenerationOptions, cache: PrefixCache | None, **others: Any) -> list[int]:
        """Return the ids of an answer; the page's model overrides this to let threads wait for each other."""
        return generate_one(self, prompt, options, cache, **others)


def _check_frames(imgs: Any) -> list[VideoFrames | Tensor]:
    """Return videos and images as a list, tensors among them as (frames, 3, height, width).

    Args:
        imgs: one video or image, a list of them, or None.

    Raises:
        TypeError: something else, such as a path, or a list of single frames (one video or several images?).
        MediaError: a tensor of another shape.
    """
    if imgs is None:
        return []
    items = list(imgs) if isinstance(imgs, (list, tuple)) else [imgs]
    for item in items:
        if isinstance(item, AudioSegments):
            raise TypeError("imgs is audio: pass it as audio")
        if not isinstance(item, (VideoFrames, Tensor)):
            raise TypeError(
                f"imgs is {_describe(item)}, not what process_video or process_images return: read it first, "
                "imgs, audio = process_video(path, model.processor.media_processor)"
            )
    # A list of single frames could be one video or several images, so the caller has to say which.
    if len(items) > 1 and all(isinstance(item, Tensor) and item.ndim == 3 for item in items):
        raise TypeError(
            f"imgs is {len(items)} tensors of one frame each: torch.stack(imgs) is a video of them, "
            "[img[None] for img in imgs] are separate images"
        )
    return [as_frames(item) if isinstance(item, Tensor) else item for item in items]


def _check_audio(audio: Any) -> AudioSegments | Tensor | None:
    """Return the audio; a tensor as (segments, 1, mel_bins, mel_frames).

    Raises:
        TypeError: something else, such as a path.
        MediaError: a tensor of another shape.
    """
    if isinstance(audio, VideoFrames):
        raise TypeError("audio is frames: pass them as imgs")
    if isinstance(audio, Tensor):
        return as_segments(audio)
    if audio is None or isinstance(audio, AudioSegments):
        return audio
    raise TypeError(
        f"audio is {_describe(audio)}, not what process_video or process_audio return: read it first, "
        "audio = process_audio(path, model.processor.media_processor)"
    )


def _check_conversation(conv: Any) -> Conversation | None:
    """Return the conversation.

    Raises:
        TypeError: something else, such as a question.
    """
    if conv is None or isinstance(conv, Conversation):
        return conv
    raise TypeError(
        f"conv is {_describe(conv)}, not a conversation: conv = model.new_conversation(); conv.ask('What is this?')"
    )


def _describe(value: Any) -> str:
    """Return the type of a value, with the value itself if it is a short text or path."""
    name = type(value).__name__
    if isinstance(value, (str, os.PathLike)) and len(str(value)) <= 200:
        return f"{name} {str(value)!r}"
    return name
