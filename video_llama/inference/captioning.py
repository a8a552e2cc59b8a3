"""Caption many clips in one pass: decoded ahead, encoded together, answered in batches of like length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import TypeVar

from video_llama.checkpoints.memory import batch_that_fits
from video_llama.conversation import Conversation
from video_llama.errors import OutOfMemoryError, VideoLlamaError
from video_llama.inference.batch import complete_batch, complete_stream, encode_batch, most_frames
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.shared_prefix import SharedPrefix
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.processor.clips import ClipReader, ClipSource, Window
from video_llama.processor.media_processor import VideoFrames
from video_llama.prompt_parts import media_prefix
from video_llama.utils.devices import computing_on

__all__ = ["DEFAULT_PROMPT", "BatchCaptioner", "WindowCaption", "caption_clips"]

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Please describe this in detail."

_PROMPT_TOKENS = 256  # more than the question about a clip takes, with its media
_WAITING_BATCHES = 4  # so many prompts wait for others of their length; then they are sorted, and padded


@dataclass(frozen=True)
class WindowCaption:
    """What became of one window of one clip.

    Args:
        key: of the clip.
        number: of the window.
        num_windows: that the clip has.
        text: the caption; None if there is an error.
        error: why there is no caption.
        sound: one phrase about the sound.
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


_Question = tuple[WindowCaption, Prompt]
_Key = tuple[int, int]  # of a clip and of one of its windows
Item = TypeVar("Item")


