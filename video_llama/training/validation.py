"""Figures on a validation split: loss, token accuracy, generated answers compared with the expected ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from video_llama.constants import IGNORE_INDEX
from video_llama.data.batches import (
    BadSample,
    Batch,
    DataCollator,
    SampleReader,
    SilentSample,
    gather_media,
    load_samples,
)
from video_llama.data.build import EncodedDataset
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.data.tokenization import answer_spans
from video_llama.errors import DatasetError
from video_llama.evaluation.text_metrics import rouge_l
from video_llama.inference.completion import generate_ids, pad_prompts
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.features import FeatureFiller
from video_llama.training.learner import teaching_inputs
from video_llama.training.media_kinds import complete_media
from video_llama.training.processes import is_sharded, sum_over_processes

__all__ = ["ValidationReport", "first_answer", "media_of_prompt", "rouge_l", "validate"]

MAX_ANSWER_TOKENS = 64


@dataclass
class ValidationReport:
    """Figures of one dataset's validation split.

    Args:
        loss: mean cross-entropy of answer tokens.
        token_accuracy: share of answer tokens that are the most likely ones, given those before them.
        num_tokens: answer tokens.
        num_samples, num_bad: samples that were used, and that could not be read.
        answers: `id`, `answer` and `expected` of generated first answers.
        exact_match, rouge_l: their means over the answers, from 0 to 1; None if none was generated.
    """

    loss: float
    token_accuracy: float
    num_tokens: int
    num_samples: int
    num_bad: int
    answers: list[dict[str, str]] = field(default_factory=list)
    exact_match: float | None = None
    rouge_l: float | None = None


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: EncodedDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_batches: int,
    num_generations: int,
    num_workers: int,
    seed: int,
    note_bad: Callable[[Sequence[BadSample]], object],
    filler: FeatureFiller | None = None,
    stop_strings: Sequence[str] = (),
) -> ValidationReport:
    """Measure the model on one dataset, shared by all processes; the model is left in evaluation mode.

    Args:
        batch_size, max_batches: of each process.
        num_generations: answers to generate, by all processes together; none with sharded weights.
        num_workers: processes of each process that decode.
        seed: draws the samples, of a dataset with more than fit into these batches, and the prompts of captions.
        note_bad: called with this process's samples that cannot be used; they are left out.
        stop_strings: texts that end an answer.

    Raises:
        DatasetError: no sample can be read.
    """
    model.eval()
    inner = accelerator.unwrap_model(model)
    # All processes have to run sharded weights together. Others run alone: DDP's own forward would exchange buffers,
    # and wait for processes whose share of the split is smaller.
    sharded = is_sharded(accelerator)
    runner = model if sharded else inner
    reader = SampleReader(dataset.examples, dataset.encoder, seed)
    rounds = _shares(accelerator, len(reader), batch_size, max_batches, seed)
    # The answers are spread over the processes, too.
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    num_wanted = len(range(rank, num_generations, num_processes)) * (not sharded)
    # Loss, tokens, right tokens, samples, bad samples.
    sums = torch.zeros(5, dtype=torch.float64)
    answers: list[dict[str, str]] = []
    for read in _read(reader, rounds, num_workers):
        samples = [item for item in read if not isinstance(item, BadSample)]
        failures = [item for item in read if isinstance(item, BadSample) and not isinstance(item, SilentSample)]
        note_bad(failures)
        sums[4] += len(failures)
        # A process without a sample of its own computes with any other one if the weights are sharded.
        used = samples
        if not samples and sharded:
            used = _any_sample(reader)
        if not used:
            continue
        batch = DataCollator(tokenizer.pad_token_id)(used)
        if filler is not None:
            filler(batch.media)
        complete_media(accelerator, batch)
        output = runner(**teaching_inputs(batch, inner.config, accelerator.device))
        if not samples:
            continue
        sums[:4] += torch.tensor([*_sums_of_tokens(output, batch), len(samples)], dtype=torch.float64)
        wanted = samples[: num_wanted - len(answers)]
        if wanted:
            answers += _answer(inner, wanted, tokenizer, accelerator.device, stop_strings)
    loss, tokens, right, num_samples, num_bad = sum_over_processes(accelerator, sums.tolist())
    if not tokens:
        raise DatasetError(f"datasets.{dataset.name}: no sample of its validation split can be used")
    report = ValidationReport(loss / tokens, right / tokens, int(tokens), int(num_samples), int(num_bad))
    _add_answers(report, gather_object(answers))
    return report


def _add_answers(report: ValidationReport, answers: list[dict[str, str]]) -> None:
    report.answers = answers
    if answers:
        pairs = [(line["answer"], line["expected"]) for line in answers]
        report.exact_match = sum(answer == expected for answer, expected in pairs) / len(pairs)
        report.rouge_l = sum(rouge_l(answer, expected) for answer, expected in pairs) / len(pairs)


def _sums_of_tokens(output: Any, batch: Batch) -> tuple[float, int, float]:
    """Return the sum of the losses of all answer tokens, their number, and how many of them are the most likely."""
    # The logits are those of the answer tokens only.
    labels = batch.text["labels"][:, 1:]
    expected = labels[labels != IGNORE_INDEX].to(output.logits.device)
    num_right = (output.logits.argmax(dim=-1) == expected).sum()
    loss, right = torch.stack([output.loss.double(), num_right.double()]).tolist()
    return loss * len(expected), len(expected), right


def first_answer(sample: ProcessedSample) -> tuple[list[int], list[int]]:
    """Return the ids up to the first answer, and the ids of that answer."""
    span = answer_spans(sample.labels)[0]
    return sample.input_ids[: span.start], sample.labels[span.start : span.stop]


def media_of_prompt(prompt: Sequence[int], sample: ProcessedSample, config: VideoLlamaConfig) -> list[MediaInput]:
    """Return the media of a sample that its prompt has positions for; later ones belong to later questions."""
    visual = [item for item in sample.media if item.name == "pixel_values"]
    audio = [item for item in sample.media if item.name != "pixel_values"]
    # Each item takes a fixed number of placeholder ids, so counting the ids counts the items.
    num_visual = prompt.count(config.image_token_id) // config.num_video_query_tokens
    num_audio = prompt.count(config.audio_token_id) // config.num_audio_query_tokens
    return [*visual[:num_visual], *audio[:num_audio]]


def _shares(accelerator: Accelerator, total: int, batch_size: int, max_batches: int, seed: int) -> list[Sequence[int]]:
    """Return the examples of this process's batches, in order; as many batches on every process."""
    step = batch_size * accelerator.num_processes
    chosen: Sequence[int] = range(total)
    if total > max_batches * step:
        # The first of one drawn order: more processes or batches take more samples, and the same ones among them.
        drawn = np.random.default_rng(seed).permutation(total)[: max_batches * step]
        chosen = sorted(drawn.tolist())
    # The last round may be incomplete. Every process still takes part, some with fewer examples or none.
    rounds = (chosen[start : start + step] for start in range(0, len(chosen), step))
    return [indices[accelerator.process_index :: accelerator.num_processes] for indices in rounds]


