"""Check the datasets of a configuration before a run: what is missing, broken or too long, and what the model sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from video_llama.config import Config
from video_llama.constants import IGNORE_INDEX, Modality
from video_llama.data.batches import PREFETCHED_BATCHES, BadSample, read_ahead
from video_llama.data.build import EncodedDataset, build_datasets
from video_llama.data.examples import Example, MediaSource, media_kinds, media_sources
from video_llama.data.hf_rows import StreamTable
from video_llama.data.mixture import mixture_weights
from video_llama.data.sample_processor import MediaInput, ProcessedSample, SampleProcessor
from video_llama.errors import DatasetError, MediaError, NoAudioTrackError
from video_llama.model.parts import AUDIO_PARTS, trained_parts
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["DatasetCheck", "SampleCheck", "check_datasets", "describe_tokens", "share_of_bad_samples"]

Outcome = Literal["good", "absent", "undecodable", "malformed", "masked"]
OUTCOMES: dict[Outcome, str] = {
    "absent": "a file is absent",
    "undecodable": "a file cannot be decoded",
    "malformed": "the annotation is malformed, or holds no answer",
    "masked": "max_txt_len leaves no answer, or cuts a media position off",
}
Advance = Callable[[int], object]

_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class SampleCheck:
    """Hold the result for one sample.

    Args:
        id: of the example.
        outcome: "good", or what is wrong with it.
        reason: the text of the error.
        num_text_tokens: of the whole text, media not counted.
        is_cut: `max_txt_len` cuts its end off.
        num_words, num_changed: words of its caption, and how many of them the cleaner changes or leaves out.
        is_silent: its audio is asked of a file without audio track.
    """

    id: str
    outcome: Outcome
    reason: str = ""
    num_text_tokens: int = 0
    is_cut: bool = False
    num_words: int = 0
    num_changed: int = 0
    is_silent: bool = False


@dataclass
class DatasetCheck:
    """Hold the result for one dataset.

    Args:
        name: in the configuration.
        num_examples: in its annotations.
        num_decoded: how many of them were processed.
        bad: those that cannot be used.
        num_cut: how many of those processed are longer than `max_txt_len`.
        longest: text tokens of the longest one.
        samples: some good ones to show.
        num_words, num_changed: words of captions of those processed, and how many of them the cleaner changes.
        media: how many examples have media of each modality, and how many have none.
        num_silent: how many of those processed lack the audio track that they name.
        skips_silent: these are left out, and not bad.
        is_stream: only the first rows of a stream are known.
    """

    name: str
    num_examples: int
    num_decoded: int = 0
    bad: list[SampleCheck] = field(default_factory=list)
    num_cut: int = 0
    longest: int = 0
    samples: list[ProcessedSample] = field(default_factory=list)
    num_words: int = 0
    num_changed: int = 0
    media: Counter[str] = field(default_factory=Counter)
    num_silent: int = 0
    skips_silent: bool = False
    is_stream: bool = False

    def count(self, outcome: Outcome) -> int:
        """Count the samples that are bad in this way."""
        return sum(check.outcome == outcome for check in self.bad)

    @property
    def share_of_bad(self) -> float:
        """Return the share of all examples, estimated from the processed ones where not all were."""
        # Absent files are known for all examples, other faults only for those that were decoded. So the share among the
        # decoded ones stands for all examples whose files are there.
        absent = self.count("absent")
        among_decoded = (len(self.bad) - absent) / max(self.num_decoded, 1)
        return (absent + (self.num_examples - absent) * among_decoded) / self.num_examples

    def failures(self) -> list[BadSample]:
        """Return the bad samples as a run reports them."""
        return [BadSample(check.id, f"{OUTCOMES[check.outcome]}: {check.reason}") for check in self.bad]


@dataclass(frozen=True)
class _OnceReader(SampleProcessor):
    """Reads each file of an example once, however often the example is processed."""

    remembered: dict[tuple[Modality, MediaSource], MediaInput] = field(default_factory=dict)

    def read(self, kind: Modality, source: MediaSource) -> MediaInput:
        if (kind, source) not in self.remembered:
            self.remembered[kind, source] = super().read(kind, source)
        return self.remembered[kind, source]


@dataclass(frozen=True)
class _Checks(Dataset[SampleCheck]):
    """Check a dataset's examples by index, for worker processes."""

    dataset: EncodedDataset

    def __getitem__(self, index: int) -> SampleCheck:
        try:
            example = self.dataset.examples[index]
        except DatasetError as error:
            return SampleCheck(f"{self.dataset.name}/{index}", "malformed", str(error))
        return check_sample(self.dataset.encoder, example)


def check_sample(encoder: SampleProcessor, example: Example) -> SampleCheck:
    """Process one example as training does, and without a limit to its text."""
    # With one prompt, nothing is random but crops, so both texts are of the same sample.
    text = dataclasses.replace(encoder.text, prompts=encoder.text.prompts[:1])
    # `replace` hands the table of read files on, so both processors share it and each file is decoded once.
    limited = _OnceReader(**{**vars(encoder), "text": text})
    unlimited = dataclasses.replace(limited, text=dataclasses.replace(text, max_txt_len=_UNLIMITED))
    try:
        whole = unlimited(example)
    except NoAudioTrackError as error:
        return SampleCheck(example.id, "undecodable", str(error), is_silent=True)
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
    is_cut = len(sample.input_ids) < len(whole.input_ids)
    return SampleCheck(example.id, "good", "", length, is_cut, *_count_words(encoder, example))


