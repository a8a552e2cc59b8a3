"""Ask many files many questions, in batches, as a chat would ask each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from video_llama.errors import NoAudioTrackError
from video_llama.evaluation.ablation import Media
from video_llama.inference.engine import EncodedMedia, VideoLlama
from video_llama.inference.generation import cut_at_stop
from video_llama.prompt_parts import media_prefix
from video_llama.utils.devices import computing_on

__all__ = ["AnsweredQuestion", "AskedFile", "Question", "answer_dialogues", "read_media"]


@dataclass(frozen=True)
class Question:
    """One turn of a dialogue.

    Attributes:
        dialogue: number within the file; turns of one conversation share it.
        turn: counted from 1.
        attribute: what is asked about.
        value: the right answer's value.
        text: the question.
    """

    dialogue: int
    turn: int
    attribute: str
    value: str
    text: str


@dataclass(frozen=True)
class AskedFile:
    """One file and what is asked about it.

    Attributes:
        path: of the file.
        kind: "clip", "image" or "sound".
        is_seen: training may show this combination of attributes; True for sounds.
        dialogues: each a list of turns.
    """

    path: Path
    kind: str
    is_seen: bool
    dialogues: list[list[Question]]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question and what the model said.

    Attributes:
        file: that was asked about.
        question: with the right value.
        answer: the model's words.
    """

    file: AskedFile
    question: Question
    answer: str


@dataclass
class _Dialogue:
    file: AskedFile
    turns: list[Question]
    introduction: list[object]
    media: list[EncodedMedia]
    answers: list[str]


def read_media(model: VideoLlama, path: Path, kind: str) -> Media:
    """What the model is given of a file: its frames and, if it can hear and there is any, its sound."""
    processor = model.processor.media_processor
    if kind == "image":
        return processor.process_image(path), None
    sound = None
    if model.has_audio:
        try:
            sound = processor.process_audio(path)
        except NoAudioTrackError:
            sound = None
    return (None if kind == "sound" else processor.process_video(path, audio=False)[0]), sound


def answer_dialogues(
    model: VideoLlama,
    files: Sequence[AskedFile],
    media: Sequence[Media],
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda count: None,
    max_new_tokens: int = 40,
) -> list[AnsweredQuestion]:
    """All questions of all files answered greedily; a later turn reads the model's own earlier answer.

    Args:
        model: that answers.
        files: with their dialogues.
        media: of each file, as `read_media` gives it; a file of which nothing can be given is left out.
        batch_size: prompts at a time.
        advance: called with the number of questions answered since.
        max_new_tokens: of an answer.
    """
    dialogues = []
    for file, (frames, sound) in zip(files, media, strict=True):
        items = [item for item in (sound, frames) if item is not None]
        if items:
            encoded = [model.encode(item) for item in items]
            introduction = media_prefix([] if frames is None else [frames], sound)
            dialogues += [_Dialogue(file, turns, introduction, encoded, []) for turns in file.dialogues]  # type: ignore[arg-type]
    for turn in range(max((len(dialogue.turns) for dialogue in dialogues), default=0)):
        open_ones = [dialogue for dialogue in dialogues if len(dialogue.turns) > turn]
        for start in range(0, len(open_ones), batch_size):
            batch = open_ones[start : start + batch_size]
            for dialogue, answer in zip(batch, _answer_batch(model, batch, turn, max_new_tokens), strict=True):
                dialogue.answers.append(answer)
            advance(len(batch))
    return [
        AnsweredQuestion(dialogue.file, question, answer)
        for dialogue in dialogues
        for question, answer in zip(dialogue.turns, dialogue.answers, strict=True)
    ]


@torch.inference_mode()
def _answer_batch(model: VideoLlama, batch: Sequence[_Dialogue], turn: int, max_new_tokens: int) -> list[str]:
    prompts = []
    for dialogue in batch:
        conversation = model.new_conversation()
        introduction: list[object] = dialogue.introduction
        for number in range(turn + 1):
            conversation.append_message(conversation.roles[0], [*introduction, dialogue.turns[number].text])  # type: ignore[list-item]
            conversation.append_message(conversation.roles[1], dialogue.answers[number] if number < turn else None)
            introduction = []
        prompts.append(model.prepare(conversation, dialogue.media))
    embeds, mask = _pad_left([prompt.inputs_embeds[0] for prompt in prompts])
    tokenizer = model.processor.tokenizer
    with computing_on(model.device):
        output = model.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [cut_at_stop(text, prompt.stop_strings).strip() for text, prompt in zip(texts, prompts, strict=True)]


def _pad_left(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, length, width) and (batch, length), 0 on padding."""
    length = max(len(sequence) for sequence in sequences)
    embeds = sequences[0].new_zeros(len(sequences), length, sequences[0].shape[-1])
    mask = torch.zeros(len(sequences), length, dtype=torch.long, device=embeds.device)
    for row, sequence in enumerate(sequences):
        embeds[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = 1
    return embeds, mask
