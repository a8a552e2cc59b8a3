"""How good the model is on a validation split: loss, token accuracy, generated answers against the expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from video_llama.constants import IGNORE_INDEX
from video_llama.data.batches import BadSample, Batch, DataCollator, SampleReader, gather_media
from video_llama.data.build import EncodedDataset
from video_llama.data.sample_processor import MediaInput, ProcessedSample
from video_llama.errors import DatasetError
from video_llama.model.configuration import VideoLlamaConfig
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
        num_samples, num_bad: used, and left out because they cannot be read.
        answers: `id`, `answer` and `expected` of generated first answers.
        exact_match, rouge_l: of those, means from 0 to 1; None if none was generated.
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
) -> ValidationReport:
    """Measure the model on one dataset, shared by all processes; the model is left in evaluation mode.

    Args:
        note_bad: is given this process's samples that cannot be used; they are left out.

    Raises:
        DatasetError: no sample can be read.
    """
    model.eval()
    # DDP's own forward would exchange buffers, and wait for processes whose share of the split is smaller.
    is_alone = _runs_alone(accelerator)
    inner = accelerator.unwrap_model(model)
    runner, config = inner if is_alone else model, inner.config
    sums = [0.0, 0.0, 0.0, 0.0, 0.0]  # loss, tokens, right tokens, samples, bad samples
    answers: list[dict[str, str]] = []
    for batch, samples, failures in _batches(accelerator, dataset, tokenizer, batch_size, max_batches):
        note_bad(failures)
        sums[4] += len(failures)
        is_own = batch is not None
        if batch is None and not is_alone:
            batch = _stand_in(dataset, tokenizer)  # sharded weights are put together by all processes or none
        if batch is None:
            continue
        if filler is not None:
            filler(batch.media)
        output = runner(**teaching_inputs(batch, config, accelerator.device))
        if not is_own:
            continue
        labels = batch.text["labels"][:, 1:]
        expected = labels[labels != IGNORE_INDEX].to(accelerator.device)
        is_right = output.logits.argmax(dim=-1) == expected
        loss, right = torch.stack([output.loss.double(), is_right.sum().double()]).tolist()
        tokens = float(len(expected))
        found = [loss * tokens, tokens, right, len(samples), 0]
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        if accelerator.is_main_process and is_alone:
            wanted = samples[: max(num_generations - len(answers), 0)]
            answers += [_answer(runner, sample, tokenizer, accelerator.device) for sample in wanted]
    loss, tokens, right, num_samples, num_bad = sum_over_processes(accelerator, sums)
    if not tokens:
        raise DatasetError(f"datasets.{dataset.name}: no sample of its validation split can be used")
    pairs = [(line["answer"], line["expected"]) for line in answers]
    return ValidationReport(
        loss / tokens,
        right / tokens,
        int(num_samples),
        int(num_bad),
        answers,
        exact_match=sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        rouge_l=sum(rouge_l(a, b) for a, b in pairs) / len(pairs) if pairs else None,
    )


def first_answer(sample: ProcessedSample) -> tuple[list[int], list[int]]:
    """(ids up to the first answer, ids of that answer)."""
    start = next(i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX)
    rest = sample.labels[start:]
    end = next((i for i, label in enumerate(rest) if label == IGNORE_INDEX), len(rest))
    return sample.input_ids[:start], rest[:end]


def media_of_prompt(prompt: Sequence[int], sample: ProcessedSample, config: VideoLlamaConfig) -> list[MediaInput]:
    """The media of a sample that its prompt has positions for; later ones belong to later questions."""
    visuals = [item for item in sample.media if item.name == "pixel_values"]
    sounds = [item for item in sample.media if item.name != "pixel_values"]
    num_visuals = prompt.count(config.image_token_id) // config.num_video_query_tokens
    num_sounds = prompt.count(config.audio_token_id) // config.num_audio_query_tokens
    return [*visuals[:num_visuals], *sounds[:num_sounds]]


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, without regard to case."""
    a, b = answer.lower().split(), expected.lower().split()
    if not a or not b:
        return float(a == b)
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(a) + len(b))


def _batches(
    accelerator: Accelerator,
    dataset: EncodedDataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_batches: int,
) -> Iterator[tuple[Batch | None, Sequence[ProcessedSample], list[BadSample]]]:
    """This process's share of the examples, in order; as many batches on every process."""
    step = batch_size * accelerator.num_processes
    total = len(dataset.examples)
    for number in range(min(max_batches, -(-total // step))):
        first = number * step + accelerator.process_index * batch_size
        samples, failures = _encode_all(dataset, range(first, min(first + batch_size, total)))
        batch = DataCollator(tokenizer.pad_token_id)(samples, number) if samples else None
        yield batch, samples, failures


def _encode_all(dataset: EncodedDataset, indices: range) -> tuple[list[ProcessedSample], list[BadSample]]:
    reader = SampleReader(dataset.examples, dataset.encoder)
    items = [reader[index] for index in indices]
    failures = [item for item in items if isinstance(item, BadSample)]
    return [item for item in items if not isinstance(item, BadSample)], failures


def _stand_in(dataset: EncodedDataset, tokenizer: PreTrainedTokenizerBase) -> Batch | None:
    """A batch of one sample, for a process without a share of its own; None if no sample can be read."""
    for index in range(len(dataset.examples)):
        samples, _ = _encode_all(dataset, range(index, index + 1))
        if samples:
            return DataCollator(tokenizer.pad_token_id)(samples)
    return None


def _runs_alone(accelerator: Accelerator) -> bool:
    """Whether one process can run the model alone: not if its weights are shared out."""
    return accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _answer(
    model: Any, sample: ProcessedSample, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, str]:
    prompt, expected = first_answer(sample)
    media = media_of_prompt(prompt, sample, model.config)
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([prompt]), **gather_media(media)}
    ids = model.generate(
        **{name: tensor.to(device) for name, tensor in inputs.items()},
        do_sample=False,
        max_new_tokens=min(2 * len(expected) + 8, MAX_ANSWER_TOKENS),
        pad_token_id=tokenizer.pad_token_id,
    )[0].tolist()

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    return {"id": sample.id, "answer": decode(ids), "expected": decode(expected)}
