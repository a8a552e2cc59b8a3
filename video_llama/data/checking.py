"""Look through the datasets of a configuration before a run does: what is missing, broken, too long, and how the
samples look to the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from video_llama.config import Config
from video_llama.constants import IGNORE_INDEX, Modality
from video_llama.data.batches import PREFETCHED_BATCHES, BadSample
from video_llama.data.build import EncodedDataset, build_datasets
from video_llama.data.examples import Example, MediaSource, media_sources
from video_llama.data.mixture import mixture_weights
from video_llama.data.sample_processor import MediaInput, ProcessedSample, SampleProcessor
from video_llama.errors import DatasetError, MediaError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["DatasetCheck", "SampleCheck", "check_datasets", "describe_tokens", "share_of_bad_samples"]

Outcome = Literal["good", "absent", "undecodable", "malformed", "masked"]
OUTCOMES: dict[Outcome, str] = {
    "absent": "a file is not there",
    "undecodable": "a file cannot be decoded",
    "malformed": "the annotation has another form, or holds no answer",
    "masked": "max_txt_len leaves no answer, or cuts a media position off",
}
Advance = Callable[[int], object]

_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class SampleCheck:
    """What became of one sample.

    Args:
        id: of the example.
        outcome: "good", or what is wrong with it.
        reason: the error's words.
        num_text_tokens: of the whole text, media not counted.
        is_cut: `max_txt_len` cut its end off.
    """

    id: str
    outcome: Outcome
    reason: str = ""
    num_text_tokens: int = 0
    is_cut: bool = False


@dataclass
class DatasetCheck:
    """What was found in one dataset.

    Args:
        name: as the configuration has it.
        num_examples: in its annotations.
        num_decoded: how many of them were read to the end.
        bad: all that cannot be used, with the reasons.
        num_cut: of those decoded, how many are longer than `max_txt_len`.
        longest: text tokens of the longest one.
        samples: some to look at.
    """

    name: str
    num_examples: int
    num_decoded: int = 0
    bad: list[SampleCheck] = field(default_factory=list)
    num_cut: int = 0
    longest: int = 0
    samples: list[ProcessedSample] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """How many samples are bad in this way."""
        return sum(check.outcome == outcome for check in self.bad)

    @property
    def share_of_bad(self) -> float:
        """Of all examples; where only some were decoded, those stand for the others that are there."""
        absent = self.count("absent")
        among_decoded = (len(self.bad) - absent) / max(self.num_decoded, 1)
        return (absent + (self.num_examples - absent) * among_decoded) / self.num_examples

    def failures(self) -> list[BadSample]:
        """The bad samples as a run would report them."""
        return [BadSample(check.id, f"{OUTCOMES[check.outcome]}: {check.reason}") for check in self.bad]


@dataclass(frozen=True)
class _OnceReader(SampleProcessor):
    """Reads each file of an example once, however often the example is encoded."""

    remembered: dict[tuple[Modality, MediaSource], MediaInput] = field(default_factory=dict)

    def read(self, kind: Modality, source: MediaSource) -> MediaInput:
        if (kind, source) not in self.remembered:
            self.remembered[kind, source] = super().read(kind, source)
        return self.remembered[kind, source]


class _Checks(Dataset[SampleCheck]):
    """The examples of a dataset, checked when they are asked for: worker processes do so."""

    def __init__(self, dataset: EncodedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset.examples)

    def __getitem__(self, index: int) -> SampleCheck:
        return check_sample(self._dataset.encoder, self._dataset.examples[index])


def check_sample(encoder: SampleProcessor, example: Example) -> SampleCheck:
    """Encode one example as training does, and without a limit to its text."""
    text = dataclasses.replace(encoder.text, prompts=encoder.text.prompts[:1])
    limited = _OnceReader(**{**vars(encoder), "text": text})
    unlimited = dataclasses.replace(limited, text=dataclasses.replace(text, max_txt_len=_UNLIMITED))
    try:
        whole = unlimited(example)
    except MediaError as error:
        return SampleCheck(example.id, "undecodable", str(error))
    except DatasetError as error:
        return SampleCheck(example.id, "malformed", str(error))
    media_ids = set(text.placeholder_ids.values())
    length = sum(token not in media_ids for token in whole.input_ids)
    try:
        sample = limited(example)
    except DatasetError as error:
        return SampleCheck(example.id, "masked", str(error), length, is_cut=True)
    return SampleCheck(example.id, "good", "", length, len(sample.input_ids) < len(whole.input_ids))


def check_datasets(
    config: Config,
    processor: VideoLlamaProcessor,
    *,
    training: bool = True,
    num_decoded: int | None = None,
    num_shown: int = 0,
    num_workers: int = 0,
    start: Callable[[str, int], Advance] = lambda task, total: lambda number: None,
) -> Iterator[DatasetCheck]:
    """Check one dataset of a configuration after the other.

    Args:
        config: the whole configuration.
        processor: of the model, as `build_model_processor` makes it.
        training: True checks the training splits, False the validation splits.
        num_decoded: most samples of each dataset to read, drawn from `run.seed`; all by default. Whether files are
            there is seen for all.
        num_shown: good samples to keep.
        num_workers: processes that read.
        start: called with what is done next and of how many; what it returns is called as they are done.

    Raises:
        ConfigError, DatasetError: as `build_datasets`.
    """
    model = config.model
    as_sound = model.equip_audio_branch and not model.frozen_audio_Qformer
    for dataset in build_datasets(config, processor, training=training, images_as_audio=as_sound):
        examples = dataset.examples
        check = DatasetCheck(dataset.name, len(examples))
        absent = _find_absent(examples, start(f"{dataset.name}: files", len(examples)))
        check.bad = list(absent.values())
        order = np.random.default_rng(config.run.seed).permutation(len(examples)).tolist()
        chosen = [index for index in order if index not in absent][:num_decoded]
        advance = start(f"{dataset.name}: samples", len(chosen))
        torch.manual_seed(config.run.seed)
        good = []
        for index, sample in zip(chosen, _run(dataset, chosen, num_workers), strict=True):
            check.num_decoded += 1
            check.num_cut += sample.is_cut
            check.longest = max(check.longest, sample.num_text_tokens)
            if sample.outcome == "good":
                good.append(index)
            else:
                check.bad.append(sample)
            advance(1)
        check.samples = [dataset.encoder(examples[index]) for index in good[:num_shown]]
        yield check


def share_of_bad_samples(config: Config, checks: Sequence[DatasetCheck]) -> float:
    """The share of bad samples that a run would meet, as it mixes the datasets.

    Raises:
        ConfigError: sample ratios that make no sense.
    """
    names = [check.name for check in checks]
    ratios = [config.datasets[name].sample_ratio for name in names]
    shares = mixture_weights([check.num_examples for check in checks], ratios, names)
    return sum(share * check.share_of_bad for share, check in zip(shares, checks, strict=True))


def describe_tokens(sample: ProcessedSample, tokenizer: PreTrainedTokenizerBase, media: dict[int, str]) -> str:
    """A sample's text, with what is learnt in ⟦ ⟧ and media as `<frames x 32>`.

    Args:
        sample: as the encoder made it.
        tokenizer: of the language model.
        media: what the ids that mark media stand for.
    """
    return "".join(_describe_runs(sample, tokenizer, media))


def _describe_runs(sample: ProcessedSample, tokenizer: PreTrainedTokenizerBase, media: dict[int, str]) -> Iterator[str]:
    marks = [
        media.get(token, label != IGNORE_INDEX) for token, label in zip(sample.input_ids, sample.labels, strict=True)
    ]
    ends = [end for end in range(1, len(marks)) if marks[end] != marks[end - 1]]
    text_start, written = 0, ""
    for start, end in zip([0, *ends], [*ends, len(marks)], strict=True):
        mark = marks[start]
        if isinstance(mark, str):
            yield f"<{mark} x {end - start}>"
            text_start, written = end, ""
            continue
        # Tokens are decoded from the beginning of their text on: by themselves some would lose a space.
        text = str(tokenizer.decode(sample.input_ids[text_start:end]))
        yield f"⟦{text[len(written) :]}⟧" if mark else text[len(written) :]
        written = text


def _run(dataset: EncodedDataset, indices: Sequence[int], num_workers: int) -> Iterable[SampleCheck]:
    options: dict[str, Any] = {"prefetch_factor": PREFETCHED_BATCHES} if num_workers else {}
    return DataLoader(_Checks(dataset), batch_size=None, sampler=indices, num_workers=num_workers, **options)


def _find_absent(examples: Sequence[Example], advance: Advance) -> dict[int, SampleCheck]:
    """The examples that have a file which is not there, by number."""
    absent = {}
    for index, example in enumerate(examples):
        missing = next((source.path for source in media_sources(example) if not Path(source.path).exists()), None)
        if missing is not None:
            absent[index] = SampleCheck(example.id, "absent", missing)
        advance(1)
    return absent
