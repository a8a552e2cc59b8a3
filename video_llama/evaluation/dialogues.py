"""Ask every question of annotated dialogues, each after the annotated answers to those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_llama.data.batches import BadSample, SampleReader, gather_media, load_samples
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, ExampleTable
from video_llama.data.sample_processor import MediaInput, ProcessedSample, SampleProcessor, TextSettings
from video_llama.data.tokenization import answer_spans
from video_llama.errors import ConfigError, DatasetError
from video_llama.evaluation.text_metrics import exact_match, rouge_l, token_f1
from video_llama.inference.completion import answer_text, generate_ids, pad_prompts
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.schema import BuildInfo, DatasetConfig
from video_llama.training.validation import media_of_prompt
from video_llama.utils.devices import computing_on

__all__ = ["DialogueAnswer", "DialogueResults", "answer_examples", "dialogue_metrics", "load_dialogues"]


@dataclass(frozen=True)
class DialogueAnswer:
    """The model's answer to one question of a dialogue.

    Args:
        id: of the dialogue.
        turn: number of the question in it, from 1.
        question, reference, answer: texts: of the annotation, of the annotated answer, and of the model.
    """

    id: str
    turn: int
    question: str
    reference: str
    answer: str

    def scores(self) -> dict[str, float]:
        """Return exact match, F1 of words and ROUGE-L, each from 0 to 1."""
        pair = (self.answer, self.reference)
        return {"exact_match": float(exact_match(*pair)), "token_f1": token_f1(*pair), "rouge_l": rouge_l(*pair)}

    def as_json(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return {**asdict(self), **{name: round(value, 4) for name, value in self.scores().items()}}


@dataclass
class DialogueResults:
    """Answers, and by the ids of dialogues that could not be asked, why not."""

    answers: list[DialogueAnswer] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)


@dataclass
class _Dialogue:
    """A dialogue ready to be asked: its ids, where answers begin, and the features of its media."""

    sample: ProcessedSample
    starts: list[int]
    turns: list[tuple[int, str, str]]
    features: dict[str, list[Tensor]]


def load_dialogues(
    name: str, data: Path, media: Path | None, data_type: str | None = None, limit: int | None = None
) -> ExampleTable:
    """Read the annotations of a dataset of messages.

    Args:
        name: of the dataset, as in configurations.
        data: annotation file or folder, or the storage of shards.
        media: folder that media paths are relative to.
        data_type: "video", "images" or "audio", of shards.
        limit: most dialogues.

    Raises:
        ConfigError: an unknown dataset, or one whose samples are not messages.
        DatasetError: annotations are absent, empty or malformed.
    """
    info = BuildInfo(anno_dir=str(data), videos_dir=None if media is None else str(media), storage=str(data))
    examples = build_examples(name, DatasetConfig(data_type=data_type or "video", build_info=info))
    if "messages" not in examples[0].text:
        raise ConfigError(f"the samples of dataset {name!r} are not messages; evaluate it by captions")
    return ExampleTable(examples[:limit])


@torch.inference_mode()
def answer_examples(
    model: VideoLlama,
    examples: ExampleTable,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    num_workers: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> DialogueResults:
    """Answer every annotated question greedily, in the prompts that training has.

    Args:
        model, examples: what answers, and what is asked.
        batch_size: dialogues in memory, and prompts at a time.
        max_new_tokens: of an answer.
        num_workers: processes that read the media.
        advance: called with the number of dialogues done since.
    """
    processor = model.processor
    text = TextSettings(
        processor.tokenizer,
        {kind: id_ for kind, id_ in processor.placeholder_ids.items() if kind == "image" or model.has_audio},
        processor.placeholder_lengths,
        # Nothing is cut off; what does not fit into the model is found below.
        max_txt_len=1 << 30,
        end_sym="",
        template=processor.conv_template,
    )
    reader = SampleReader(examples, SampleProcessor(text, processor.media_processor))
    samples = load_samples(reader, range(len(examples)), num_workers)
    results = DialogueResults()
    for start in range(0, len(examples), batch_size):
        dialogues = []
        for number, sample in enumerate(islice(samples, batch_size), start):
            if isinstance(sample, BadSample):
                results.unusable[sample.id] = sample.reason
                continue
            turns = list(_turns(examples[number]))
            starts = [span.start for span in answer_spans(sample.labels)]
            if len(starts) != len(turns):
                raise DatasetError(f"{sample.id}: {len(turns)} answers in the annotation, {len(starts)} in the prompt")
            dialogues.append(_Dialogue(sample, starts, turns, _encode(model, sample.media)))
        _ask_all(model, dialogues, max_new_tokens, results)
        advance(min(batch_size, len(examples) - start))
    return results


def dialogue_metrics(answers: Sequence[DialogueAnswer]) -> dict[str, float]:
    """Return the means of the scores over all answers; none for no answers."""
    scores = [answer.scores() for answer in answers]
    if not scores:
        return {}
    return {name: round(sum(score[name] for score in scores) / len(scores), 4) for name in scores[0]}


def _turns(example: Example) -> Iterator[tuple[int, str, str]]:
    """Yield (turn, question, answer) of each annotated answer that counts."""
    question, turn = "", 0
    for message in example.text["messages"]:
        if message["role"] == "user":
            question, turn = _said(message), turn + 1
        # An answer that is not learnt is no reference either.
        elif message["role"] == "assistant" and message.get("loss") is not False:
            yield turn, question, _said(message)


def _said(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(item["text"] for item in content if item["type"] == "text")


def _encode(model: VideoLlama, media: Sequence[MediaInput]) -> dict[str, list[Tensor]]:
    """Return the features of each media item, by the model's argument for them, in order of appearance."""
    # Once for all questions of a dialogue.
    features: dict[str, list[Tensor]] = {"video_features": [], "audio_features": []}
    with computing_on(model.device):
        for item in media:
            name, branch = "audio_features", model.model.audio_branch
            if item.name == "pixel_values":
                name, branch = "video_features", model.model.video_branch
            assert branch is not None, "without an audio branch, audio items are bad samples"
            features[name].append(branch(**gather_media([item], model.device))[0])
    return features


