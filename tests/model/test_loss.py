"""The loss on answer tokens alone: the same number and the same gradients as from all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from tests.helpers.tiny_model import make_tiny_config, prompt_ids
from video_llama.constants import IGNORE_INDEX
from video_llama.model.loss import cross_entropy, forward_on_answers
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration


def padded_batch(model: VideoLlamaForConditionalGeneration) -> dict[str, Tensor]:
    """Two dialogues of unequal length, with several answers and a label on the very first token."""
    long, short = prompt_ids(model.config, 1, "video", 7, 8, 9, 10, 11), prompt_ids(model.config, 1, "video", 5)
    padding = len(long) - len(short)
    ids = torch.tensor([long, short + [0] * padding])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 0], labels[0, [-5, -2, -1]], labels[1, 6] = 1, torch.tensor([7, 10, 11]), 5
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def test_answers_alone_give_the_loss_and_the_gradients_of_all_logits(
    tiny_model: VideoLlamaForConditionalGeneration,
) -> None:
    batch = padded_batch(tiny_model)
    frames = torch.randn(2, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    results = []
    for answers_only in (False, True):
        tiny_model.zero_grad()
        output = tiny_model(**batch, pixel_values=frames, answers_only=answers_only)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in tiny_model.named_parameters() if p.grad is not None}))
    (whole, gradients), (answers, others) = results
    torch.testing.assert_close(answers.loss, whole.loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    taught = batch["labels"][:, 1:] != IGNORE_INDEX
    torch.testing.assert_close(answers.logits, whole.logits[:, :-1][taught])
    assert answers.logits.shape == (4, tiny_model.config.text_config.vocab_size)


def test_what_a_language_model_does_to_its_logits_is_done_to_those_of_answers() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.05)).eval()
    ids = torch.randint(3, 50, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 4, IGNORE_INDEX)
    output = forward_on_answers(model, labels, input_ids=ids)
    torch.testing.assert_close(output.loss, model(input_ids=ids, labels=labels).loss)
    assert output.logits.abs().max() < 0.05


def test_a_failing_step_leaves_the_head_as_it_was(tiny_model: VideoLlamaForConditionalGeneration) -> None:
    batch = padded_batch(tiny_model)
    embeds = torch.zeros(*batch["input_ids"].shape, tiny_model.config.text_config.hidden_size)
    with pytest.raises(RuntimeError):
        forward_on_answers(tiny_model.language_model, batch["labels"], inputs_embeds=embeds[..., 1:])
    logits = tiny_model(inputs_embeds=embeds).logits
    assert logits.shape == (*embeds.shape[:2], tiny_model.config.text_config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 50, generator=generator) * 20).to(dtype)
    labels = torch.randint(50, (7,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = cross_entropy(ours, labels), F.cross_entropy(theirs.float(), labels)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype is torch.float32
    (loss * 3).backward()
    (expected * 3).backward()
    assert ours.grad is not None
    assert ours.grad.dtype is dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_going_back_twice_is_refused_rather_than_wrong() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_answers_give_no_number_as_elsewhere() -> None:
    model = VideoLlamaForConditionalGeneration(make_tiny_config())
    ids = torch.arange(3, 12)[None]
    assert model(input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), answers_only=True).loss.isnan()
