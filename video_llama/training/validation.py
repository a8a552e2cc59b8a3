"""Figures on a validation split: loss, token accuracy, generated answers compared with the expected ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from video_llama.constants import IGNORE_INDEX
from video_llama.data.batches import BadSample, DataCollator, SampleReader, SilentSample, gather_media
from video_llama.data.build import EncodedDataset
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.errors import DatasetError
from video_llama.inference.completion import generate_ids
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.features import FeatureFiller
from video_llama.training.learner import teaching_inputs
from video_llama.training.processes import sum_over_processes

__all__ = ["ValidationReport", "first_answer", "media_of_prompt", "rouge_l", "validate"]

MAX_ANSWER_TOKENS = 64


@dataclass
class ValidationReport:
    """Figures of one dataset's validation split.

    Args:
        loss: mean cross-entropy of answer tokens.
        token_accuracy: share of answer tokens that are the most likely ones, given those before them.
        num_samples, num_bad: samples that were used, and that could not be read.
        answers: `id`, `answer` and `expected` of generated first answers.
        exact_match, rouge_l: their means over the answers, from 0 to 1; None if none was generated.
    """

    loss: float
    token_accuracy: float
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
    note_bad: Callable[[Sequence[BadSample]], object],
    filler: FeatureFiller | None = None,
    stop_strings: Sequence[str] = (),
) -> ValidationReport:
    """Measure the model on one dataset, shared by all processes; the model is left in evaluation mode.

    Args:
        note_bad: called with this process's samples that cannot be used; they are left out.
        stop_strings: texts that end an answer.

    Raises:
        DatasetError: no sample can be read.
    """
    model.eval()
    inner = accelerator.unwrap_model(model)
    # All processes have to run sharded weights together. Others run alone: DDP's own forward would exchange buffers,
    # and wait for processes whose share of the split is smaller.
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    runner = model if is_sharded else inner
    reader = SampleReader(dataset.examples, dataset.encoder)
    # Loss, tokens, right tokens, samples, bad samples.
    sums = torch.zeros(5, dtype=torch.float64)
    answers: list[dict[str, str]] = []
    for indices in _shares(accelerator, len(dataset.examples), batch_size, max_batches):
        items = [reader[index] for index in indices]
        samples = [item for item in items if not isinstance(item, BadSample)]
        failures = [item for item in items if isinstance(item, BadSample) and not isinstance(item, SilentSample)]
        note_bad(failures)
        sums[4] += len(failures)
        # A process without a sample of its own computes with any other one if the weights are sharded.
        used = samples
        if not samples and is_sharded:
            used = _any_sample(reader)
        if not used:
            continue
        batch = DataCollator(tokenizer.pad_token_id)(used)
        if filler is not None:
            filler(batch.media)
        output = runner(**teaching_inputs(batch, inner.config, accelerator.device))
        if not samples:
            continue
        # The logits are those of the answer tokens only.
        labels = batch.text["labels"][:, 1:]
        expected = labels[labels != IGNORE_INDEX].to(accelerator.device)
        num_right = (output.logits.argmax(dim=-1) == expected).sum()
        loss, right = torch.stack([output.loss.double(), num_right.double()]).tolist()
        sums[:4] += torch.tensor([loss * len(expected), len(expected), right, len(samples)], dtype=torch.float64)
        if accelerator.is_main_process and not is_sharded:
            wanted = samples[: max(num_generations - len(answers), 0)]
            answers += [_answer(inner, sample, tokenizer, accelerator.device, stop_strings) for sample in wanted]
    loss, tokens, right, num_samples, num_bad = sum_over_processes(accelerator, sums.tolist())
    if not tokens:
        raise DatasetError(f"datasets.{dataset.name}: no sample of its validation split can be used")
    report = ValidationReport(loss / tokens, right / tokens, int(num_samples), int(num_bad), answers)
    if answers:
        pairs = [(line["answer"], line["expected"]) for line in answers]
        report.exact_match = sum(answer == expected for answer, expected in pairs) / len(pairs)
        report.rouge_l = sum(rouge_l(answer, expected) for answer, expected in pairs) / len(pairs)
    return report


def first_answer(sample: ProcessedSample) -> tuple[list[int], list[int]]:
    """Return the ids up to the first answer, and the ids of that answer."""
    is_answer = [label != IGNORE_INDEX for label in sample.labels]
    start = is_answer.index(True)
    # The first answer ends where labels are ignored again, or at the end of the sample.
    end = next((i for i in range(start, len(is_answer)) if not is_answer[i]), len(is_answer))
    return sample.input_ids[:start], sample.labels[start:end]


def media_of_prompt(prompt: Sequence[int], sample: ProcessedSample, config: VideoLlamaConfig) -> list[MediaInput]:
    """Return the media of a sample that its prompt has positions for; later ones belong to later questions."""
    visual = [item for item in sample.media if item.name == "pixel_values"]
    audio = [item for item in sample.media if item.name != "pixel_values"]
    # Each item takes a fixed number of placeholder ids, so counting the ids counts the items.
    num_visual = prompt.count(config.image_token_id) // config.num_video_query_tokens
    num_audio = prompt.count(config.audio_token_id) // config.num_audio_query_tokens
    return [*visual[:num_visual], *audio[:num_audio]]


def rouge_l(answer: str, expected: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, without regard to case."""
    words, others = answer.lower().split(), expected.lower().split()
    if not words or not others:
        return float(words == others)
    # The longest common subsequence of the words so far with each beginning of the others.
    lengths = [0] * (len(others) + 1)
    for word in words:
        before = list(lengths)
        for column, other in enumerate(others, start=1):
            lengths[column] = before[column - 1] + 1 if word == other else max(before[column], lengths[column - 1])
    return 2 * lengths[-1] / (len(words) + len(others))


def _shares(accelerator: Accelerator, total: int, batch_size: int, max_batches: int) -> Iterator[range]:
    """Yield the examples of this process's batches, in order; as many batches on every process."""
    step = batch_size * accelerator.num_processes
    # The last round may be incomplete. Every process still takes part, some with an empty range.
    for number in range(min(max_batches, -(-total // step))):
        first = number * step + accelerator.process_index * batch_size
        yield range(first, min(first + batch_size, total))


def _any_sample(reader: SampleReader) -> list[ProcessedSample]:
    """Return the first sample that can be read, or none."""
    items = (reader[index] for index in range(len(reader)))
    return list(itertools.islice((item for item in items if not isinstance(item, BadSample)), 1))


def _answer(
    model: VideoLlamaForConditionalGeneration,
    sample: ProcessedSample,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    stop_strings: Sequence[str],
) -> dict[str, str]:
    """Generate the first answer of a sample, and return it with the expected one."""
    prompt, expected = first_answer(sample)
    media = media_of_prompt(prompt, sample, model.config)
    inputs = {"input_ids": torch.tensor([prompt], device=device), **gather_media(media, device)}
    # Twice the length of the expected answer is enough to judge, and bounds the time of a bad one.
    options = GenerationOptions(max_new_tokens=min(2 * len(expected) + 8, MAX_ANSWER_TOKENS), min_new_tokens=0)
    [ids] = generate_ids(model, tokenizer, inputs, options, stop_strings)
    answer, wanted = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, expected))
    return {
        "id": sample.id,
        "answer": cut_at_stop(answer, stop_strings),
        "expected": cut_at_stop(wanted, stop_strings),
    }
