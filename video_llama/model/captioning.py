"""Caption many clips in one pass: decoded ahead, encoded together, answered in batches of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from video_llama.conversation import Conversation, introduce_media
from video_llama.errors import VideoLlamaError
from video_llama.model.batching import complete_batch, complete_stream, encode_batch, most_frames
from video_llama.model.generation import GenerationOptions
from video_llama.model.inference import Prompt, VideoLlama
from video_llama.model.shared_prefix import SharedPrefix
from video_llama.processor.clips import ClipReader, ClipSource, Window
from video_llama.processor.media import VideoFrames
from video_llama.processor.read_ahead import WindowRead, read_ahead

__all__ = ["DEFAULT_PROMPT", "BatchCaptioner", "WindowCaption", "caption_clips"]

DEFAULT_PROMPT = "Please describe this in detail."

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


@dataclass
class BatchCaptioner:
    """Answers one question about each of many clips.

    Args:
        model: the loaded model.
        prompt: the question.
        options: how answers are drawn; greedy ones are those of one clip at a time.
        batch_size: clips that are answered together.
        conversation: template and system prompt; by default those that belong to the weights.
        max_frames: frames that are encoded together; by default what suits the model's device.
    """

    model: VideoLlama
    prompt: str = DEFAULT_PROMPT
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int = 8
    conversation: Conversation | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        self._prefix = SharedPrefix()

    def run(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Caption windows as they come; errors come out at once, captions in any order."""
        if self.model.decodes_statically(self.options):
            yield from self._run_statically(reads)
            return
        unencoded: list[WindowRead] = []
        waiting: dict[int, list[_Question]] = {}  # by length
        most = self.max_frames or most_frames(self.model)
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                yield WindowCaption(read.key, read.number, read.num_windows, None, read.window)
                continue
            unencoded.append(read)
            if len(unencoded) >= self.batch_size or _num_frames(unencoded) >= most:
                _add(waiting, self._encode(unencoded))
                unencoded = []
            for equal in waiting.values():  # the best company there is; the next clips are decoded meanwhile
                while len(equal) >= self.batch_size:
                    yield from self._answer(equal[: self.batch_size])
                    del equal[: self.batch_size]
            if sum(map(len, waiting.values())) >= _WAITING_BATCHES * self.batch_size:
                yield from self._answer_all(waiting)
        _add(waiting, self._encode(unencoded))
        yield from self._answer_all(waiting)

    def _run_statically(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Like `run`: an answer that has ended gives its place to the next window."""
        failed: list[WindowCaption] = []
        answers = complete_stream(self.model, self._encode_ahead(reads, failed), self.options, self.batch_size)
        for caption, text in answers:
            yield from failed
            failed.clear()
            yield replace(caption, text=text)
        yield from failed

    def _encode_ahead(self, reads: Iterable[WindowRead], failed: list[WindowCaption]) -> Iterator[_Question]:
        unencoded: list[WindowRead] = []
        most = self.max_frames or most_frames(self.model)
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                failed.append(WindowCaption(read.key, read.number, read.num_windows, None, read.window))
                continue
            unencoded.append(read)
            if len(unencoded) >= self.batch_size or _num_frames(unencoded) >= most:
                yield from self._encode(unencoded)
                unencoded = []
        yield from self._encode(unencoded)

    def _encode(self, reads: Sequence[WindowRead]) -> Iterator[_Question]:
        """Prompts with their media; the media themselves are let go."""
        windows = [read.window for read in reads if isinstance(read.window, Window)]
        items = [[item for item in (window.audio, window.frames) if item is not None] for window in windows]
        encoded = iter(encode_batch(self.model, [item for of_one in items for item in of_one], self.max_frames))
        for read, window, of_one in zip(reads, windows, items, strict=True):
            conversation = (self.conversation or self.model.new_conversation()).copy()
            conversation.ask(self.prompt)
            conversation = conversation.up_to_answer()
            conversation.introduce(introduce_media([] if window.frames is None else [window.frames], window.audio))
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
            yield caption, prompt

    def _answer_all(self, waiting: dict[int, list[_Question]]) -> Iterator[WindowCaption]:
        """Answer all that wait, in batches with as little padding as can be."""
        ordered = [question for length in sorted(waiting) for question in waiting[length]]
        waiting.clear()
        for start in range(0, len(ordered), self.batch_size):
            yield from self._answer(ordered[start : start + self.batch_size])

    def _answer(self, batch: Sequence[_Question]) -> Iterator[WindowCaption]:
        texts = complete_batch(self.model, [prompt for _, prompt in batch], self.options, self._prefix)
        for (caption, _), text in zip(batch, texts, strict=True):
            yield replace(caption, text=text)


def caption_clips(
    captioner: BatchCaptioner, clips: Iterable[ClipSource], reader: ClipReader, num_workers: int = 0
) -> Iterator[WindowCaption]:
    """Captions of all windows of all clips as they come; a clip's number in `clips` is its key."""
    ahead = 2 * captioner.batch_size + 2 * num_workers
    yield from captioner.run(read_ahead(zip(count(), clips), reader, num_workers, ahead))


def _add(waiting: dict[int, list[_Question]], questions: Iterable[_Question]) -> None:
    """To those that wait for others of their length."""
    for caption, prompt in questions:
        waiting.setdefault(len(prompt.keys), []).append((caption, prompt))


def _num_frames(reads: Sequence[WindowRead]) -> int:
    items = [read.window.frames for read in reads if isinstance(read.window, Window)]
    return sum(len(item.pixel_values if isinstance(item, VideoFrames) else item) for item in items if item is not None)
