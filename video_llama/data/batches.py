"""Make batches for training: read and encode samples, replace and report bad ones, pad the rest."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from video_llama.constants import IGNORE_INDEX
from video_llama.data.examples import Example
from video_llama.data.hf_rows import StreamTable
from video_llama.data.mixture import MixtureBatchSampler, SampleRef
from video_llama.data.remote import RemoteError
from video_llama.data.sample_processor import MediaInput, ProcessedSample, SampleProcessor
from video_llama.data.streams import RowStream, StreamedBatch, StreamFeed
from video_llama.data.tokenization import collate_text
from video_llama.errors import DatasetError, MediaError, NoAudioTrackError
from video_llama.processor.collate import pad_items

__all__ = [
    "BadFile",
    "BadSample",
    "Batch",
    "BatchReader",
    "DataCollator",
    "SampleReader",
    "SilentSample",
    "gather_media",
    "load_batches",
    "load_samples",
    "read_ahead",
]

MAX_REPLACEMENTS = 20
# Items that each worker process reads ahead.
PREFETCHED_BATCHES = 2
PREFETCHED_SAMPLES = 8

# Model inputs by the name of the media input: encoder outputs, and the mask over frames or segments.
_ENCODED = {
    "pixel_values": "frame_tokens",
    "audio_values": "segment_vectors",
    "audio_pixel_values": "segment_vectors",
}
_MASKS = {"pixel_values": "frame_mask", "audio_values": "segment_mask", "audio_pixel_values": "segment_mask"}


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: the id of its example, and the text of the error."""

    id: str
    reason: str


class SilentSample(BadSample):
    """A sample without audio track that is left out as `skip_silent` asks, and not counted as bad."""


class BadFile(BadSample):
    """A remote file that cannot be fetched, in the place of each sample in it: reported once."""


@dataclass
class Batch:
    """One batch of one process.

    Args:
        number: of the batch in the run.
        text: input_ids, attention_mask, labels: (samples, length), int64.
        media: all media of the batch, in order of appearance.
        ids: of the samples; none if the process only computes along.
        failures: bad samples that were replaced.
        gave_up: why the batch is empty but for its failures: too many replacements in a row failed.
        along: media without a place in the text, which this process computes because others have such media.
    """

    number: int
    text: dict[str, Tensor]
    media: list[MediaInput]
    ids: list[str]
    failures: list[BadSample] = field(default_factory=list)
    gave_up: str = ""
    along: list[MediaInput] = field(default_factory=list)

    @property
    def num_label_tokens(self) -> int:
        """Count the tokens of the loss: the first of a sequence is never predicted."""
        return 0 if self.gave_up else int((self.text["labels"][:, 1:] >= 0).sum())

    @property
    def num_text_tokens(self) -> int:
        """Count the tokens of all sequences, with the positions of media and without padding."""
        return 0 if self.gave_up else int(self.text["attention_mask"].sum())

    @property
    def num_positions(self) -> int:
        """Count the positions of all sequences, padding included."""
        return 0 if self.gave_up else self.text["attention_mask"].numel()

    def model_inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return all tensors on a device, by the names of the model's arguments; media are padded there.

        Copies from pinned memory to a GPU do not block.
        """
        text = {name: tensor.to(device, non_blocking=True) for name, tensor in self.text.items()}
        return text | gather_media([*self.media, *self.along], device)

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory; torch's data loader calls this."""
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        media = [replace(item, values=item.values.pin_memory()) for item in self.media]
        return replace(self, text=text, media=media)


def gather_media(media: Sequence[MediaInput], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Return media as padded model inputs; all of one input must be encoded, or none.

    Args:
        media: for one or more model inputs.
        device: of the result; by default that of the media.
    """
    # Model inputs in order of first appearance, media within each in order of appearance.
    by_name: dict[str, list[MediaInput]] = {}
    for item in media:
        by_name.setdefault(item.name, []).append(item)
    inputs: dict[str, Tensor] = {}
    for name, items in by_name.items():
        values, mask = pad_items([item.values for item in items], device)
        if items[0].is_encoded:
            inputs[_ENCODED[name]] = values
        else:
            inputs[name] = values
        if mask is not None:
            inputs[_MASKS[name]] = mask
    return inputs


@dataclass(frozen=True)
class DataCollator:
    """Make a batch of processed samples, padded on the right; `pad_id` fills input_ids."""

    pad_id: int

    def __call__(
        self, samples: Sequence[ProcessedSample], number: int = 0, failures: Sequence[BadSample] = ()
    ) -> Batch:
        text = collate_text(
            [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples], self.pad_id
        )
        media = [item for sample in samples for item in sample.media]
        # What only takes part, without labels, has no id.
        return Batch(number, text, media, [sample.id for sample in samples if sample.id], list(failures))


class BatchReader(Dataset[Batch]):
    """Read the batches of a run by number; any process can read any of them.

    Args:
        tables: the examples of each dataset.
        processors: of each dataset's examples.
        sampler: what each batch consists of.
        pad_id: fills input_ids.
        streams: by the number of a dataset, where its rows come from; its table then only replaces bad samples.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[Example]],
        processors: Sequence[SampleProcessor],
        sampler: MixtureBatchSampler,
        pad_id: int,
        streams: Mapping[int, RowStream] | None = None,
    ) -> None:
        self.feed = StreamFeed(sampler, streams) if streams else None
        self._tables, self._processors = tables, processors
        self._sampler = sampler
        self._collate = DataCollator(pad_id)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getitem__(self, asked: int | StreamedBatch) -> Batch:
        """Read a batch; bad samples are replaced by others, drawn from the seed."""
        number = asked if isinstance(asked, int) else asked.number
        failures: list[BadSample] = []
        samples: list[ProcessedSample] = []
        refs = self._sampler[number]
        # At the end of a pass over the data a process may have nothing to learn while others have. It computes along on
        # a sample of theirs without labels, since they all exchange gradients.
        is_idle = not refs
        if is_idle:
            refs = [self._sampler.first_sample(number)]
        # Crops and prompts are drawn from torch's generator, seeded for each sample; its state is restored afterwards.
        with torch.random.fork_rng(devices=()):
            for place, ref in enumerate(refs):
                table = self._tables[ref.dataset]
                first = partial(table.__getitem__, ref.index)
                if isinstance(asked, StreamedBatch):
                    assert isinstance(table, StreamTable), "only streams hand over rows"
                    first = partial(table.example, asked.rows[place])
                sample = self._read(ref, first, failures)
                # Not an exception: a worker process would wrap it, and the failures must be reported.
                if isinstance(sample, BadSample):
                    last = f"{sample.id}: {sample.reason}"
                    why = f"{MAX_REPLACEMENTS} samples in a row cannot be used, the last is {last}"
                    return Batch(number, {}, [], [], failures, gave_up=why)
                samples.append(sample)
        if is_idle:
            return self._collate([_without_labels(sample) for sample in samples], number)
        return self._collate(samples, number, failures)

    def _read(
        self, ref: SampleRef, example: Callable[[], Example], failures: list[BadSample]
    ) -> ProcessedSample | BadSample:
        name = f"sample {ref.index}"
        for attempt in range(MAX_REPLACEMENTS):
            # The CPU's generator alone: that of a GPU belongs to the training step.
            torch.default_generator.manual_seed(self._sampler.sample_seed(ref))
            sample = _process(example, name, self._processors[ref.dataset])
            if isinstance(sample, ProcessedSample):
                return sample
            if not isinstance(sample, SilentSample):
                failures.append(sample)
            # The replacement keeps the place in the batch and its seed. Only the example is another one.
            index = self._sampler.replacement(ref, attempt)
            example, name = partial(self._tables[ref.dataset].__getitem__, index), f"sample {index}"
        return sample


def _without_labels(sample: ProcessedSample) -> ProcessedSample:
    return replace(sample, id="", labels=[IGNORE_INDEX] * len(sample.labels))


class SampleReader(Dataset[ProcessedSample | BadSample]):
    """Read the samples of one dataset by index; a bad one is reported, not replaced.

    Args:
        table, processor: the examples, and what processes them.
        seed: of the prompts that are drawn for captions, so that an index always has the same.
    """

    def __init__(self, table: Sequence[Example], processor: SampleProcessor, seed: int = 0) -> None:
        self._table, self._processor, self._seed = table, processor, seed

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> ProcessedSample | BadSample:
        entropy = np.random.SeedSequence([self._seed, index])
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
            return _process(partial(self._table.__getitem__, index), f"sample {index}", self._processor)


def _process(read: Callable[[], Example], id_: str, processor: SampleProcessor) -> ProcessedSample | BadSample:
    # Any other error is a bug, not a bad sample, and stops the run.
    try:
        # Rows that are not read beforehand may be malformed, too.
        example = read()
        id_ = example.id
        return processor(example)
    except NoAudioTrackError as error:
        kind = SilentSample if processor.skip_silent else BadSample
        return kind(id_, str(error))
    except RemoteError as error:
        # All samples of a shard fail with it. Ids begin with the name of the dataset.
        return BadFile(f"{id_.partition('/')[0]}/{error.address}", error.reason)
    except (MediaError, DatasetError) as error:
        return BadSample(id_, str(error))


def load_samples(
    reader: SampleReader, indices: Sequence[int], num_workers: int
) -> Iterator[ProcessedSample | BadSample]:
    """Yield samples in order, read ahead by worker processes."""
    return read_ahead(reader, indices, num_workers, PREFETCHED_SAMPLES)


def load_batches(
    reader: BatchReader,
    numbers: range,
    num_workers: int,
    pin_memory: bool = False,
    places: Mapping[str, Any] | None = None,
) -> Iterator[Batch]:
    """Yield batches in order, read ahead by worker processes.

    Args:
        reader: of the run.
        numbers: of the batches; a resumed run starts in the middle.
        num_workers: processes; 0 reads in this one.
        pin_memory: put them into pinned memory, for a GPU.
        places: where streams stand before the first of them, from `reader.feed.places`; by default this is found by
            reading them from the start.
    """
    asked: Iterable[Any] = numbers
    if reader.feed is not None:
        asked = reader.feed.requests(numbers, places or {})
    return read_ahead(reader, asked, num_workers, PREFETCHED_BATCHES, pin_memory)


def read_ahead(
    dataset: Dataset[Any], indices: Iterable[Any], num_workers: int, prefetched: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield the items of a dataset in the order of the indices, neither collated nor shuffled.

    Args:
        dataset: of whole batches or single samples.
        indices: of the items, or whatever the dataset takes for one.
        num_workers: processes that read; 0 reads in this one.
        prefetched: items that each worker reads ahead.
        pin_memory: call the items' own `pin_memory`, in a thread of this process if there are workers.
    """
    # With `batch_size` None the loader yields the items as they are and does not collate them.
    options: dict[str, Any] = {"batch_size": None, "sampler": indices, "pin_memory": pin_memory}
    if not num_workers:
        return iter(DataLoader(dataset, **options))
    options |= {"prefetch_factor": prefetched, "worker_init_fn": _obey_the_parent_only}
    loader = DataLoader(dataset, num_workers=num_workers, **options)
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    # A SIGTERM often goes to a whole process group or job (torchrun, Slurm, `timeout`). The run then saves its state,
    # for which it still needs the batches that its workers are reading: they obey a SIGTERM of their parent only.
    # Workers start with the signal mask that this thread has now.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _obey_the_parent_only(worker: int) -> None:
    """End this worker on a SIGTERM of its parent, and on no other's."""
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parent(parent: int) -> None:
    # SIGTERM is blocked in this process, so it stays pending until this thread takes it and sees who sent it.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    # `sys.exit` would only end this thread.
    os._exit(0)
