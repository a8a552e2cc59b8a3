"""Decode with keys and values in memory of a fixed size, so that a GPU never waits for Python.

Launching the thousand small operations of one token takes a GPU's host longer than computing them takes the GPU. Here
one step of all rows is captured as a CUDA graph and replayed, and rows that end give their place to the next prompt
(continuous batching, Yu et al., "Orca", 2022). On a CPU the same code runs without a graph.

Each row has its own length: the token at position p lies in slot p, and a row sees its own slots only. So there is no
padding between prompt and answer, and a row's answer does not depend on the rows beside it but for rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from video_llama.inference.cache import weights_version
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.shared_prefix import SharedPrefix
from video_llama.model.video_llama import cache_argument
from video_llama.utils.devices import CAPTURING

__all__ = ["Request", "StaticDecoder", "why_not_static"]

LENGTH_STEP = 64
"""Slots are given out, and attended to, in multiples of this."""

PREFILL_TOKENS = 4096
"""Prompt tokens that are read at once: enough to fill a GPU."""

_USUAL_TOP_K = 50  # where neither the caller nor the checkpoint says anything, as in transformers

_VARYING_ROPE = {"dynamic", "longrope"}  # their rotations depend on the longest row


@dataclass(eq=False)
class Request:
    """One prompt to be continued.

    Args:
        inputs_embeds: (1, length, width), the whole prompt.
        keys: what stands at each position, as in `Prompt`; the common beginning of prompts with keys is computed once.
        states: keys and values of the prompt's beginning, which is not computed again; extended in place by those of
            the rest of the prompt, and with `keeps_states` by those of the answer.
        keeps_states: whether `states` are wanted afterwards.
        ids: the answer so far, an end-of-sequence token included.
        has_ended: says after each token whether the answer ends there, besides at an end-of-sequence token.
    """

    inputs_embeds: Tensor
    keys: Sequence[Hashable] = ()
    states: Cache | None = None
    keeps_states: bool = False
    ids: list[int] = field(default_factory=list)
    has_ended: Callable[[list[int]], bool] = lambda ids: False

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.inputs_embeds.shape[1]


AnyRequest = TypeVar("AnyRequest", bound=Request)


def why_not_static(language_model: PreTrainedModel) -> str:
    """Why this language model cannot be driven by `StaticDecoder`; "" if it can."""
    if not isinstance(language_model, LlamaForCausalLM):
        return f"{type(language_model).__name__} is no LLaMA"
    if language_model.model.rotary_emb.rope_type in _VARYING_ROPE:
        return "its rotary embedding depends on the length of the text"
    if language_model.config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {language_model.config._attn_implementation!r} takes no mask of its own"
    if language_model.training:
        return "it is in training mode"
    for module in language_model.modules():
        if reason := _why_not_captured(module):
            return reason
    devices = {parameter.device for parameter in language_model.parameters()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in language_model.modules()):
        return "its weights do not lie on one device"
    return ""


def _why_not_captured(module: nn.Module) -> str:
    """What a module does besides computing with its weights: a graph would do it once, or fail."""
    kind = type(module)
    if kind.__name__ == "Linear8bitLt":
        return "its weights are quantised to 8 bit, and such a product waits for the GPU"
    if kind.__module__.partition(".")[0] == "peft":
        return "it has adapters of PEFT, which can be switched (merge them to have it)"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
        return f"a {kind.__name__} in it has hooks"  # those of transformers do nothing unless its outputs are asked for
    return ""


class _Slots:
    """What an attention layer takes for its cache: writes one new token a row, gives all that may be attended to."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, window: int) -> None:
        self._keys, self._values, self._rows, self._positions, self._window = keys, values, rows, positions, window

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, 1, head_dim) in; those of the first `window` slots out."""
        self._keys[self._rows, :, self._positions] = keys[:, :, 0]
        self._values[self._rows, :, self._positions] = values[:, :, 0]
        return self._keys[:, :, : self._window], self._values[:, :, : self._window]


def _run_layer(
    layer: Any,
    cache_name: str,
    joined: tuple[Tensor, Tensor] | None,
    hidden_states: Tensor,
    mask: Tensor,
    rotation: tuple[Tensor, Tensor],
    slots: _Slots,
) -> Tensor:
    """One decoder layer on one new token a row: (rows, 1, width) to the same.

    It has no state of its own, so one compilation serves all layers.

    Args:
        joined: see `_join_products`.
        mask: (rows, 1, 1, window), added to the scores.
        rotation: cosines and sines, (rows, 1, head_dim).
    """
    if joined is None:
        output: Tensor = layer(hidden_states, attention_mask=mask, position_embeddings=rotation, **{cache_name: slots})
        return output
    attention, mlp = layer.self_attn, layer.mlp
    by_head = (*hidden_states.shape[:2], -1, attention.head_dim)
    products = F.linear(layer.input_layernorm(hidden_states), joined[0]).view(by_head).transpose(1, 2)
    num_queries = products.shape[1] * attention.num_key_value_groups // (attention.num_key_value_groups + 2)
    num_keys = num_queries // attention.num_key_value_groups
    query, key, value = products.split([num_queries, num_keys, num_keys], dim=1)  # (rows, heads, 1, head_dim)
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    keys, values = (repeat_kv(part, attention.num_key_value_groups) for part in slots.update(key, value, 0))
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling)
    hidden_states = hidden_states + attention.o_proj(attended.transpose(1, 2).flatten(2))
    gate, up = F.linear(layer.post_attention_layernorm(hidden_states), joined[1]).chunk(2, dim=-1)
    hidden_states = hidden_states + mlp.down_proj(mlp.act_fn(gate) * up)
    return hidden_states


def _join_products(layer: Any) -> tuple[Tensor, Tensor] | None:
    """One matrix each for the products that a layer takes of the same states: queries, keys and values; gate and up.

    A GPU reads one large matrix faster than several small ones. The layer's weights become views of the matrices, so
    they take no memory of their own. None where something else than a plain product stands, such as an adapter.
    """
    attention, mlp = layer.self_attn, layer.mlp
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    if not all(_is_plain(part) for group in groups for part in group):
        return None
    return _join(groups[0]), _join(groups[1])


def _is_plain(part: nn.Module) -> bool:
    # What was made in inference mode cannot become a view outside of it.
    # Weights of other types than Parameter are quantised or shards.
    if type(part) is not nn.Linear or part.bias is not None or type(part.weight) is not nn.Parameter:
        return False
    return not part.weight.is_inference()


def _join(parts: Sequence[nn.Linear]) -> Tensor:
    weights = [part.weight for part in parts]
    sizes = [len(weight) for weight in weights]
    storage = weights[0].untyped_storage()
    starts = itertools.accumulate((weight.nbytes for weight in weights[:-1]), initial=storage.data_ptr())
    if storage.nbytes() == sum(weight.nbytes for weight in weights) and all(
        weight.data_ptr() == start for weight, start in zip(weights, starts, strict=True)
    ):
        return weights[0].as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())  # joined before
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([weight.data for weight in weights])
        for weight, rows in zip(weights, joined.split(sizes), strict=True):
            weight.data = rows
    return joined


_compiled_layer = torch.compile(_run_layer)


class StaticDecoder:
    """A language model with room for some rows of text.

    One thread uses it at a time.

    Args:
        language_model: one for which `why_not_static` has no reason; on the device where it is to run.
        num_rows: prompts that are continued together.
        max_length: tokens of prompt and answer that a row has room for; rounded up.
        compiled: fuse the operations between matrix products, which takes some seconds at the first step.
    """

    @torch.inference_mode()
    def __init__(
        self, language_model: LlamaForCausalLM, num_rows: int, max_length: int, compiled: bool = False
    ) -> None:
        decoder, config = language_model.model, language_model.config
        device, dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        self._model = language_model
        self._cache_name = cache_argument(decoder.layers[0].forward)
        self._compiled = compiled
        self._joined = [_join_products(layer) for layer in decoder.layers]
        self._run_layer = _compiled_layer if compiled else _run_layer
        self._weights = [parameter.data_ptr() for parameter in language_model.parameters()]
        self.num_rows, self.max_length = num_rows, _round_up(max_length)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(decoder.layers), 2, num_rows, config.num_key_value_heads, self.max_length, head_dim)
        self._states = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(num_rows, device=device)
        self._slot_numbers = torch.arange(self.max_length, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._num_drawn = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._logits = torch.zeros(num_rows, config.vocab_size, dtype=torch.float32, device=device)
        self._prefix, self._version = SharedPrefix(), 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by window
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def fits(self, num_rows: int, max_length: int, compiled: bool, weights: Sequence[int]) -> bool:
        """Whether it is what `StaticDecoder(model, num_rows, max_length, compiled)` would be, or not much larger.

        Args:
            weights: where the language model's parameters lie now; a captured graph knows only where they lay.
        """
        has_room = max_length <= self.max_length <= 2 * max(max_length, 1024)
        return has_room and (self.num_rows, self._compiled) == (num_rows, compiled) and self._weights == list(weights)

    def free(self) -> None:
        """Let go of all memory; the decoder is of no use any more."""
        self.__dict__.clear()

    def run(self, requests: Iterable[AnyRequest], options: GenerationOptions) -> Iterator[AnyRequest]:
        """Continue all requests; each comes out when its answer has ended, in any order.

        Further requests are taken when rows are free.

        Args:
            requests: each with `length + options.max_new_tokens` of at most `max_length`.
            options: how tokens are drawn; no beams.

        Raises:
            ValueError: a request is longer than there is room for.
        """
        supply = iter(requests)
        active: dict[int, AnyRequest] = {}  # by row
        new: list[AnyRequest] = []
        end_ids = set(_end_ids(self._model.generation_config))
        draw = _Draw(options, self._model.generation_config, self._logits)
        if self._version != (version := weights_version(self._model)):
            self._prefix, self._version = SharedPrefix(), version
        launched: tuple[dict[int, AnyRequest], _Drawn] | None = None
        while True:
            free = [row for row in range(self.num_rows) if row not in active]
            if len(free) >= max(1, self.num_rows // 8) or not active:
                new = list(itertools.islice(supply, len(free)))
                for rows, batch in self._group(new, free, options):
                    first = self._prefill(rows, batch, draw)
                    active |= zip(rows, batch, strict=True)
                    yield from self._note(dict(zip(rows, batch, strict=True)), first, active, options, end_ids)
            if not active:
                if not new:
                    return
                continue
            longest = max(request.length + len(request.ids) + 1 for request in active.values())
            before, launched = launched, (dict(active), self._step(draw, longest))
            if before is not None:  # while the device computes the step just launched
                yield from self._note(*before, active, options, end_ids)

    def _group(
        self, requests: list[AnyRequest], free: list[int], options: GenerationOptions
    ) -> Iterator[tuple[list[int], list[AnyRequest]]]:
        """Requests with the rows they get, together as far as they are to be read together."""
        rows, batch = iter(free), list[AnyRequest]()
        for request in sorted(requests, key=lambda request: request.length):
            if request.length + options.max_new_tokens > self.max_length:
                raise ValueError(
                    f"a prompt of {request.length} tokens and an answer of up to {options.max_new_tokens} do not fit "
                    f"into {self.max_length} slots"
                )
            is_full = (len(batch) + 1) * request.length > PREFILL_TOKENS
            if batch and (is_full or request.states is not None or batch[-1].states is not None):
                yield list(itertools.islice(rows, len(batch))), batch
                batch = []
            batch.append(request)
        if batch:
            yield list(itertools.islice(rows, len(batch))), batch

    @torch.inference_mode()
    def _prefill(self, rows: list[int], batch: Sequence[Request], draw: _Draw) -> _Drawn:
        """Read prompts into rows and draw the first token of each answer."""
        num_known, states = self._known_states(batch)
        new = [request.inputs_embeds[0, num_known:] for request in batch]
        # What pads a prompt stands behind it, where no token of the prompt looks.
        embeds = nn.utils.rnn.pad_sequence(new, batch_first=True)  # (prompts, longest, width)
        cache = {self._cache_name: states}
        output = self._model.model(inputs_embeds=embeds, use_cache=True, **cache)
        last = torch.tensor([len(row) - 1 for row in new], device=embeds.device)
        hidden_states = output.last_hidden_state[torch.arange(len(new), device=embeds.device), last]
        logits = self._model.lm_head(hidden_states).float()  # (prompts, vocabulary)
        index = torch.tensor(rows, device=embeds.device)
        self._states.index_fill_(2, index, 0)  # NaN of an earlier answer would come through the mask
        for number, layer in enumerate(states.layers):
            length = layer.keys.shape[2]
            self._states[number, 0, index, :, :length] = layer.keys
            self._states[number, 1, index, :, :length] = layer.values
        self._positions[index] = last + 1 + num_known
        self._num_drawn[index] = 0
        tokens = draw(logits, self._num_drawn[index], index, is_first=True)
        self._tokens[index] = tokens
        self._num_drawn[index] = 1
        everyone = torch.zeros_like(self._tokens).index_copy_(0, index, tokens)
        return _Drawn(everyone)

    def _known_states(self, batch: Sequence[Request]) -> tuple[int, Cache]:
        """How many positions of the prompts are known already, and their states."""
        if batch[0].states is not None:
            return batch[0].states.get_seq_length(), batch[0].states
        if len(batch) > 1 and all(request.keys for request in batch):
            num_known, states = self._prefix.take(self._model, batch)
            if states is not None:
                return num_known, states
        return 0, DynamicCache()

    @torch.inference_mode()
    def _step(self, draw: _Draw, longest: int) -> _Drawn:
        """Draw one more token for every row."""
        window = min(_round_up(longest), self.max_length)
        if self._logits.device.type == "cuda":
            if window not in self._graphs:
                self._graphs[window] = self._capture(window)
            self._graphs[window].replay()
        else:
            self._forward(window)
        tokens = draw(self._logits, self._num_drawn, self._rows)
        self._tokens.copy_(tokens)
        self._num_drawn += 1
        self._positions.add_(1).clamp_(max=self.max_length - 1)  # rows without a request go on, and are not looked at
        return _Drawn(tokens)

    def _forward(self, window: int) -> None:
        """From the last tokens to `_logits`; done twice, it changes nothing."""
        decoder = self._model.model
        hidden_states = decoder.embed_tokens(self._tokens)[:, None]  # (rows, 1, width)
        rotation = decoder.rotary_emb(hidden_states, position_ids=self._positions[:, None])
        is_later = self._slot_numbers[:window] > self._positions[:, None]
        mask = torch.zeros(is_later.shape, dtype=hidden_states.dtype, device=is_later.device)
        mask = mask.masked_fill_(is_later, -torch.inf)[:, None, None]  # (rows, 1, 1, window)
        for layer, joined, (keys, values) in zip(decoder.layers, self._joined, self._states, strict=True):
            slots = _Slots(keys, values, self._rows, self._positions, window)
            hidden_states = self._run_layer(layer, self._cache_name, joined, hidden_states, mask, rotation, slots)
        self._logits.copy_(self._model.lm_head(decoder.norm(hidden_states[:, 0])))

    def _capture(self, window: int) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._logits.device)
        stream.wait_stream(torch.cuda.current_stream(self._logits.device))
        with CAPTURING, torch.cuda.stream(stream):
            self._forward(window)  # whatever is compiled, tuned or allocated at a first call
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._forward(window)
        torch.cuda.current_stream(self._logits.device).wait_stream(stream)
        return graph

    def _note(
        self,
        requests: dict[int, AnyRequest],
        drawn: _Drawn,
        active: dict[int, AnyRequest],
        options: GenerationOptions,
        end_ids: set[int],
    ) -> Iterator[AnyRequest]:
        """Add the drawn tokens to the answers; those that have ended come out and free their rows."""
        tokens = drawn.read()
        for row, request in requests.items():
            if active.get(row) is not request:  # it had ended when this token was drawn
                continue
            request.ids.append(tokens[row])
            is_last = tokens[row] in end_ids or len(request.ids) == options.max_new_tokens
            if request.has_ended(request.ids) or is_last:
                del active[row]
                if request.keeps_states and request.states is not None:
                    self._keep_states(row, request)
                yield request

    @torch.inference_mode()
    def _keep_states(self, row: int, request: Request) -> None:
        """Add the answer's keys and values to the request's; its last token was drawn but never read."""
        assert request.states is not None
        end = request.length + len(request.ids) - 1
        for number, (keys, values) in enumerate(self._states[:, :, row : row + 1, :, request.length : end]):
            request.states.update(keys, values, number)


class _Drawn:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._event = None
        self._tokens = tokens
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """One token a row."""
        if self._event is not None:
            self._event.synchronize()
        ids: list[int] = self._tokens.tolist()
        return ids


class _Draw:
    """Draws one token a row, as transformers' `generate` would; nothing of it waits for the device."""

    def __init__(self, options: GenerationOptions, defaults: GenerationConfig, logits: Tensor) -> None:
        self._options = options
        self._end_ids = torch.tensor(_end_ids(defaults), dtype=torch.long, device=logits.device)
        top_k = next(number for number in (options.top_k, defaults.top_k, _USUAL_TOP_K) if number is not None)
        self._warpers: list[Any] = []
        if options.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(options.temperature))
            if top_k > 0:
                self._warpers.append(TopKLogitsWarper(top_k))
            if options.top_p < 1:
                self._warpers.append(TopPLogitsWarper(options.top_p))
        self._is_used = torch.zeros_like(logits, dtype=torch.bool) if options.repetition_penalty != 1 else None

    def __call__(self, logits: Tensor, num_drawn: Tensor, rows: Tensor, is_first: bool = False) -> Tensor:
        """Tokens (rows,) from logits (rows, vocabulary), which are overwritten."""
        if self._is_used is not None:
            if is_first:
                self._is_used[rows] = False
            penalty = self._options.repetition_penalty
            lower = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._is_used[rows], lower, logits)
        if len(self._end_ids):
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


def _end_ids(defaults: GenerationConfig) -> list[int]:
    ids = defaults.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or [])


def _round_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