def _count_words(encoder: SampleProcessor, example: Example) -> tuple[int, int]:
    """Return the number of words of a caption, and of those that the cleaner changes or leaves out."""
    clean = encoder.text.caption_processor
    caption = example.text.get("caption", "")
    if clean is None:
        return len(caption.split()), 0
    before = Counter(caption.split())
    return before.total(), (before - Counter(clean(caption).split())).total()


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
    """Check the datasets of a configuration, one after the other.

    Args:
        config: the whole configuration.
        processor: of the model, from `build_model_processor`.
        training: True checks the training splits, False the validation splits.
        num_decoded: most samples of each dataset to process, drawn from `run.seed`; None processes all. Absent files
            are found in all samples.
        num_shown: good samples to keep.
        num_workers: processes that read.
        start: called with the name of the next task and its total; its result is called with what was done.

    Raises:
        ConfigError, DatasetError: as `build_datasets`.
    """
    as_audio = bool(AUDIO_PARTS & trained_parts(config.model))
    for dataset in build_datasets(config, processor, training=training, images_as_audio=as_audio):
        examples = dataset.examples
        check = DatasetCheck(dataset.name, len(examples), skips_silent=dataset.encoder.skip_silent)
        check.is_stream = isinstance(examples, StreamTable)
        absent = _find_absent(examples, check.media, start(f"{dataset.name}: files", len(examples)))
        check.bad = list(absent.values())
        order = np.random.default_rng(config.run.seed).permutation(len(examples)).tolist()
        # The same samples in every run of the check, and a prefix of them if fewer are asked for.
        chosen = [index for index in order if index not in absent][:num_decoded]
        advance = start(f"{dataset.name}: samples", len(chosen))
        torch.manual_seed(config.run.seed)
        good = []
        samples = read_ahead(_Checks(dataset), chosen, num_workers, PREFETCHED_BATCHES)
        for index, sample in zip(chosen, samples, strict=True):
            check.num_decoded += 1
            check.num_cut += sample.is_cut
            check.num_silent += sample.is_silent
            check.num_words += sample.num_words
            check.num_changed += sample.num_changed
            check.longest = max(check.longest, sample.num_text_tokens)
            if sample.outcome == "good":
                good.append(index)
            elif not (sample.is_silent and check.skips_silent):
                check.bad.append(sample)
            advance(1)
        check.samples = [dataset.encoder(examples[index]) for index in good[:num_shown]]
        yield check


def share_of_bad_samples(config: Config, checks: Sequence[DatasetCheck]) -> float:
    """Return the share of bad samples in a run, which mixes the datasets.

    Raises:
        ConfigError: invalid sample ratios.
    """
    names = [check.name for check in checks]
    ratios = [config.datasets[name].sample_ratio for name in names]
    shares = mixture_weights([check.num_examples for check in checks], ratios, names)
    return sum(share * check.share_of_bad for share, check in zip(shares, checks, strict=True))


def describe_tokens(sample: ProcessedSample, tokenizer: PreTrainedTokenizerBase, media: dict[int, str]) -> str:
    """Return a sample's text, with what is learnt in ⟦ ⟧ and media as `<frames x 32>`.

    Args:
        sample: to describe.
        tokenizer: of the language model.
        media: names of the ids of media features.
    """

    def mark_of(token: tuple[int, int]) -> str | bool:
        """Return the name of media, or whether the token is learnt."""
        token_id, label = token
        return media.get(token_id) or label != IGNORE_INDEX

    described: list[str] = []
    ids: list[int] = []
    written = ""
    for mark, run in itertools.groupby(zip(sample.input_ids, sample.labels, strict=True), mark_of):
        run_ids = [token for token, _ in run]
        if isinstance(mark, str):
            described.append(f"<{mark} x {len(run_ids)}>")
            ids, written = [], ""
            continue
        # Tokens are decoded from the beginning of their text on: alone, some would lose a space.
        ids += run_ids
        text = str(tokenizer.decode(ids))
        new, written = text[len(written) :], text
        described.append(f"⟦{new}⟧" if mark else new)
    return "".join(described)


def _find_absent(examples: Sequence[Example], media: Counter[str], advance: Advance) -> dict[int, SampleCheck]:
    """Return the examples with an absent file, by index, and count in `media` which media they all name."""
    absent = {}
    for index in range(len(examples)):
        advance(1)
        try:
            example = examples[index]
        except DatasetError:
            # It is reported when the sample is read.
            continue
        media.update({str(kind) for kind in media_kinds(example)} or {"none"})
        for source in media_sources(example):
            if source.is_absent:
                absent[index] = SampleCheck(example.id, "absent", source.path)
                break
    return absent
