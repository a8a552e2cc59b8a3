"""Decode many prompts in the rows of a `StaticStep`: a row that ends takes the next prompt.

(Continuous batching: Yu et al., "Orca", 2022.)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, LlamaForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from video_llama.inference.cache import SharedPrefix, weights_version
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.static_step import StaticStep, round_up, why_not_static
from video_llama.model.inputs import cache_argument
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.utils.devices import computing_on, execution_device

__all__ = ["DecoderPool", "Request", "StaticDecoder", "end_ids"]

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Prompt tokens that are read at once: enough to keep a GPU busy."""

# The default of transformers, where neither the caller nor the checkpoint has a value.
_DEFAULT_TOP_K = 50


@dataclass(eq=False)
class Request:
    """One prompt to be continued.

    Args:
        inputs_embeds, keys: as in `Prompt`; the common beginning of prompts with keys is computed once.
        states: keys and values of the prompt's beginning; extended in place by the rest and by the answer.
        ids: the answer so far, an end-of-sequence token included.
        has_ended: tells after each token whether the answer ends there, besides at an end-of-sequence token.
        key: for the caller, to find out whose answer it is.
    """

    inputs_embeds: Tensor
    keys: Sequence[Hashable] = ()
    states: Cache | None = None
    ids: list[int] = field(default_factory=list)
    has_ended: Callable[[list[int]], bool] = lambda ids: False
    key: Any = None

    @property
    def length(self) -> int:
        """Return the number of tokens of the prompt."""
        return self.inputs_embeds.shape[1]