def _ask_all(model: VideoLlama, dialogues: Sequence[_Dialogue], max_new_tokens: int, results: DialogueResults) -> None:
    options = GenerationOptions(max_new_tokens=max_new_tokens, min_new_tokens=0)
    room = model.max_length - max_new_tokens
    for number in range(max((len(dialogue.starts) for dialogue in dialogues), default=0)):
        asked = [dialogue for dialogue in dialogues if len(dialogue.starts) > number]
        for dialogue in asked:
            length = dialogue.starts[number]
            if length > room:
                turn = dialogue.turns[number][0]
                results.unusable[f"{dialogue.sample.id}, question {turn}"] = (
                    f"the prompt has {length} tokens, and {room} fit beside an answer of {max_new_tokens}"
                )
        asked = [dialogue for dialogue in asked if dialogue.starts[number] <= room]
        if not asked:
            continue
        prompts = [dialogue.sample.input_ids[: dialogue.starts[number]] for dialogue in asked]
        inputs = pad_prompts(prompts, model.processor.tokenizer.pad_token_id, model.device)
        inputs |= _features_of_prompts(model, asked, prompts)
        stop_strings = model.new_conversation().stop_strings
        rows = generate_ids(model.model, model.processor.tokenizer, inputs, options, stop_strings)
        for dialogue, ids in zip(asked, rows, strict=True):
            answer = answer_text(model, ids, stop_strings)
            results.answers.append(DialogueAnswer(dialogue.sample.id, *dialogue.turns[number], answer))


def _features_of_prompts(
    model: VideoLlama, dialogues: Sequence[_Dialogue], prompts: Sequence[list[int]]
) -> dict[str, Tensor]:
    """Return the features of the media that the prompts hold, those of all prompts in order of appearance."""
    features: dict[str, list[Tensor]] = {}
    for dialogue, prompt in zip(dialogues, prompts, strict=True):
        media = media_of_prompt(prompt, dialogue.sample, model.config)
        num_visual = sum(item.name == "pixel_values" for item in media)
        for name, count in {"video_features": num_visual, "audio_features": len(media) - num_visual}.items():
            if count:
                features.setdefault(name, []).extend(dialogue.features[name][:count])
    return {name: torch.stack(items) for name, items in features.items()}