def _read(
    reader: SampleReader, rounds: Sequence[Sequence[int]], num_workers: int
) -> Iterator[list[ProcessedSample | BadSample]]:
    """Yield the samples of each batch, which worker processes read ahead."""
    items = load_samples(reader, [index for indices in rounds for index in indices], num_workers)
    for indices in rounds:
        yield list(itertools.islice(items, len(indices)))


def _any_sample(reader: SampleReader) -> list[ProcessedSample]:
    """Return the first sample that can be read, or none."""
    items = (reader[index] for index in range(len(reader)))
    return list(itertools.islice((item for item in items if not isinstance(item, BadSample)), 1))


def _answer(
    model: VideoLlamaForConditionalGeneration,
    samples: Sequence[ProcessedSample],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    stop_strings: Sequence[str],
) -> list[dict[str, str]]:
    """Generate the first answers of samples, together, and return them with the expected ones."""
    pairs = [first_answer(sample) for sample in samples]
    media = [
        item
        for sample, (prompt, _) in zip(samples, pairs, strict=True)
        for item in media_of_prompt(prompt, sample, model.config)
    ]
    text = pad_prompts([prompt for prompt, _ in pairs], tokenizer.pad_token_id, device)
    # Twice the length of the expected answer is enough to judge, and bounds the time of a bad one.
    limits = [min(2 * len(expected) + 8, MAX_ANSWER_TOKENS) for _, expected in pairs]
    options = GenerationOptions(max_new_tokens=max(limits), min_new_tokens=0)
    rows = generate_ids(model, tokenizer, {**text, **gather_media(media, device)}, options, stop_strings)
    answers = []
    for sample, (_, expected), row, limit in zip(samples, pairs, rows, limits, strict=True):
        texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (row[:limit], expected))
        answer, wanted = (cut_at_stop(text, stop_strings) for text in texts)
        answers.append({"id": sample.id, "answer": answer, "expected": wanted})
    return answers
