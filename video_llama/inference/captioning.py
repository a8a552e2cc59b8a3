"""Caption many clips in one pass: decoded ahead, encoded together, answered in batches of like length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import NamedTuple, Protocol, TypeVar

from video_llama.checkpoints.memory import batch_that_fits
from video_llama.conversation import Conversation
from video_llama.errors import OutOfMemoryError, VideoLlamaError
from video_llama.inference.cache import SharedPrefix
from video_llama.inference.completion import generate_text, stream_texts
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.loaded_model import LoadedModel, Prompt
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.processor.clips import ClipReader, ClipSource, Window
from video_llama.processor.media_processor import VideoFrames
from video_llama.prompt_parts import media_prefix

__all__ = [
    "DEFAULT_PROMPT",
    "BatchCaptioner",
    "Captioner",
    "WindowCaption",
    "ask_about",
    "begin_caption",
    "caption_clips",
]

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
        key, number, num_windows: of the clip, of the window within it, and how many windows it has.
        text, error: the caption, or why there is none.
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


class Captioner(Protocol):
    """Captions windows that were read.

    Attributes:
        clips_at_once: windows that are answered together; so many more should be read ahead.
    """

    clips_at_once: int

    def run(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Caption windows as they come; captions and errors come out in any order."""


class _Question(NamedTuple):
    """A caption without its text, and the prompt that asks for it."""

    caption: WindowCaption
    prompt: Prompt


# By the numbers of a clip and of its window.
_Asked = dict[tuple[int, int], _Question]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class BatchCaptioner:
    """Answers one question about each of many clips; see `VideoLlama.caption`.

    Args:
        batch_size: clips that are answered together at first: where memory runs out, half as many are tried. By
            default as many as fit the free memory of a GPU, and 8 on other devices.
    """

    model: LoadedModel
    prompt: str = DEFAULT_PROMPT
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        model, options = self.model, self.options
        # Plan memory for the longest text of one clip: the prompt with its media, and the answer.
        length = min(_PROMPT_TOKENS + options.max_new_tokens, model.max_length)
        self.clips_at_once = self.batch_size or batch_that_fits(model.model, model.device, length, options.num_beams)
        self._max_frames = model.max_frames
        self._prefix = SharedPrefix()

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
                yield begin_caption(read, read.window)
                continue
            unencoded.append(read)
            # Encode as soon as there are enough clips for a batch of answers, or enough frames for one encoder pass.
            if len(unencoded) >= self.clips_at_once or _num_frames(unencoded) >= self._max_frames:
                yield from self._encode(unencoded)
                unencoded = []
        yield from self._encode(unencoded)

    def _encode(self, reads: Sequence[WindowRead]) -> Iterator[_Question | WindowCaption]:
        for part, questions in self._in_parts(self._questions, reads, "encoded"):
            if isinstance(questions, OutOfMemoryError):
                yield begin_caption(part[0], questions)
            else:
                yield from questions

    def _questions(self, reads: Sequence[WindowRead]) -> list[_Question]:
        questions = []
        windows = [read.window for read in reads if isinstance(read.window, Window)]
        # The items of all clips go through the encoders as one flat list. The loop below takes each clip's share back
        # in the same order: audio first, then frames.
        items = [[item for item in (window.audio, window.frames) if item is not None] for window in windows]
        encoded = iter(self.model.encode_batch([*chain.from_iterable(items)], self._max_frames))
        for read, window, of_one in zip(reads, windows, items, strict=True):
            conversation = ask_about(window, self.prompt, self.model.new_conversation())
            prompt = self.model.prepare(conversation, [next(encoded) for _ in of_one])
            questions.append(_Question(begin_caption(read), prompt))
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
            # Prompts of rare lengths would wait and hold memory until the end. Past a limit all are answered, padded.
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
        for part, texts in self._in_parts(self._texts, batch, "answered"):
            if isinstance(texts, OutOfMemoryError):
                yield replace(part[0].caption, error=texts)
                continue
            for question, text in zip(part, texts, strict=True):
                yield replace(question.caption, text=text)

    def _texts(self, batch: Sequence[_Question]) -> list[str]:
        return generate_text(self.model, [prompt for _, prompt in batch], self.options, self._prefix)

    def _in_parts(
        self, work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], what: str
    ) -> Iterator[tuple[Sequence[Item], list[Result] | OutOfMemoryError]]:
        """Do work on all items together, or in halves of halves where memory does not suffice.

        Yields items with their results, or a single item that is too large with the error.
        """
        results: list[Result] | None = None
        try:
            results = work(items)
        except OutOfMemoryError as error:
            if len(items) == 1:
                yield items, error
                return
            self._take_fewer(what, len(items), error)
        # Outside of `except`, where the error no longer holds memory.
        if results is not None:
            yield items, results
            return
        # A half that is still too large is halved again by the recursive call.
        middle = (len(items) + 1) // 2
        for half in (items[:middle], items[middle:]):
            yield from self._in_parts(work, half, what)

    def _take_fewer(self, what: str, number: int, error: OutOfMemoryError) -> None:
        """Take half as many from now on."""
        logger.warning("%d clips are too many to be %s together; trying fewer: %s", number, what, error)
        # Encoding is limited by frames and answering by clips: lower only the limit that was too high.
        if what == "encoded":
            self._max_frames = max(1, self._max_frames // 2)
        else:
            self.clips_at_once = min(self.clips_at_once, (number + 1) // 2)

    def _answer_in_rows(self, questions: Iterator[_Question | WindowCaption]) -> Iterator[WindowCaption]:
        """Answer with a `StaticDecoder`: an answer that has ended gives its row to the next question."""
        failed: list[WindowCaption] = []
        asked: _Asked = {}
        while True:
            # What was asked and not answered when memory ran out is asked again.
            questions = chain([*asked.values()], questions)
            asked.clear()
            prompts = _note_asked(questions, asked, failed)
            try:
                for key, text in stream_texts(self.model, prompts, self.options, self.clips_at_once):
                    # Errors found while prompts were taken come out between the answers, not only at the end.
                    yield from _take_all(failed)
                    yield replace(asked.pop(key).caption, text=text)
                yield from failed
                return
            except OutOfMemoryError as error:
                if self.clips_at_once > 1:
                    self._take_fewer("answered", self.clips_at_once, error)
                    continue
                # A batch of one cannot become smaller. Its clip gets the error, and the loop goes on with the next.
                failed += [replace(caption, error=error) for caption, _ in asked.values()]
                asked.clear()


def caption_clips(
    captioner: BatchCaptioner, clips: Iterable[ClipSource], reader: ClipReader, num_workers: int = 0
) -> Iterator[WindowCaption]:
    """Yield captions of all windows of all clips as they come; a clip's number in `clips` is its key."""
    # While one batch is answered, the next one is decoded. Each worker has one clip in work and one ready.
    ahead = 2 * captioner.clips_at_once + 2 * num_workers
    yield from captioner.run(read_ahead(zip(count(), clips), reader, num_workers, ahead))


def ask_about(window: Window, question: str, conversation: Conversation) -> Conversation:
    """Return an empty conversation with a question about a window, up to where the answer begins."""
    conversation.ask(question)
    conversation = conversation.up_to_answer()
    frames = [item for item in (window.frames,) if item is not None]
    conversation.introduce(media_prefix(frames, window.audio))
    return conversation


def begin_caption(read: WindowRead, error: VideoLlamaError | None = None) -> WindowCaption:
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


def _num_frames(reads: Sequence[WindowRead]) -> int:
    items = [read.window.frames for read in reads if isinstance(read.window, Window)]
    return sum(len(item.pixel_values if isinstance(item, VideoFrames) else item) for item in items if item is not None)
