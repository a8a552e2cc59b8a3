"""How answers are generated: options, stop strings, and text streamed while it grows."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from video_llama.errors import VideoLlamaError

__all__ = [
    "GenerationOptions",
    "StopSignal",
    "TextStream",
    "cut_at_stop",
    "stop_arguments",
    "stop_test",
    "stream_text",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated; greedy by default, so the same question has the same answer.

    Example:
        >>> options = GenerationOptions(max_new_tokens=64, temperature=0.2)
        >>> chat = Chat(model, options=options)
        >>> model.generate(imgs, audio, conv, max_new_tokens=64, temperature=0.2)

    Args:
        max_new_tokens: most tokens of an answer.
        min_new_tokens: shortest answer, in tokens.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: sample from the smallest set of tokens with this total probability.
        num_beams: width of beam search; 1 is no beam search.
        repetition_penalty: above 1, tokens of the answer so far become less likely.
        length_penalty: beam search's preference for long (above 0) or short answers.
        static_cache: decode with `StaticDecoder`, several times faster on a GPU, with the same answers. None does so
            on a GPU if the language model allows it.
        compile: compile the decoding step of `StaticDecoder` with `torch.compile`: seconds at the first answer, and
            faster steps from then on.
        top_k: sample from so many of the most likely tokens, 0 from all; None takes the default of `transformers` (50).
        do_sample: True samples, at a temperature of 1 if none is given; False takes the most likely token, and logs
            that a given temperature has no effect.

    Raises:
        ValueError: a value out of range, or values that contradict each other.
    """

    max_new_tokens: int = 300
    min_new_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 0.9
    num_beams: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    static_cache: bool | None = None
    compile: bool = False
    top_k: int | None = None
    do_sample: InitVar[bool | None] = None

    @property
    def reuses_states(self) -> bool:
        """Whether keys and values of earlier prompts can be used: not with beam search."""
        return self.num_beams == 1

    def __post_init__(self, do_sample: bool | None) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError("max_new_tokens and num_beams must be at least 1")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must be above 0")
        if self.num_beams > 1 and (self.static_cache or self.compile):
            raise ValueError("static_cache and compile do not work with beam search: set num_beams to 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError("top_k must not be negative")
        # The class is frozen, and `do_sample` is only another way to set the temperature.
        if do_sample and self.temperature == 0:
            object.__setattr__(self, "temperature", 1.0)
        elif do_sample is False and self.temperature > 0:
            logger.warning("temperature=%g has no effect with do_sample=False: nothing is sampled", self.temperature)
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options."""
        return [*(field.name for field in fields(cls)), "do_sample"]

    @classmethod
    def from_call(cls, options: Mapping[str, Any], others: Sequence[str] = ()) -> GenerationOptions:
        """Return the options that a caller names, and log those without effect; errors as of `changed`.

        `others` are further arguments of the called function, for the message about an unknown name.
        """
        check_names(options, [*cls.names(), *others])
        chosen = cls().changed(options)
        unused = [name for name in ("top_p", "top_k") if options.get(name) is not None]
        if unused and chosen.temperature == 0:
            named = " and ".join(unused)
            logger.warning("no effect of %s: nothing is sampled without a temperature or do_sample=True", named)
        return chosen

    def changed(self, settings: Mapping[str, Any]) -> GenerationOptions:
        """Return these options with some replaced; None leaves one as it is.

        Raises:
            TypeError, ValueError: an unknown name; a value out of range, or `do_sample=True` with a temperature of 0.
        """
        check_names(settings, self.names())
        if settings.get("do_sample") and settings.get("temperature") == 0:
            raise ValueError("do_sample=True needs a temperature above 0, and temperature=0 needs do_sample=False")
        return replace(self, **{name: value for name, value in settings.items() if value is not None})

    def within(self, prompt_length: int, max_length: int | None, min_length: int | None) -> GenerationOptions:
        """Return these options with bounds on prompt and answer together, as `transformers` has them.

        Raises:
            VideoLlamaError: the prompt, media included, leaves no room for an answer.
        """
        longest, shortest = self.max_new_tokens, self.min_new_tokens
        if max_length is not None:
            longest = min(longest, max_length - prompt_length)
        if min_length is not None:
            shortest = max(shortest, min_length - prompt_length)
        if longest < 1:
            raise VideoLlamaError(
                f"the question with its media takes {prompt_length} tokens, so max_length={max_length} leaves none for "
                "an answer; raise it, or set max_new_tokens, which counts the answer alone"
            )
        return replace(self, max_new_tokens=longest, min_new_tokens=shortest)

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Return arguments for `generate` of `transformers`, without those that would have no effect."""
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            kwargs |= {"temperature": self.temperature, "top_p": self.top_p}
            if self.top_k is not None:
                kwargs["top_k"] = self.top_k
        if self.num_beams > 1:
            kwargs["length_penalty"] = self.length_penalty
        return kwargs


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a `TypeError` that lists all names if an unknown one is given."""
    for name in given:
        if name not in known:
            near = "".join(f"; did you mean {match!r}?" for match in get_close_matches(name, known, 1))
            raise TypeError(f"there is no option {name!r}{near} (options: {', '.join(known)})")


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` up to the first stop string, without surrounding white space."""
    # The earliest stop string ends the text; `find` gives -1 for those that are not in it.
    ends = [text.find(stop) for stop in stop_strings]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def stop_arguments(stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the arguments of `generate` of `transformers` for stop strings."""
    # The end-of-sequence token ends the answer anyway, and for each stop string the whole vocabulary is searched.
    strings = [stop for stop in stop_strings if stop != tokenizer.eos_token]
    return {"stop_strings": strings, "tokenizer": tokenizer} if strings else {}


def stop_test(stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool]:
    """Return a function that tells from the ids of an answer whether the last token completed a stop string."""
    strings = [stop for stop in stop_strings if stop != tokenizer.eos_token]
    if not strings:
        return lambda ids: False
    # A stop string has no more tokens than bytes, and its beginning may share a token with the text before it.
    tail = max(len(stop.encode()) for stop in strings) + 1

    def has_stopped(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-tail:], skip_special_tokens=True)
        return any(stop in text for stop in strings)

    return has_stopped


class StopSignal(StoppingCriteria):
    """End a generation after the current token, once another thread sets `stop` or `requested`."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.requested = threading.Event()
        self._stop = stop or self.requested

    # Called by `generate` after each token.
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = self.requested.is_set() or self._stop.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device, dtype=torch.bool)


class TextStream(BaseStreamer):
    """The text of one growing answer, in pieces: `pieces` holds text, and None at the end.

    Text that later tokens may change, or that may begin a stop string, is held back until it is certain.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._tokenizer, self._stop_strings = tokenizer, list(stop_strings)
        self._ids: list[int] = []
        self._num_sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Add token ids."""
        self._ids += value.flatten().tolist()
        self._send(self._certain(self._text()))

    def end(self) -> None:
        """Send the rest."""
        self._send(self._text())
        self.pieces.put(None)

    def _text(self) -> str:
        return cut_at_stop(self._tokenizer.decode(self._ids, skip_special_tokens=True), self._stop_strings)

    def _certain(self, text: str) -> str:
        # The bytes of one character may come in several tokens.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        # Beginnings of stop strings, one of which may be completed by the next token.
        starts = (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(starts, default=0)].rstrip()

    def _send(self, text: str) -> None:
        # The certain part may become shorter for a moment, but what was sent is never taken back.
        if len(text) > self._num_sent:
            self.pieces.put(text[self._num_sent :])
            self._num_sent = len(text)


def stream_text(
    stream: TextStream, run: Callable[[StoppingCriteriaList], None], stop: threading.Event | None = None
) -> Iterator[str]:
    """Run a generation in a thread and yield its text as it grows.

    Closing the iterator early stops the generation after its current token and waits for it.

    Args:
        stream: the streamer that `run` passes to `generate`.
        run: generates with the given stopping criteria; its exceptions are raised here.
        stop: ends the generation as well; the text up to then is still yielded.
    """
    signal, failure = StopSignal(stop), []

    def work() -> None:
        try:
            run(StoppingCriteriaList([signal]))
        except BaseException as error:
            # Raised again in the thread that reads.
            failure.append(error)
        finally:
            # The reader waits for this end mark, so it must come after an error, too.
            stream.pieces.put(None)

    thread = threading.Thread(target=work, name="video-llama-generate", daemon=True)
    thread.start()
    try:
        # The queue brings text from the generating thread to this one; None marks the end.
        while (piece := stream.pieces.get()) is not None:
            yield piece
    finally:
        # Also reached when the caller closes the iterator early: the thread must not use the model any longer.
        signal.requested.set()
        thread.join()
    if failure:
        raise failure[0]
