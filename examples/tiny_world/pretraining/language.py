"""Pretraining of the language model, and of the Q-Former with it.

The language model trains first: in the place of media it gets vectors made of its own embeddings of true words, in any
order and with noise, and must write captions and answers from them. So it learns the language of questions and
answers, and to depend on the media. Then the Q-Former, between it and the frame encoder, learns to caption single
frames; captions of frames name the position.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.tiny_world.pretraining.frames import FramePool
from examples.tiny_world.pretraining.steps import StepSchedule, half_precision, run_steps
from examples.tiny_world.pretraining.texts import TextSample, TextWriter
from examples.tiny_world.pretraining.vision import AttributeHeads
from examples.tiny_world.world.facts import Facts
from examples.tiny_world.world.language import caption
from video_llama.data.tokenization import collate_text
from video_llama.model.qformer import run_qformer
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["train_language_model", "train_qformer"]

# Of a slot, relative to its length.
_NOISE = 0.35
_MEASURED_FRAMES = 1000
# Parts that a batch of texts is computed in.
_NUM_LENGTHS = 3


def word_lists(facts: Facts) -> list[str]:
    """Return the facts, each in a few words: the attribute's name and its value."""
    phrases = [f"{name} {value}" for name, value in facts.values.items() if name != "order"]
    if facts.changes is not None:
        phrases += [f"first {facts.changes} {facts.first}", f"then {facts.changes} {facts.then}"]
    elif "order" in facts.values:
        phrases.append("nothing changes")
    return [facts.medium, *phrases]


def slots_of_facts(
    facts: Sequence[Facts], num_slots: int, embeddings: nn.Embedding, tokenize: Mapping[str, list[int]], rng: Generator
) -> Tensor:
    """Return vectors in the place of media, (len(facts), num_slots, width): one fact each."""
    tokens: list[int] = []
    # Where each slot begins, over all facts.
    offsets: list[int] = []
    for item in facts:
        phrases = word_lists(item)
        order = [phrases[int(index)] for index in rng.permutation(len(phrases))]
        while len(order) < num_slots:
            order.append(phrases[int(rng.integers(len(phrases)))])
        # Facts beyond the number of slots share one.
        while len(order) > num_slots:
            last = order.pop()
            order[int(rng.integers(num_slots))] += f" {last}"
        for phrase in order:
            offsets.append(len(tokens))
            tokens += [token for word in phrase.split(" ") for token in tokenize[word]]
    sums = F.embedding_bag(torch.tensor(tokens), embeddings.weight, torch.tensor(offsets), mode="sum")
    slots = sums.unflatten(0, (len(facts), num_slots))  # (facts, num_slots, width)
    noise = torch.from_numpy(rng.standard_normal(slots.shape, dtype=np.float32))
    size = slots.detach().norm(dim=-1, keepdim=True) / slots.shape[-1] ** 0.5
    return slots + _NOISE * float(rng.random()) * size * noise


class Words(dict[str, list[int]]):
    """Token ids of words, without BOS; computed when first needed."""

    def __init__(self, processor: VideoLlamaProcessor) -> None:
        super().__init__()
        self._tokenizer = processor.tokenizer

    def __missing__(self, word: str) -> list[int]:
        self[word] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        return self[word]


class Reader:
    """The language model's loss on texts whose media are given as slots.

    Args:
        model: with the language model that learns.
        processor: of the model.
    """

    def __init__(self, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor) -> None:
        self._model = model
        self._words = Words(processor)
        self._pad_id = processor.tokenizer.pad_token_id
        self._lengths = processor.placeholder_lengths

    def facts_loss(self, samples: Sequence[TextSample], rng: Generator) -> Tensor:
        """Return the loss with facts in the place of media; texts of similar length share a part, to save padding."""
        ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
        cuts = np.linspace(0, len(ordered), 1 + min(_NUM_LENGTHS, len(ordered))).astype(int)
        parts = [ordered[start:stop] for start, stop in itertools.pairwise(cuts)]
        spoken = [sum(label >= 0 for sample in part for label in sample.labels) for part in parts]
        losses = [
            self._facts_loss(part, rng) * (count / sum(spoken)) for part, count in zip(parts, spoken, strict=True)
        ]
        return torch.stack(losses).sum()

    def _facts_loss(self, samples: Sequence[TextSample], rng: Generator) -> Tensor:
        embeddings = self._model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        seen = [sample.visible for sample in samples if sample.visible is not None]
        heard = [sample.audible for sample in samples if sample.audible is not None]
        video = slots_of_facts(seen, self._lengths["image"], embeddings, self._words, rng) if seen else None
        audio = slots_of_facts(heard, self._lengths["audio"], embeddings, self._words, rng) if heard else None
        return self.loss(samples, video, audio)

    def loss(self, samples: Sequence[TextSample], video: Tensor | None, audio: Tensor | None) -> Tensor:
        """Return the loss with given vectors in the place of media."""
        batch = collate_text([{"input_ids": s.input_ids, "labels": s.labels} for s in samples], self._pad_id)
        output = self._model(**batch, video_features=video, audio_features=audio, use_cache=False)
        return output.loss


