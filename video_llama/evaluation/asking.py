"""Ask many files many questions, in batches, as a chat would ask each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_llama.constants import Modality
from video_llama.conversation import Conversation
from video_llama.evaluation.ablation import Media
from video_llama.inference.completion import generate_text
from video_llama.inference.engine import EncodedMedia, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.prompt_parts import media_prefix

__all__ = ["AnsweredQuestion", "AskedFile", "Question", "answer_dialogues", "read_media"]


@dataclass(frozen=True)
class Question:
    """One turn of a dialogue.

    Attributes:
        dialogue, turn: numbers of the dialogue within the file, from 0, and of the turn within the dialogue, from 1.
        attribute, value: what is asked about, and the right answer's value.
        text: the question.
    """

    dialogue: int
    turn: int
    attribute: str
    value: str
    text: str


@dataclass(frozen=True)
class AskedFile:
    """One file and the questions about it.

    Attributes:
        path: of the file.
        modality: how it is read.
        is_seen: training may show this combination of attributes; True for audio.
        dialogues: each a list of turns.
    """

    path: Path
    modality: Modality
    is_seen: bool
    dialogues: list[list[Question]]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question about a file, and the model's answer."""

    file: AskedFile
    question: Question
    answer: str


@dataclass
class _Dialogue:
    """A dialogue with the answers so far."""

    file: AskedFile
    turns: list[Question]
    introduction: list[Any]
    media: list[EncodedMedia]
    answers: list[str] = field(default_factory=list)

    def conversation(self, template: Conversation) -> Conversation:
        """Return the turns that are answered and the next question."""
        conversation, introduction = template.copy(), self.introduction
        # None stands for the answer to come. `zip` stops there, so later questions are left out.
        for question, answer in zip(self.turns, [*self.answers, None], strict=False):
            conversation.append_message(conversation.roles[0], [*introduction, question.text])
            conversation.append_message(conversation.roles[1], answer)
            # Media are introduced before the first question only.
            introduction = []
        return conversation


def read_media(model: VideoLlama, path: Path, modality: Modality) -> Media:
    """Return the frames and, if model and file have any, the audio of a file; `MediaError` if it cannot be read."""
    processor = model.processor.media_processor
    if modality == "image":
        return processor.process_image(path), None
    if modality == "video":
        return processor.process_video(path, audio=model.has_audio)
    return None, processor.process_audio(path) if model.has_audio else None


def answer_dialogues(
    model: VideoLlama,
    files: Sequence[AskedFile],
    media: Sequence[Media],
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda count: None,
    max_new_tokens: int = 40,
) -> list[AnsweredQuestion]:
    """Answer all questions of all files greedily; a later turn has the model's own earlier answers before it.

    Args:
        model, files: what answers, and what is asked.
        media: of each file, from `read_media`; a file without any is left out.
        batch_size: prompts at a time.
        advance: called with the number of questions answered since.
        max_new_tokens: of an answer.
    """
    # The media of a file are encoded once for all its dialogues.
    dialogues: list[_Dialogue] = []
    for file, (frames, audio) in zip(files, media, strict=True):
        encoded = [model.encode(item) for item in (audio, frames) if item is not None]
        introduction = media_prefix([] if frames is None else [frames], audio)
        if encoded:
            dialogues += [_Dialogue(file, turns, introduction, encoded) for turns in file.dialogues]
    # Turn by turn: a later question has the answers to the earlier ones before it.
    options = GenerationOptions(max_new_tokens=max_new_tokens, min_new_tokens=0)
    template = model.new_conversation()
    for turn in range(max((len(dialogue.turns) for dialogue in dialogues), default=0)):
        unanswered = [dialogue for dialogue in dialogues if len(dialogue.turns) > turn]
        for start in range(0, len(unanswered), batch_size):
            batch = unanswered[start : start + batch_size]
            prompts = [model.prepare(dialogue.conversation(template), dialogue.media) for dialogue in batch]
            for dialogue, answer in zip(batch, generate_text(model, prompts, options), strict=True):
                dialogue.answers.append(answer)
            advance(len(batch))
    return [
        AnsweredQuestion(dialogue.file, question, answer)
        for dialogue in dialogues
        for question, answer in zip(dialogue.turns, dialogue.answers, strict=True)
    ]