@dataclass
class BatchCaptioner:
    """Answers one question about each of many clips.

    Args:
        model: the loaded model.
        prompt: the question.
        options: how answers are drawn; greedy ones are those of one clip at a time, in float32 (in half precision a
            near tie of two tokens may fall the other way).
        batch_size: clips that are answered together, at first: where memory runs out, half as many go on. By default
            as many as fit the free memory of a GPU, and 8 on other devices.
        conversation: template and system prompt; by default those that belong to the weights.
        max_frames: frames that are encoded together; by default what suits the model's device.
    """

    model: VideoLlama
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
        """Caption windows as they come; errors come out at once, captions in any order."""
        if self.model.decodes_statically(self.options):
            yield from self._run_statically(reads)
            return
        unencoded: list[WindowRead] = []
        waiting: dict[int, list[_Question]] = {}  # by length
        failed: list[WindowCaption] = []
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                yield WindowCaption(read.key, read.number, read.num_windows, None, read.window)
                continue
            unencoded.append(read)
            if len(unencoded) >= self.clips_at_once or _num_frames(unencoded) >= self._most_frames():
                _add(waiting, self._encode(unencoded, failed))
                yield from _taken_from(failed)
                unencoded = []
            for equal in waiting.values():  # the best company there is; the next clips are decoded meanwhile
                while len(equal) >= (number := self.clips_at_once):
                    batch, equal[:number] = equal[:number], []
                    yield from self._answer(batch)
            if sum(map(len, waiting.values())) >= _WAITING_BATCHES * self.clips_at_once:
                yield from self._answer_all(waiting)
        _add(waiting, self._encode(unencoded, failed))
        yield from _taken_from(failed)
        yield from self._answer_all(waiting)

    def _run_statically(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Like `run`: an answer that has ended gives its place to the next window."""
        failed: list[WindowCaption] = []
        supply: Iterator[_Question] = self._encode_ahead(reads, failed)
        asked: dict[_Key, _Question] = {}  # and not answered
        is_done = False
        while not is_done:
            supply = chain([*asked.values()], supply)  # which may still hold some of an earlier round
            asked.clear()
            questions = _remembered(supply, asked)
            try:
                for key, text in complete_stream(self.model, questions, self.options, self.clips_at_once):
                    yield from _taken_from(failed)
                    caption, _ = asked.pop(key)
                    yield replace(caption, text=text)
                is_done = True
            except OutOfMemoryError as error:
                if self.clips_at_once == 1:
                    failed += [replace(caption, error=error) for caption, _ in asked.values()]
                    asked.clear()
                else:
                    logger.warning(
                        "%d clips are too many to be answered together; going on with fewer: %s",
                        self.clips_at_once,
                        error,
                    )
                self.clips_at_once = max(1, self.clips_at_once // 2)
        yield from failed

    def _encode_ahead(self, reads: Iterable[WindowRead], failed: list[WindowCaption]) -> Iterator[_Question]:
        unencoded: list[WindowRead] = []
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                failed.append(WindowCaption(read.key, read.number, read.num_windows, None, read.window))
                continue
            unencoded.append(read)
            if len(unencoded) >= self.clips_at_once or _num_frames(unencoded) >= self._most_frames():
                yield from self._encode(unencoded, failed)
                unencoded = []
        yield from self._encode(unencoded, failed)

    def _most_frames(self) -> int:
        return self.max_frames or most_frames(self.model)

    def _encode(self, reads: Sequence[WindowRead], failed: list[WindowCaption]) -> Iterator[_Question]:
        """Prompts with their media; the media themselves are let go.

        What memory does not suffice for even by itself goes to `failed`.
        """
        questions: list[_Question] | None = None
        try:
            with computing_on(self.model.device):
                questions = self._questions(reads)
        except OutOfMemoryError as error:
            if len(reads) == 1:
                failed.append(WindowCaption(reads[0].key, reads[0].number, reads[0].num_windows, None, error))
                return
            logger.warning("%d clips are too many to be encoded together; going on with fewer: %s", len(reads), error)
        if questions is None:  # only now is the memory free of what the error held
            self.max_frames = max(1, self._most_frames() // 2)
            for part in _halves(reads):
                yield from self._encode(part, failed)
            return
        yield from questions

    def _questions(self, reads: Sequence[WindowRead]) -> list[_Question]:
        """Captions to be filled in, with their prompts."""
        questions = []
        windows = [read.window for read in reads if isinstance(read.window, Window)]
        items = [[item for item in (window.audio, window.frames) if item is not None] for window in windows]
        encoded = iter(encode_batch(self.model, [item for of_one in items for item in of_one], self.max_frames))
        for read, window, of_one in zip(reads, windows, items, strict=True):
            conversation = (self.conversation or self.model.new_conversation()).copy()
            conversation.ask(self.prompt)
            conversation = conversation.up_to_answer()
            conversation.introduce(media_prefix([] if window.frames is None else [window.frames], window.audio))
            prompt = self.model.prepare(conversation, [next(encoded) for _ in of_one])
            caption = WindowCaption(
                read.key,
                read.number,
                read.num_windows,
                None,
                sound=window.sound,
                start_seconds=window.start_seconds,
                end_seconds=window.end_seconds,
            )
            questions.append((caption, prompt))
        return questions

    def _answer_all(self, waiting: dict[int, list[_Question]]) -> Iterator[WindowCaption]:
        """Answer all that wait, in batches with as little padding as can be."""
        ordered = [question for length in sorted(waiting) for question in waiting[length]]
        waiting.clear()
        while ordered:
            batch, ordered = ordered[: self.clips_at_once], ordered[self.clips_at_once :]
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[_Question]) -> Iterator[WindowCaption]:
        """Captions of a batch, in halves of halves where memory does not suffice for all of it."""
        texts: list[str] | None = None
        try:
            with computing_on(self.model.device):
                texts = complete_batch(self.model, [prompt for _, prompt in batch], self.options, self._prefix)
        except OutOfMemoryError as error:
            if len(batch) == 1:
                yield replace(batch[0][0], error=error)
                return
            logger.warning("%d clips are too many to be answered together; going on with fewer: %s", len(batch), error)
        if texts is None:
            self.clips_at_once = min(self.clips_at_once, (len(batch) + 1) // 2)
            for part in _halves(batch):
                yield from self._answer(part)
            return
        for (caption, _), text in zip(batch, texts, strict=True):
            yield replace(caption, text=text)


def caption_clips(
    captioner: BatchCaptioner, clips: Iterable[ClipSource], reader: ClipReader, num_workers: int = 0
) -> Iterator[WindowCaption]:
    """Captions of all windows of all clips as they come; a clip's number in `clips` is its key."""
    ahead = 2 * captioner.clips_at_once + 2 * num_workers
    yield from captioner.run(read_ahead(zip(count(), clips), reader, num_workers, ahead))


def _add(waiting: dict[int, list[_Question]], questions: Iterable[_Question]) -> None:
    """To those that wait for others of their length."""
    for caption, prompt in questions:
        waiting.setdefault(len(prompt.keys), []).append((caption, prompt))


def _taken_from(captions: list[WindowCaption]) -> Iterator[WindowCaption]:
    while captions:
        yield captions.pop(0)


def _remembered(questions: Iterable[_Question], asked: dict[_Key, _Question]) -> Iterator[tuple[_Key, Prompt]]:
    """The prompts of questions, each with the key that it is found by in `asked`."""
    for caption, prompt in questions:
        asked[caption.key, caption.number] = caption, prompt
        yield (caption.key, caption.number), prompt


def _halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    middle = (len(items) + 1) // 2
    return items[:middle], items[middle:]


def _num_frames(reads: Sequence[WindowRead]) -> int:
    items = [read.window.frames for read in reads if isinstance(read.window, Window)]
    return sum(len(item.pixel_values if isinstance(item, VideoFrames) else item) for item in items if item is not None)