def text_writer(processor: VideoLlamaProcessor, seed: int) -> TextWriter:
    """Return a writer of texts with as many placeholders as the model's branches have queries."""
    ids, lengths = processor.placeholder_ids, processor.placeholder_lengths
    return TextWriter(
        processor.tokenizer, (ids["image"], lengths["image"]), (ids["audio"], lengths["audio"]), seed=1_000_000 + seed
    )


def train_language_model(
    model: VideoLlamaForConditionalGeneration,
    processor: VideoLlamaProcessor,
    schedule: StepSchedule,
    folder: Path,
    batch_size: int = 32,
) -> None:
    """Train `language_model` in place."""
    writer, reader = text_writer(processor, 1), Reader(model, processor)

    def step(rng: Generator) -> Mapping[str, Tensor]:
        return {"text": reader.facts_loss([writer(rng) for _ in range(batch_size)], rng)}

    run_steps("language", nn.ModuleDict({"model": model.language_model}), step, schedule, folder, seed=3)


def train_qformer(
    model: VideoLlamaForConditionalGeneration,
    processor: VideoLlamaProcessor,
    pool: FramePool,
    schedule: StepSchedule,
    folder: Path,
    batch_size: int = 48,
) -> None:
    """Train `qformer` and `query_tokens` of the video branch in place; frame encoder and language model are frozen.

    Each attribute is read from a query token of its own, so that later parts find it in the same place.
    """
    branch: Any = model.video_branch
    media = processor.media_processor
    width, num_queries = branch.query_tokens.shape[-1], branch.query_tokens.shape[1]
    model.language_model.requires_grad_(False)
    modules = nn.ModuleDict(
        {
            "qformer": branch.qformer,
            "queries": _Held(branch.query_tokens),
            "projection": nn.Linear(width, model.config.text_config.hidden_size),
            "heads": AttributeHeads(width),
        }
    )
    train, held_back = pool.split(min(_MEASURED_FRAMES, len(pool) // 10))
    reader = Reader(model, processor)
    writer = TextWriter(
        processor.tokenizer,
        (processor.image_token_id, num_queries),
        (processor.audio_token_id, processor.num_audio_query_tokens),
        seed=0,
    )

    def encode(frames: FramePool, chosen: NDArray[np.int64]) -> Tensor:
        with half_precision(), torch.no_grad():
            patches = branch.vision_norm(branch.vision_encoder(frames.images(chosen, media))).float()
        return run_qformer(branch.qformer, branch.query_tokens, patches)  # (frames, queries, width)

    def step(rng: Generator) -> Mapping[str, Tensor]:
        chosen = rng.integers(len(train), size=batch_size)
        tokens = encode(train, chosen)
        facts = [train.facts(int(index)) for index in chosen]
        captions = [writer.caption(caption(item, rng), item, None) for item in facts]
        losses = modules["heads"].losses(tokens, train, chosen)  # type: ignore[operator]
        losses["caption"] = reader.loss(captions, modules["projection"](tokens), None)
        return losses

    def measure() -> Mapping[str, float]:
        everything = np.arange(len(held_back))
        tokens = torch.cat([encode(held_back, part) for part in np.array_split(everything, 8)])
        return modules["heads"].accuracies(tokens, held_back, everything)  # type: ignore[operator]

    run_steps("qformer", modules, step, schedule, folder, seed=4, measure=measure)


class _Held(nn.Module):
    """Makes a parameter part of a module."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter
