"""Run frozen encoders on many items: in chunks, or as CUDA graphs, so that a GPU never waits for Python.

Launching the small operations of ViT-g and Q-Former takes a GPU's host longer than computing them for a few frames
takes the GPU. So one pass over a fixed number of frames is captured as a graph when it is first wanted, and replayed
from then on. Many frames keep the GPU busy without. Whatever cannot be captured safely runs in chunks: see
`EncoderGraphs.run`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from video_llama.utils.devices import CAPTURING, is_out_of_memory

__all__ = ["CHUNK_SIZE", "MOST", "RECORDERS", "ChunkSize", "EncoderGraphs", "encode_in_chunks", "split"]

logger = logging.getLogger(__name__)

ChunkSize = int | Literal["auto"] | None
"""Frames or segments that an encoder takes at once: a number, what suits its device, or (None) all."""
CHUNK_SIZE = 32
"""What suits a CPU, and twice as many a GPU; more need more memory and gain nothing."""

SIZES = {8: 3, 1: 1}
"""Frames or segments of a graph, and from how many on one takes less time, zeros added, than smaller ones together."""
MOST = 15
"""So many are encoded by graphs; more keep a GPU busy while its host launches the next operations."""

_PLAIN = {"torch", "timm", "transformers", "video_llama"}
"""Packages whose modules have no switches of their own, as PEFT's adapters have."""

_Encode = Callable[[Tensor], Tensor]


def encode_in_chunks(encode: _Encode, items: Tensor, chunk_size: ChunkSize) -> Tensor:
    """Return `encode(items)`, with the memory of one chunk however many items there are.

    Args:
        encode: maps (items, ...) to (items, ...), each item by itself.
        items: (items, ...), on the encoder's device.
        chunk_size: None for all at once, which sharded weights need: all processes must run an encoder equally often.
    """
    if chunk_size == "auto":
        chunk_size = 2 * CHUNK_SIZE if items.is_cuda else CHUNK_SIZE
    if chunk_size is None or len(items) <= chunk_size:
        return encode(items)
    return torch.cat([encode(part) for part in items.split(chunk_size)])


class CUDARecorder:
    """Records passes over a fixed number of items as CUDA graphs; they share memory, for only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def record(self, encode: _Encode, values: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Return what runs `encode` again on the present content of `values`, and the tensor that holds its result."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with CAPTURING, torch.cuda.stream(stream):
            # The first call may compile, tune or allocate.
            encode(values)
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = encode(values)
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, output

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Enter where recorded passes may run and their results be read, after those of other threads."""
        with torch.cuda.device(self._device):
            # All graphs use the same memory, so a pass waits for the one before it, also across streams.
            torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done.record()


RECORDERS = {"cuda": CUDARecorder}
"""By type of device."""


def split(number: int) -> list[int]:
    """Return the sizes of the graphs that together take that many items; the last may have room left.

    >>> split(2), split(5), split(9), split(15)
    ([1, 1], [8], [8, 1], [8, 8])
    """
    sizes = []
    for size, least in SIZES.items():
        # The larger size comes first. It is used as long as it saves time, even with room left in it.
        while number >= least:
            sizes.append(size)
            number -= size
    return sizes


@dataclass(frozen=True)
class _Pass:
    """An encoder on a fixed number of items: fill `values`, replay, read `output`."""

    values: Tensor
    replay: Callable[[], None]
    output: Tensor


class EncoderGraphs:
    """The graphs of one encoder, made as they are wanted. Any thread may use it.

    A result depends on the item and on how many go through together, not on what these are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes: dict[tuple[int, torch.Size, torch.dtype], _Pass] = {}
        # Of the weights that the passes compute with.
        self._places: list[int] = []
        self._recorder: CUDARecorder | None = None
        self._fit = True

    def __reduce__(self) -> tuple[type[EncoderGraphs], tuple[()]]:
        """Copy and pickle without graphs: a copy of a model makes its own."""
        return EncoderGraphs, ()

    def run(
        self,
        encode: _Encode,
        items: Tensor,
        chunk_size: ChunkSize,
        *weights: nn.Module | nn.Parameter,
        prepare: _Encode = lambda part: part,
    ) -> Tensor:
        """Return `encode(prepare(items))`, computed in parts.

        Graphs are used on a GPU, for few items, with the chunk size "auto" and without gradients; unless the encoder
        is in training mode, computes under autocast, is offloaded, sharded or quantized, has hooks or adapters, or is
        being compiled or captured itself. If the graphs do not fit into the device's memory, a warning says so once.

        Args:
            encode: maps (items, ...) to (items, ...), each item by itself and without waiting for the device.
            items: (items, ...), on the encoder's device.
            chunk_size: see `encode_in_chunks`.
            weights: all that `encode` computes with. Graphs hold their addresses: if one has moved, they are captured
                anew.
            prepare: brings a part to the dtype in which it is encoded.
        """
        if chunk_size == "auto" and 0 < len(items) <= MOST and _may_capture(items):
            # The passes of an encoder share their input tensors, so one thread at a time fills and reads them.
            with self._lock:
                result = self._run(encode, items, weights, prepare)
            if result is not None:
                return result
        return encode_in_chunks(lambda part: encode(prepare(part)), items, chunk_size)

    def _run(
        self, encode: _Encode, items: Tensor, weights: tuple[nn.Module | nn.Parameter, ...], prepare: _Encode
    ) -> Tensor | None:
        """Return the result, or None where no graph can be used."""
        places = _find_places(weights)
        if places is None:
            return None
        # A weight has moved: what was captured would compute with freed memory.
        if places != self._places:
            self._passes, self._places, self._recorder, self._fit = {}, places, None, True
        if not self._fit:
            return None
        self._recorder = self._recorder or RECORDERS[items.device.type](items.device)
        results: list[Tensor] = []
        start = 0
        with self._recorder.in_turn():
            for size in split(len(items)):
                part = prepare(items[start : start + size])
                captured = self._find_pass(self._recorder, encode, part, size)
                if captured is None:
                    return None
                # The last part may be shorter than its graph: zeros fill the rest.
                captured.values[: len(part)].copy_(part)
                captured.values[len(part) :].zero_()
                captured.replay()
                results.append(captured.output[: len(part)].clone())
                start += size
        return torch.cat(results)

    def _find_pass(self, recorder: CUDARecorder, encode: _Encode, part: Tensor, size: int) -> _Pass | None:
        """Return the pass for parts of a size, recorded if it is not there yet; None if there is no memory for it."""
        key = (size, part.shape[1:], part.dtype)
        if key in self._passes:
            return self._passes[key]
        try:
            # Ordinary tensors, which callers in inference mode and others can fill.
            with torch.inference_mode(False), torch.no_grad():
                values = part.new_zeros(size, *part.shape[1:])
                self._passes[key] = _Pass(values, *recorder.record(encode, values))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Free the other graphs as well, and do not try again until the weights move.
            self._passes.clear()
            self._fit = False
            logger.warning(
                "%s has no memory for the CUDA graphs of an encoder, which runs without: slower where few frames or "
                "segments are encoded at a time",
                part.device,
            )
            return None
        return self._passes[key]


def _may_capture(items: Tensor) -> bool:
    """Whether a computation with these items may be captured now, whatever the encoder."""
    kind = items.device.type
    if kind not in RECORDERS or type(items) is not Tensor or torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
        return False
    return not torch.compiler.is_compiling() and not (items.is_cuda and torch.cuda.is_current_stream_capturing())


def _find_places(weights: tuple[nn.Module | nn.Parameter, ...]) -> list[int] | None:
    """Return the addresses of all weights and buffers; None if a module does more than compute with them.

    One walk, because it is done before every pass.
    """
    places = [weight.data_ptr() for weight in weights if isinstance(weight, nn.Parameter)]
    modules = [module for module in weights if isinstance(module, nn.Module)]
    kinds: set[type] = set()
    # The list grows on the way, child by child: a breadth-first walk.
    for module in modules:
        state = module.__dict__
        if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return None
        # accelerate replaces `forward` to bring offloaded weights in.
        if "forward" in state or module._compiled_call_impl is not None:
            return None
        kinds.add(type(module))
        for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
            if tensor is not None:
                kinds.add(type(tensor))
                places.append(tensor.data_ptr())
        if state["_modules"]:
            modules += [child for child in state["_modules"].values() if child is not None]
    kinds -= {nn.Parameter, Tensor}
    # Quantized weights and shards of weights have types of their own.
    if any(issubclass(kind, Tensor) or kind.__module__.partition(".")[0] not in _PLAIN for kind in kinds):
        return None
    return places
