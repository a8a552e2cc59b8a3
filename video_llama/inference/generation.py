"""From a prompt with media features to text: sampling options, stop strings, streaming, and the reused KV cache."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from video_llama.errors import VideoLlamaError

__all__ = [
    "GenerationOptions",
    "PrefixCache",
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
    """How an answer is drawn; the defaults are greedy, so the same question has the same answer.

    Args:
        max_new_tokens: longest answer, in tokens.
        min_new_tokens: shortest answer, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        top_p: sample from the smallest set of tokens that holds this probability.
        top_k: sample from so many of the likeliest tokens, 0 from all; None leaves it to `transformers` (50).
        num_beams: width of beam search; 1 is none.
        repetition_penalty: above 1, tokens of the answer so far become less likely.
        length_penalty: beam search's preference for long (above 0) or short answers.
        static_cache: decode with `StaticDecoder`: keys and values in memory of a fixed size and, on a GPU, one CUDA
            graph a step, which makes answers several times faster. None does so on a GPU, where the language model
            allows it. The answers are the same.
        compile: fuse the operations of such a step with `torch.compile`: seconds at the first answer, and a faster
            step ever after. It pays for many answers.
        do_sample: says only what `temperature` says: True samples, at a temperature of 1 where none is given; False
            takes the likeliest token, and a temperature that is given with it has no effect, which is logged.
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
        """Whether keys and values of earlier prompts can be used: not with beams."""
        return self.num_beams == 1

    def __post_init__(self, do_sample: bool | None) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError("max_new_tokens and num_beams must be at least 1")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must lie above 0")
        if self.num_beams > 1 and (self.static_cache or self.compile):
            raise ValueError("static_cache and compile know no beams: set num_beams to 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError("temperature must not be negative or infinite and top_p must lie above 0 and up to 1")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError("top_k must not be negative")
        if do_sample and self.temperature == 0:
            object.__setattr__(self, "temperature", 1.0)
        elif do_sample is False and self.temperature > 0:
            logger.warning("temperature=%g has no effect beside do_sample=False: nothing is sampled", self.temperature)
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def names(cls) -> list[str]:
        """Of all options."""
        return [*(field.name for field in fields(cls)), "do_sample"]

    def changed(self, settings: Mapping[str, Any]) -> GenerationOptions:
        """These options with others in the place of some; None leaves one as it is.

        Raises:
            TypeError: a name that is no option.
            ValueError: a value out of range, or `do_sample=True` with a temperature of 0.
        """
        check_names(settings, self.names())
        if settings.get("do_sample") and settings.get("temperature") == 0:
            raise ValueError("do_sample=True needs a temperature above 0, and temperature=0 needs do_sample=False")
        return replace(self, **{name: value for name, value in settings.items() if value is not None})

    def within(self, prompt_length: int, max_length: int | None, min_length: int | None) -> GenerationOptions:
        """These options with bounds that `transformers` counts prompt and answer together for.

        Args:
            prompt_length: tokens of the prompt, those of media included.
            max_length, min_length: of prompt and answer; None is no bound.

        Raises:
            VideoLlamaError: the prompt leaves no room for an answer.
        """
        longest, shortest = self.max_new_tokens, self.min_new_tokens
        if max_length is not None:
            longest = min(longest, max_length - prompt_length)
        if min_length is not None:
            shortest = max(shortest, min_length - prompt_length)
        if longest < 1:
            raise VideoLlamaError(
                f"the question with its media takes {prompt_length} tokens, so max_length={max_length} leaves none for "
                "an answer; raise it, or say max_new_tokens, which counts the answer alone"
            )
        return replace(self, max_new_tokens=longest, min_new_tokens=shortest)

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `transformers`' `generate`; those that would have no effect are left out."""
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
    """Stop at keyword arguments that are no options.

    Raises:
        TypeError: naming them and all that there are.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"there is no option {name!r}{meant} (options: {', '.join(known)})")


@dataclass(eq=False)
class PrefixCache:
    """Keys and values of the tokens a conversation has already been through.

    Each cached position has a key that says what stood there: a token id, or which media item and which of its
    tokens. A new prompt reuses the cache as far as its keys agree, so that nothing depends on how the prompt
    came to differ (a dropped turn, an edited question, an answer that tokenises differently).
    """

    keys: list[Hashable] = field(default_factory=list)
    states: Cache | None = None

    def take(self, keys: Sequence[Hashable]) -> Cache:
        """The cached states of the longest common prefix, always short of the last key.

        `generate` needs at least one new position to compute. The states are handed over: the caller gives
        them back with `put` when the answer is complete, and a failure in between leaves an empty cache.
        """
        shared = 0
        for old, new in zip(self.keys, keys[:-1], strict=False):
            if old != new:
                break
            shared += 1
        states, surplus = self.states, len(self.keys) - shared
        self.clear()
        if states is None or shared == 0:
            return DynamicCache()
        if surplus:
            states.crop(-surplus)
        return states

    def put(self, keys: Sequence[Hashable], states: Cache) -> None:
        """Keep the states of `keys`; only as many as were really processed."""
        self.keys = list(keys[: states.get_seq_length()])
        self.states = states

    @property
    def num_bytes(self) -> int:
        """Of keys and values, on all devices together."""
        layers = [] if self.states is None else self.states.layers
        kept = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def clear(self) -> None:
        """Forget everything and free its memory."""
        self.keys, self.states = [], None


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """`text` up to the first stop string, without surrounding white space."""
    ends = [text.find(stop) for stop in stop_strings]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def stop_arguments(stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `transformers`' `generate` is told of stop strings.

    One that is the end-of-sequence token is left to that token: for strings it walks through the whole vocabulary.
    """
    strings = [stop for stop in stop_strings if stop != tokenizer.eos_token]
    return {"stop_strings": strings, "tokenizer": tokenizer} if strings else {}


def stop_test(stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool]:
    """A function that says of the ids of an answer whether its last token completed a stop string.

    A stop string that is the end-of-sequence token is left to that token.
    """
    strings = [stop for stop in stop_strings if stop != tokenizer.eos_token]
    if not strings:
        return lambda ids: False
    # A stop string is no longer, in tokens, than in bytes; the tokens before may carry a part of its first one.
    tail = max(len(stop.encode()) for stop in strings) + 1

    def has_stopped(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-tail:], skip_special_tokens=True)
        return any(stop in text for stop in strings)

    return has_stopped


class StopSignal(StoppingCriteria):
    """Ends generation after the current token when somebody no longer wants the answer.

    Args:
        wish: set by whoever wants that, from another thread; `requested` does the same.
    """

    def __init__(self, wish: threading.Event | None = None) -> None:
        self.requested = threading.Event()
        self._wish = wish or self.requested

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = self.requested.is_set() or self._wish.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device, dtype=torch.bool)


class TextStream(BaseStreamer):
    """Hands over the text of one growing answer, holding back what may still change or turn out to be a stop string.

    Every item of `pieces` is a piece of text; None marks the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._tokenizer, self._stop_strings = tokenizer, list(stop_strings)
        self._ids: list[int] = []
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        self._ids += value.flatten().tolist()
        self._send(self._settled(self._text()))

    def end(self) -> None:
        self._send(self._text())
        self.pieces.put(None)

    def _text(self) -> str:
        return cut_at_stop(self._tokenizer.decode(self._ids, skip_special_tokens=True), self._stop_strings)

    def _settled(self, text: str) -> str:
        """`text` without the tail that later tokens may turn into something else."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the bytes of one character come in several tokens
        starts = (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(starts, default=0)].rstrip()

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.pieces.put(text[self._sent :])
            self._sent = len(text)


def stream_text(
    stream: TextStream, run: Callable[[StoppingCriteriaList], None], stop: threading.Event | None = None
) -> Iterator[str]:
    """Run a generation in a thread and yield its text as it grows.

    Closing the iterator early stops the generation after its current token and waits for it.

    Args:
        stream: the streamer that `run` passes to `generate`.
        run: does the generation with the given stopping criteria; its exceptions are raised here.
        stop: ends the generation as well; what was said until then is still yielded.
    """
    signal, failure = StopSignal(stop), []

    def work() -> None:
        try:
            run(StoppingCriteriaList([signal]))
        except BaseException as error:  # carried to the reader's thread, raised there
            failure.append(error)
        finally:
            stream.pieces.put(None)

    thread = threading.Thread(target=work, name="video-llama-generate", daemon=True)
    thread.start()
    try:
        while (piece := stream.pieces.get()) is not None:
            yield piece
    finally:
        signal.requested.set()
        thread.join()
    if failure:
        raise failure[0]
