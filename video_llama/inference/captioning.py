"""Caption many clips in one pass: decoded ahead, encoded together, answered in batches of like length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import NamedTuple, TypeVar

from video_llama.checkpoints.fitting import batch_that_fits
from video_llama.conversation import Conversation, media_prefix
from video_llama.errors import OutOfMemoryError, VideoLlamaError
from video_llama.inference.cache import SharedPrefix
from video_llama.inference.completion import generate_text, stream_texts
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.inputs import Prompt
from video_llama.inference.loaded_model import LoadedModel
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.processor.clips import ClipReader, ClipSource, Window
from video_llama.processor.media_processor import VideoFrames

__all__ = ["DEFAULT_PROMPT", "BatchCaptioner", "WindowCaption", "caption_clips"]

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Please describe this in detail."

# More tokens than a question about a clip takes, media included.
_PROMPT_TOKENS = 256
# So many batches of prompts wait for others of their length before they are padded.
_WAITING_BATCHES = 4


@dataclass(frozen=True)
class WindowCaption:
    """The result for one window of one clip.

    Args:
        key: of the clip.
        number: of the window.
        num_windows: that the clip has.
        text: the caption; None if there is an error.
        error: why there is no caption.
        sound: one phrase about the audio.
        start_seconds, end_seconds: which part of the file; None for a whole one.
    """

    key: int
    number: int
    num_windows: int
    text: str | None
    error: VideoLlamaError | None = None
    sound: str = ""
    start_seconds: float | None = None
    end_seconds: float | None = None


class _Question(NamedTuple):
    """A caption without its text, and the prompt that asks for it."""

    caption: WindowCaption
    prompt: Prompt


# By the numbers of a clip and of its window.
_Asked = dict[tuple[int, int], _Question]
Item = TypeVar("Item")


@dataclass
class BatchCaptioner:
    """Answers one question about each of many clips.

    Args:
        model: the loaded model.
        prompt: the question.
        options: how answers are generated; greedy ones are those of one clip at a time, in float32 (in half precision
            a near tie of two tokens may fall the other way).
        batch_size: clips that are answered together at first: where memory runs out, half as many are tried. By
            default as many as fit the free memory of a GPU, and 8 on other devices.
        conversation: template and system prompt; by default those that belong to the weights.
        max_frames: frames that are encoded together; by default what suits the model's device.
    """

    model: LoadedModel
    prompt: str = DEFAULT_PROMPT
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int | None = None
    conversation: Conversation | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        self.clips_at_once = self.batch_size or self._clips_that_fit()
        self._prefix = SharedPrefix()

    def _clips_that_fit(self) -> int:
        room = min(_PROMPT_TOKENS + self.options.max_new_tokens, self.model.max_length)
        return batch_that_fits(self.model.model, self.model.device, room, self.options.num_beams)

    def run(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Caption windows as they come; captions and errors come out in any order."""
        questions = self._ask(reads)
        if self.model.decoders.serves(self.options):
            return self._answer_in_rows(questions)
        return self._answer_by_length(questions)

    def _ask(self, reads: Iterable[WindowRead]) -> Iterator[_Question | WindowCaption]:
        """Yield a question about each window, or the caption with the error of one that cannot be used."""
        unencoded: list[WindowRead] = []
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                yield _begin(read, read.window)
                continue
            unencoded.append(read)
            max_frames = self.max_frames or self.model.max_frames
            if len(unencoded) >= self.clips_at_once or _num_frames(unencoded) >= max_frames:
                yield from self._encode(unencoded)
                unencoded = []
        yield from self._encode(unencoded)

    def _encode(self, reads: Sequence[WindowRead]) -> Iterator[_Question | WindowCaption]:
        """Encode the media of windows together, in halves of halves where memory does not suffice."""
        questions: list[_Question] | None = None
        try:
            questions = self._questions(reads)
        except OutOfMemoryError as error:
            if len(reads) == 1:
                yield _begin(reads[0], error)
                return
            logger.warning("%d clips are too many to be encoded together; trying fewer: %s", len(reads), error)
        # Outside of `except`, where the error no longer holds memory.
        if questions is None:
            self.max_frames = max(1, (self.max_frames or self.model.max_frames) // 2)
            for half in _halves(reads):
                yield from self._encode(half)
            return
        yield from questions

    def _questions(self, reads: Sequence[WindowRead]) -> list[_Question]:
        questions = []
        windows = [read.window for read in reads if isinstance(read.window, Window)]
        items = [[item for item in (window.audio, window.frames) if item is not None] for window in windows]
        encoded = iter(self.model.encode_batch([*chain.from_iterable(items)], self.max_frames))
        for read, window, of_one in zip(reads, windows, items, strict=True):
            conversation = (self.conversation or self.model.new_conversation()).copy()
            conversation.ask(self.prompt)
            conversation = conversation.up_to_answer()
            frames = [item for item in (window.frames,) if item is not None]
            conversation.introduce(media_prefix(frames, window.audio))
            prompt = self.model.prepare(conversation, [next(encoded) for _ in of_one])
            questions.append(_Question(_begin(read), prompt))
        return questions

    def _answer_by_length(self, questions: Iterable[_Question | WindowCaption]) -> Iterator[WindowCaption]:
        """Answer prompts with others of the same length as soon as there are enough, so that little is padded."""
        waiting: dict[int, list[_Question]] = {}
        for question in questions:
            if isinstance(question, WindowCaption):
                yield question
                continue
            equal = waiting.setdefault(len(question.prompt.keys), [])
            equal.append(question)
            # Whenever memory runs out, `clips_at_once` becomes smaller.
            while len(equal) >= (number := self.clips_at_once):
                batch = equal[:number]
                del equal[:number]
                yield from self._answer(batch)
            if sum(map(len, waiting.values())) >= _WAITING_BATCHES * self.clips_at_once:
                yield from self._answer_all(waiting)
        yield from self._answer_all(waiting)

    def _answer_all(self, waiting: dict[int, list[_Question]]) -> Iterator[WindowCaption]:
        """Answer all prompts that wait, sorted by length."""
        ordered = [question for length in sorted(waiting) for question in waiting[length]]
        waiting.clear()
        while ordered:
            batch, ordered = ordered[: self.clips_at_once], ordered[self.clips_at_once :]
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[_Question]) -> Iterator[WindowCaption]:
        """Answer a batch, in halves of halves where memory does not suffice."""
        texts: list[str] | None = None
        try:
            texts = generate_text(self.model, [prompt for _, prompt in batch], self.options, self._prefix)
        except OutOfMemoryError as error:
            if len(batch) == 1:
                yield replace(batch[0].caption, error=error)
                return
            logger.warning("%d clips are too many to be answered together; trying fewer: %s", len(batch), error)
        if texts is None:
            self.clips_at_once = min(self.clips_at_once, (len(batch) + 1) // 2)
            for half in _halves(batch):
                yield from self._answer(half)
            return
        for (caption, _), text in zip(batch, texts, strict=True):
            yield replace(caption, text=text)

    def _answer_in_rows(self, questions: Iterator[_Question | WindowCaption]) -> Iterator[WindowCaption]:
        """Answer with a `StaticDecoder`: an answer that has ended gives its row to the next question."""
        failed: list[WindowCaption] = []
        asked: _Asked = {}
        is_done = False
        while not is_done:
            # What was asked and not answered when memory ran out is asked again.
            questions = chain([*asked.values()], questions)
            asked.clear()
            prompts = _note_asked(questions, asked, failed)
            try:
                for key, text in stream_texts(self.model, prompts, self.options, self.clips_at_once):
                    yield from _take_all(failed)
                    yield replace(asked.pop(key).caption, text=text)
                is_done = True
            except OutOfMemoryError as error:
                if self.clips_at_once == 1:
                    failed += [replace(caption, error=error) for caption, _ in asked.values()]
                    asked.clear()
                else:
                    many = self.clips_at_once
                    logger.warning("%d clips are too many to be answered together; trying fewer: %s", many, error)
                self.clips_at_once = max(1, self.clips_at_once // 2)
        yield from failed


def caption_clips(
    captioner: BatchCaptioner, clips: Iterable[ClipSource], reader: ClipReader, num_workers: int = 0
) -> Iterator[WindowCaption]:
    """Yield captions of all windows of all clips as they come; a clip's number in `clips` is its key."""
    ahead = 2 * captioner.clips_at_once + 2 * num_workers
    yield from captioner.run(read_ahead(zip(count(), clips), reader, num_workers, ahead))


def _begin(read: WindowRead, error: VideoLlamaError | None = None) -> WindowCaption:
    """Return the caption of a window without its text."""
    caption = WindowCaption(read.key, read.number, read.num_windows, None, error)
    window = read.window
    if not isinstance(window, Window):
        return caption
    return replace(caption, sound=window.sound, start_seconds=window.start_seconds, end_seconds=window.end_seconds)


def _note_asked(
    questions: Iterable[_Question | WindowCaption], asked: _Asked, failed: list[WindowCaption]
) -> Iterator[tuple[tuple[int, int], Prompt]]:
    """Yield prompts with their keys in `asked`, which gets the questions; captions with errors go to `failed`."""
    for question in questions:
        if isinstance(question, WindowCaption):
            failed.append(question)
            continue
        key = question.caption.key, question.caption.number
        asked[key] = question
        yield key, question.prompt


def _take_all(captions: list[WindowCaption]) -> Iterator[WindowCaption]:
    while captions:
        yield captions.pop(0)


def _halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    middle = (len(items) + 1) // 2
    return items[:middle], items[middle:]


def _num_frames(reads: Sequence[WindowRead]) -> int:
    items = [read.window.frames for read in reads if isinstance(read.window, Window)]
    return sum(len(item.pixel_values if isinstance(item, VideoFrames) else item) for item in items if item is not None)
