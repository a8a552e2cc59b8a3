"""One decoding step of several rows in memory of a fixed size, captured as a CUDA graph on a GPU.

Launching the thousand small operations of one token takes the CPU longer than computing them takes a GPU; a graph
launches them all at once. On a CPU the same code runs without a graph.

Each row has its own length: the token at position p is in slot p, and a row attends to its own slots only. So there
is no padding between prompt and answer, and a row's answer does not depend on the other rows but for rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from video_llama.model.inputs import cache_argument
from video_llama.utils.devices import CAPTURING

__all__ = ["StaticStep", "round_up", "why_not_static"]

LENGTH_STEP = 64
"""Slots are allocated, and attended to, in multiples of this."""

# The rotations of these types depend on the longest row.
_VARYING_ROPE = {"dynamic", "longrope"}


def why_not_static(language_model: PreTrainedModel) -> str:
    """Return why `StaticDecoder` cannot run this language model; "" if it can."""
    if not isinstance(language_model, LlamaForCausalLM):
        return f"{type(language_model).__name__} is not a LLaMA model"
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
        return "its weights are not all on one device"
    return ""


def _why_not_captured(module: nn.Module) -> str:
    """Return what a module does besides computing with its weights: a graph would do it once, or fail."""
    kind = type(module)
    if kind.__name__ == "Linear8bitLt":
        return "its weights are quantized to 8 bit, and such a product waits for the GPU"
    if kind.__module__.partition(".")[0] == "peft":
        return "it has PEFT adapters, which can be switched (merge them first)"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # The hooks of transformers do nothing unless its outputs are asked for.
    if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
        return f"a {kind.__name__} in it has hooks"
    return ""


class StaticStep:
    """Memory for some rows of text, and the computation of the logits of their next tokens.

    Args:
        max_length: slots of a row, a multiple of `LENGTH_STEP`.
        compiled: fuse the operations between matrix products, which takes some seconds at the first step.

    Attributes:
        states: keys and values, (layers, 2, rows, heads, slots, head_dim).
        tokens, positions: the last token of each row and where it stands, (rows,), int64.
        logits: of the next tokens, (rows, vocabulary), float32; written by `run`.
    """

    def __init__(self, language_model: LlamaForCausalLM, num_rows: int, max_length: int, compiled: bool) -> None:
        decoder, config = language_model.model, language_model.config
        device, dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        self._model = language_model
        self._max_length = max_length
        self._cache_name = cache_argument(decoder.layers[0].forward)
        self._joined = [_join_products(layer) for layer in decoder.layers]
        self._run_layer = _compiled_layer if compiled else _run_layer
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(decoder.layers), 2, num_rows, config.num_key_value_heads, max_length, head_dim)
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.logits = torch.zeros(num_rows, config.vocab_size, dtype=torch.float32, device=device)
        self.rows = torch.arange(num_rows, device=device)
        self._slot_numbers = torch.arange(max_length, device=device)
        # By how many slots they attend to.
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

    def free(self) -> None:
        """Release all memory, even while the object is referenced; it cannot be used any more."""
        self.__dict__.clear()

    def run(self, longest: int) -> None:
        """Compute the logits after `tokens`; slots beyond those of the longest row are not attended to."""
        window = min(round_up(longest), self._max_length)
        if self.logits.device.type != "cuda":
            self._forward(window)
            return
        # A graph has a fixed size, so there is one for each window, captured when it is first needed.
        if window not in self._graphs:
            self._graphs[window] = self._capture(window)
        self._graphs[window].replay()

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row."""
        self.tokens.copy_(tokens)
        # Rows without a request are computed as well, and nobody reads them.
        self.positions.add_(1).clamp_(max=self._max_length - 1)

    def _forward(self, window: int) -> None:
        # Running this twice changes nothing, which capturing relies on.
        decoder = self._model.model
        hidden_states = decoder.embed_tokens(self.tokens)[:, None]  # (rows, 1, width)
        rotation = decoder.rotary_emb(hidden_states, position_ids=self.positions[:, None])
        # Slots after a row's position hold zeros or the keys of padding, so they are masked.
        is_later = self._slot_numbers[:window] > self.positions[:, None]
        mask = torch.zeros(is_later.shape, dtype=hidden_states.dtype, device=is_later.device)
        mask = mask.masked_fill_(is_later, -torch.inf)[:, None, None]  # (rows, 1, 1, window)
        for layer, joined, (keys, values) in zip(decoder.layers, self._joined, self.states, strict=True):
            slots = _Slots(keys, values, self.rows, self.positions, window)
            hidden_states = self._run_layer(layer, self._cache_name, joined, hidden_states, mask, rotation, slots)
        self.logits.copy_(self._model.lm_head(decoder.norm(hidden_states[:, 0])))

    def _capture(self, window: int) -> torch.cuda.CUDAGraph:
        device = self.logits.device
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        # A capture needs a stream of its own. It starts after earlier work, and later work waits for it.
        stream.wait_stream(torch.cuda.current_stream(device))
        with CAPTURING, torch.cuda.stream(stream):
            # Whatever is compiled, tuned or allocated at a first call.
            self._forward(window)
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._forward(window)
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph


class _Slots:
    """Cache for an attention layer: write one new token a row, and return all slots to attend to."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, window: int) -> None:
        self._keys, self._values, self._rows, self._positions, self._window = keys, values, rows, positions, window

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (rows, heads, 1, head_dim); return those of the first `window` slots."""
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
    """Run one decoder layer on one new token a row: (rows, 1, width) to the same.

    It has no state of its own, so one compilation serves all layers.

    Args:
        joined: see `_join_products`.
        mask: (rows, 1, 1, window), added to the scores.
        rotation: cosines and sines, (rows, 1, head_dim).
    """
    if joined is None:
        output: Tensor = layer(hidden_states, attention_mask=mask, position_embeddings=rotation, **{cache_name: slots})
        return output
    # What LlamaDecoderLayer computes, with joined products.
    attention, mlp = layer.self_attn, layer.mlp
    by_head = (*hidden_states.shape[:2], -1, attention.head_dim)
    products = F.linear(layer.input_layernorm(hidden_states), joined[0]).view(by_head).transpose(1, 2)
    # For each key head the joint product holds g query heads (the group size), one key head and one value head,
    # so queries are g of g + 2 parts.
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


_compiled_layer = torch.compile(_run_layer)


def _join_products(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Return one matrix for queries, keys and values, and one for gate and up: products of the same states.

    A GPU reads one large matrix faster than several small ones. The layer's weights become views of the matrices, so
    they take no memory of their own. None where something else than a plain product stands, such as an adapter.
    """
    attention, mlp = layer.self_attn, layer.mlp
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    if not all(_is_plain(part) for group in groups for part in group):
        return None
    return _join(groups[0]), _join(groups[1])


def _is_plain(part: nn.Module) -> bool:
    # Weights of other types than Parameter are quantized, or shards.
    if type(part) is not nn.Linear or part.bias is not None or type(part.weight) is not nn.Parameter:
        return False
    # A tensor made in inference mode cannot become a view outside of it.
    return not part.weight.is_inference()


def _join(parts: Sequence[nn.Linear]) -> Tensor:
    weights = [part.weight for part in parts]
    sizes = [len(weight) for weight in weights]
    storage = weights[0].untyped_storage()
    # The weights are joined already if they lie one after another and fill their storage.
    starts = itertools.accumulate((weight.nbytes for weight in weights[:-1]), initial=storage.data_ptr())
    if storage.nbytes() == sum(weight.nbytes for weight in weights) and all(
        weight.data_ptr() == start for weight, start in zip(weights, starts, strict=True)
    ):
        # Joined before, by another decoder.
        return weights[0].as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())
    # Make ordinary tensors: inference tensors could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([weight.data for weight in weights])
        for weight, rows in zip(weights, joined.split(sizes), strict=True):
            weight.data = rows
    return joined


def round_up(length: int) -> int:
    """Return the next multiple of `LENGTH_STEP`."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP
