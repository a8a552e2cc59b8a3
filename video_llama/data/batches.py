"""Batches for training: samples read and encoded, bad ones replaced and reported, the rest padded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from video_llama.data.examples import Example
from video_llama.data.mixture import BatchPlan, Slot
from video_llama.data.sample_processor import MediaInput, ProcessedSample, SampleProcessor
from video_llama.data.tokenization import collate_text
from video_llama.data.workers import read_ahead
from video_llama.errors import DatasetError, MediaError
from video_llama.processor.collate import pad_items

__all__ = [
    "Batch",
    "BatchReader",
    "Failure",
    "SampleReader",
    "collate",
    "gather_media",
    "load_batches",
    "load_samples",
]

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 20
PREFETCHED_BATCHES = 2  # of each worker
PREFETCHED_SAMPLES = 8

# The model input for encoder outputs, and the mask over frames or segments, by the input for media.
_ENCODED = {
    "pixel_values": "frame_tokens",
    "audio_values": "segment_vectors",
    "audio_pixel_values": "segment_vectors",
}
_MASKS = {"pixel_values": "frame_mask", "audio_values": "segment_mask", "audio_pixel_values": "segment_mask"}


@dataclass(frozen=True)
class Failure:
    """A sample that could not be used.

    Args:
        id: of the example.
        reason: the error's words.
    """

    id: str
    reason: str


@dataclass
class Batch:
    """One batch of one process.

    Args:
        number: of the batch in the run.
        text: input_ids, attention_mask, labels: (samples, length), int64.
        media: all media of the batch, in order of appearance.
        ids: of the samples.
        failures: what was replaced on the way.
        gave_up: so many replacements in a row failed that the dataset cannot be meant to be used: why, and nothing
            is in the batch but its failures.
    """

    number: int
    text: dict[str, Tensor]
    media: list[MediaInput]
    ids: list[str]
    failures: list[Failure] = field(default_factory=list)
    gave_up: str = ""

    @property
    def num_label_tokens(self) -> int:
        """Tokens the loss is taken on: the first of a sequence is never predicted."""
        return 0 if self.gave_up else int((self.text["labels"][:, 1:] >= 0).sum())

    @property
    def num_text_tokens(self) -> int:
        """Tokens of all sequences, the places of media included."""
        return 0 if self.gave_up else int(self.text["attention_mask"].sum())

    @property
    def num_positions(self) -> int:
        """The same with padding: each sequence is as long as the longest of the batch."""
        return 0 if self.gave_up else self.text["attention_mask"].numel()

    def model_inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """All tensors, by the names of the model's arguments, on a device; media are padded there.

        A GPU gets them in its own time: from pinned memory nothing here waits for it.
        """
        text = {name: tensor.to(device, non_blocking=True) for name, tensor in self.text.items()}
        return text | gather_media(self.media, device)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU can read by itself; torch's data loader calls this."""
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        media = [replace(item, values=item.values.pin_memory()) for item in self.media]
        return replace(self, text=text, media=media)


def gather_media(media: Sequence[MediaInput], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Media of one or more kinds as padded model inputs; all of one kind must be encoded, or none.

    Args:
        device: where the inputs shall be; by default where the media are.
    """
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(item.name for item in media):
        items = [item for item in media if item.name == name]
        values, mask = pad_items([item.values for item in items], device)
        inputs[_ENCODED[name] if items[0].is_encoded else name] = values
        if mask is not None:
            inputs[_MASKS[name]] = mask
    return inputs


def collate(number: int, samples: Sequence[ProcessedSample], pad_id: int, failures: Sequence[Failure] = ()) -> Batch:
    """Encoded samples as a batch, padded on the right."""
    text = collate_text([{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples], pad_id)
    media = [item for sample in samples for item in sample.media]
    return Batch(number, text, media, [sample.id for sample in samples], list(failures))


class BatchReader(Dataset[Batch]):
    """The batches of a run by number; any process can read any of them.

    Args:
        tables: the examples of each dataset.
        encoders: how each dataset is encoded.
        plan: what each batch is made of.
        pad_id: fills input_ids.
    """

    def __init__(
        self, tables: Sequence[Sequence[Example]], encoders: Sequence[SampleProcessor], plan: BatchPlan, pad_id: int
    ) -> None:
        self._tables, self._encoders = tables, encoders
        self._plan, self._pad_id = plan, pad_id

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        """Read a batch; samples that cannot be read are replaced by others, drawn from the seed.

        A batch that gave up is no exception here, since workers would wrap it, and its failures are to be noted.
        """
        failures: list[Failure] = []
        samples: list[ProcessedSample] = []
        with torch.random.fork_rng(devices=()):
            for slot in self._plan[number]:
                sample = self._read(slot, failures)
                if sample is None:
                    last = failures[-1]
                    why = f"{MAX_REPLACEMENTS} samples in a row cannot be used, the last is {last.id}: {last.reason}"
                    return Batch(number, {}, [], [], failures, gave_up=why)
                samples.append(sample)
        return collate(number, samples, self._pad_id, failures)

    def _read(self, slot: Slot, failures: list[Failure]) -> ProcessedSample | None:
        index = slot.index
        for attempt in range(MAX_REPLACEMENTS):
            torch.default_generator.manual_seed(self._plan.sample_seed(slot))  # a GPU keeps its own numbers
            example = self._tables[slot.dataset][index]
            try:
                return self._encoders[slot.dataset](example)
            except (MediaError, DatasetError) as error:  # anything else is a mistake in a program: it stops the run
                failures.append(Failure(example.id, str(error)))
                index = self._plan.replacement(slot, attempt)
        return None


class SampleReader(Dataset[ProcessedSample | Failure]):
    """The samples of one dataset by index, each by itself; one that cannot be used is told, not replaced."""

    def __init__(self, table: Sequence[Example], encoder: SampleProcessor) -> None:
        self._table, self._encoder = table, encoder

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> ProcessedSample | Failure:
        example = self._table[index]
        try:
            return self._encoder(example)
        except (MediaError, DatasetError) as error:
            return Failure(example.id, str(error))


def load_samples(reader: SampleReader, indices: range, num_workers: int) -> Iterator[ProcessedSample | Failure]:
    """Samples in order, read ahead by worker processes."""
    return read_ahead(reader, indices, num_workers, PREFETCHED_SAMPLES)


def load_batches(reader: BatchReader, numbers: range, num_workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches in order, read ahead by worker processes.

    Args:
        numbers: which; the first is where a resumed run goes on.
        num_workers: processes; 0 reads in this one.
        pin_memory: put them where a GPU can fetch them by itself.
    """
    return read_ahead(reader, numbers, num_workers, PREFETCHED_BATCHES, pin_memory)