class StaticDecoder:
    """A language model with room for `num_rows` texts of `max_length` tokens; one thread uses it at a time.

    The model is one for which `why_not_static` has no reason, on the device where it is to run.
    """

    @torch.inference_mode()
    def __init__(
        self, language_model: LlamaForCausalLM, num_rows: int, max_length: int, compiled: bool = False
    ) -> None:
        self._model = language_model
        self._cache_name = cache_argument(language_model.model.layers[0].forward)
        self._compiled = compiled
        self.num_rows, self.max_length = num_rows, round_up(max_length)
        self._step = StaticStep(language_model, num_rows, self.max_length, compiled)
        self._num_drawn = torch.zeros_like(self._step.tokens)
        # Joining products within the step has moved some weights.
        self._weights = _weight_addresses(language_model)
        self._prefix, self._version = SharedPrefix(), 0

    def fits(self, num_rows: int, max_length: int, compiled: bool) -> bool:
        """Whether this is what `StaticDecoder(model, num_rows, max_length, compiled)` would be, or not much larger."""
        # Up to twice the length is accepted: building a decoder costs more than the unused memory.
        has_room = max_length <= self.max_length <= 2 * max(max_length, 1024)
        if not has_room or (self.num_rows, self._compiled) != (num_rows, compiled):
            return False
        # A captured graph reads the weights where they were.
        return self._weights == _weight_addresses(self._model)

    def free(self) -> None:
        """Release all memory; the decoder cannot be used any more."""
        self._step.free()
        self.__dict__.clear()

    def run(self, requests: Iterable[Request], options: GenerationOptions) -> Iterator[Request]:
        """Continue all requests, which are taken when rows are free; yield each when its answer has ended.

        Raises:
            ValueError: a request with its answer of up to `max_new_tokens` is longer than there is room for.
        """
        supply = iter(requests)
        # Requests by row.
        active: dict[int, Request] = {}
        new: list[Request] = []
        final_ids = set(end_ids(self._model.generation_config))
        draw = _Draw(options, self._model.generation_config, self._step.logits)
        # States of the common beginning are wrong once the weights have changed.
        if self._version != (version := weights_version(self._model)):
            self._prefix, self._version = SharedPrefix(), version
        launched: tuple[dict[int, Request], _Drawn] | None = None
        # Each round reads new prompts into free rows, launches one step for all rows, and then looks at the tokens of
        # the step before.
        while True:
            free = [row for row in range(self.num_rows) if row not in active]
            # Prompts are read when an eighth of the rows is free: reading one at a time would stop all others.
            if len(free) >= max(1, self.num_rows // 8) or not active:
                new = list(itertools.islice(supply, len(free)))
                for rows, batch in self._group(new, free, options):
                    first = self._prefill(rows, batch, draw)
                    active |= zip(rows, batch, strict=True)
                    yield from self._note(dict(zip(rows, batch, strict=True)), first, active, options, final_ids)
            # All rows are free: every answer ended at its first token (go on), or there is nothing left (stop).
            if not active:
                if not new:
                    return
                continue
            # One more, for the token that was launched in the last round and is not in `ids` yet.
            longest = max(request.length + len(request.ids) + 1 for request in active.values())
            # The tokens of the step before are looked at while the device computes the one just launched.
            before, launched = launched, (dict(active), self._draw_next(draw, longest))
            if before is not None:
                yield from self._note(*before, active, options, final_ids)

    def _group(
        self, requests: list[Request], free: list[int], options: GenerationOptions
    ) -> Iterator[tuple[list[int], list[Request]]]:
        """Yield requests that are read together, with their rows."""
        rows, batch = iter(free), list[Request]()
        for request in sorted(requests, key=lambda request: request.length):
            if request.length + options.max_new_tokens > self.max_length:
                raise ValueError(
                    f"a prompt of {request.length} tokens and an answer of up to {options.max_new_tokens} do not fit "
                    f"into {self.max_length} slots"
                )
            # The requests are sorted, so this one is the longest and all others are padded to its length.
            is_full = (len(batch) + 1) * request.length > PREFILL_TOKENS
            # A request with states of its own is read alone: states of different lengths form no batch.
            if batch and (is_full or request.states is not None or batch[-1].states is not None):
                yield list(itertools.islice(rows, len(batch))), batch
                batch = []
            batch.append(request)
        if batch:
            yield list(itertools.islice(rows, len(batch))), batch

    @torch.inference_mode()
    def _prefill(self, rows: list[int], batch: Sequence[Request], draw: _Draw) -> _Drawn:
        """Read prompts into rows and draw the first token of each answer."""
        step = self._step
        num_known, states = self._known_states(batch)
        new = [request.inputs_embeds[0, num_known:] for request in batch]
        # Padding stands behind a prompt, where no token of the prompt attends to.
        embeds = nn.utils.rnn.pad_sequence(new, batch_first=True)  # (prompts, longest, width)
        cache = {self._cache_name: states}
        output = self._model.model(inputs_embeds=embeds, use_cache=True, **cache)
        # The first answer token is predicted at the last position of each prompt, not at its padding.
        last = torch.tensor([len(row) - 1 for row in new], device=embeds.device)
        hidden_states = output.last_hidden_state[torch.arange(len(new), device=embeds.device), last]
        logits = self._model.lm_head(hidden_states).float()  # (prompts, vocabulary)
        index = torch.tensor(rows, device=embeds.device)
        # NaN of an earlier answer would come through the mask.
        step.states.index_fill_(2, index, 0)
        for number, layer in enumerate(states.layers):
            length = layer.keys.shape[2]
            step.states[number, 0, index, :, :length] = layer.keys
            step.states[number, 1, index, :, :length] = layer.values
        step.positions[index] = last + 1 + num_known
        self._num_drawn[index] = 0
        tokens = draw(logits, self._num_drawn[index], index, is_first=True)
        step.tokens[index] = tokens
        self._num_drawn[index] = 1
        return _Drawn(torch.zeros_like(step.tokens).index_copy_(0, index, tokens))

    def _known_states(self, batch: Sequence[Request]) -> tuple[int, Cache]:
        """Return how many positions of the prompts are computed already, and their states."""
        if batch[0].states is not None:
            return batch[0].states.get_seq_length(), batch[0].states
        if len(batch) > 1 and all(request.keys for request in batch):
            rows = [request.keys for request in batch]
            num_known, states = self._prefix.take(self._model, rows, batch[0].inputs_embeds)
            if states is not None:
                return num_known, states
        return 0, DynamicCache()

    @torch.inference_mode()
    def _draw_next(self, draw: _Draw, longest: int) -> _Drawn:
        """Draw one more token for every row."""
        self._step.run(longest)
        tokens = draw(self._step.logits, self._num_drawn, self._step.rows)
        self._step.advance(tokens)
        self._num_drawn += 1
        return _Drawn(tokens)

    def _note(
        self,
        requests: dict[int, Request],
        drawn: _Drawn,
        active: dict[int, Request],
        options: GenerationOptions,
        final_ids: set[int],
    ) -> Iterator[Request]:
        """Add the drawn tokens to the answers; yield those that have ended, and free their rows."""
        tokens = drawn.read()
        for row, request in requests.items():
            # It had ended before this token was drawn.
            if active.get(row) is not request:
                continue
            request.ids.append(tokens[row])
            is_last = tokens[row] in final_ids or len(request.ids) == options.max_new_tokens
            if request.has_ended(request.ids) or is_last:
                del active[row]
                if request.states is not None:
                    self._keep_states(row, request, request.states)
                yield request

    @torch.inference_mode()
    def _keep_states(self, row: int, request: Request, states: Cache) -> None:
        # The last token was drawn but never read, so it has no keys and values.
        end = request.length + len(request.ids) - 1
        for number, (keys, values) in enumerate(self._step.states[:, :, row : row + 1, :, request.length : end]):
            states.update(keys, values, number)


class DecoderPool:
    """Lends the decoders of one model, and keeps the last one, as building it takes memory and time."""

    def __init__(self, model: VideoLlamaForConditionalGeneration) -> None:
        self._model = model
        self.kept: list[StaticDecoder] = []
        self._logged: set[str] = set()

    def serves(self, options: GenerationOptions) -> bool:
        """Whether answers with these options come from a `StaticDecoder`; log why not if one is asked for."""
        wanted = options.static_cache
        if wanted is None:
            wanted = execution_device(self._model.get_input_embeddings()).type == "cuda"
        if not wanted or options.num_beams > 1:
            return False
        reason = why_not_static(self._model.language_model)
        if reason and options.static_cache and reason not in self._logged:
            self._logged.add(reason)
            logger.warning("static_cache has no effect on this language model: %s", reason)
        return not reason

    @contextlib.contextmanager
    def borrow(self, num_rows: int, longest_prompt: int, options: GenerationOptions) -> Iterator[StaticDecoder]:
        """Lend a decoder to one user, with room for prompts of this length and their answers."""
        length = longest_prompt + options.max_new_tokens
        # Taken out while it is lent, so that another thread builds its own decoder instead of sharing this one.
        kept, self.kept = self.kept, []
        # One that does not fit goes first: the new one may need its memory.
        fitting = [decoder for decoder in kept if decoder.fits(num_rows, length, options.compile)]
        kept.clear()
        with computing_on(execution_device(self._model.get_input_embeddings())):
            if fitting:
                decoder = fitting.pop()
            else:
                decoder = StaticDecoder(self._model.language_model, num_rows, length, options.compile)
            try:
                yield decoder
            except BaseException:
                # The error's traceback holds the decoder as long as anybody holds the error.
                decoder.free()
                raise
        # Not after an error, which may have left it in any state.
        self.kept = [decoder]


class _Drawn:
    """Tokens on their way to the CPU."""

    def __init__(self, tokens: Tensor) -> None:
        self._event = None
        self._tokens = tokens
        # Copy without waiting; the event tells later when the copy is complete.
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """Return one token a row."""
        if self._event is not None:
            self._event.synchronize()
        ids: list[int] = self._tokens.tolist()
        return ids


class _Draw:
    """Draws one token a row, as `generate` of transformers would; nothing of it waits for the device."""

    def __init__(self, options: GenerationOptions, defaults: GenerationConfig, logits: Tensor) -> None:
        self._options = options
        self._end_ids = torch.tensor(end_ids(defaults), dtype=torch.long, device=logits.device)
        top_k = next(number for number in (options.top_k, defaults.top_k, _DEFAULT_TOP_K) if number is not None)
        self._warpers: list[Any] = []
        if options.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(options.temperature))
            if top_k > 0:
                self._warpers.append(TopKLogitsWarper(top_k))
            if options.top_p < 1:
                self._warpers.append(TopPLogitsWarper(options.top_p))
        self._is_used: Tensor | None = None
        if options.repetition_penalty != 1:
            self._is_used = torch.zeros_like(logits, dtype=torch.bool)

    def __call__(self, logits: Tensor, num_drawn: Tensor, rows: Tensor, is_first: bool = False) -> Tensor:
        """Return tokens (rows,) from logits (rows, vocabulary), which are overwritten."""
        if self._is_used is not None:
            if is_first:
                self._is_used[rows] = False
            penalty = self._options.repetition_penalty
            # The penalty of transformers: logits of either sign move towards less likely.
            lower = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._is_used[rows], lower, logits)
        if len(self._end_ids):
            # Until the shortest allowed answer is reached, the tokens that end it get no probability.
            is_early = num_drawn < self._options.min_new_tokens
            logits[:, self._end_ids] = logits[:, self._end_ids].masked_fill(is_early[:, None], -torch.inf)
        if self._warpers:
            for warper in self._warpers:
                logits = warper(None, logits)
            tokens = torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
        else:
            tokens = logits.argmax(dim=-1)
        if self._is_used is not None:
            self._is_used[rows, tokens] = True
        return tokens


def end_ids(defaults: GenerationConfig) -> list[int]:
    """Return the ids that end a sequence."""
    ids = defaults.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or [])


def _weight_addresses(language_model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in language_model.parameters()]
