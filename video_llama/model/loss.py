"""The loss on answer tokens, without the logits of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from video_llama.constants import IGNORE_INDEX

__all__ = ["cross_entropy", "forward_on_answers"]


def forward_on_answers(language_model: PreTrainedModel, labels: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
    """Run a causal language model, and its head only where the next token belongs to an answer.

    A third of a dialogue's tokens may be answers, and the head is the largest matrix of a small language model.

    Args:
        labels: (batch, length), int64, `IGNORE_INDEX` where no loss is taken; on the CPU or where the model is.
        inputs: for the language model.

    Returns:
        its output, with `logits` (answer tokens, vocabulary), batch by batch and in order, and `loss`, the mean
        cross-entropy over them.
    """
    # The logits at one position predict the token at the next.
    next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (batch * length,)
    positions = (next_labels != IGNORE_INDEX).nonzero()[:, 0]  # (answer tokens,)
    with _head_at(language_model.get_output_embeddings(), positions):
        output: CausalLMOutputWithPast = language_model(**inputs)
    assert output.logits is not None
    output.logits = output.logits[0]  # (answer tokens, vocabulary)
    output.loss = cross_entropy(output.logits, next_labels[positions].to(output.logits.device, non_blocking=True))
    return output


@contextlib.contextmanager
def _head_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Meanwhile, pass the head only the states at those positions of the flattened batch, as one sequence."""

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = arguments
        chosen = states.flatten(0, 1).index_select(0, positions.to(states.device, non_blocking=True))
        return (chosen[None], *others)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy in float32, keeping one tensor of the logits' size where torch's makes three.

    Args:
        logits: (tokens, vocabulary), float.
        labels: (tokens,), int64.

    Returns:
        (), float32; NaN for no tokens. It can be differentiated once, with one backward pass.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        log_shares = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_shares, labels)
        ctx.dtype = logits.dtype  # type: ignore[attr-defined]
        return -log_shares.gather(1, labels[:, None]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The gradient is the softmax, less one at the label.
        log_shares, labels = ctx.saved_tensors
        # In place: torch refuses a second backward pass.
        result = log_shares.exp_()
        result[torch.arange(len(labels), device=labels.device), labels] -= 1
        return result.mul_(gradient / len(labels)).to(ctx.dtype), None
