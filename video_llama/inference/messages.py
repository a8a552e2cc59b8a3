"""Answer and score dialogues in the form of transformers' chat templates, in batches: for engines of evaluation.

{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What?"}]}
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from video_llama.conversation import Conversation
from video_llama.errors import VideoLlamaError
from video_llama.inference.completion import generate_text
from video_llama.inference.engine import EncodedMedia, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.processor.media_processor import MediaProcessor
from video_llama.processor.messages import MessageReader, Messages
from video_llama.prompt_parts import Placeholder
from video_llama.utils.devices import computing_on

__all__ = ["answer_messages", "score_answers"]

Item = TypeVar("Item")
OnError = Callable[[int, VideoLlamaError], object]
"""Called with the number of a dialogue that cannot be used, and why."""


@dataclass(frozen=True)
class _Dialogue:
    """A dialogue that was read: its number, its conversation, and its encoded media."""

    number: int
    conversation: Conversation
    media: list[EncodedMedia]


def answer_messages(
    model: VideoLlama,
    dialogues: Sequence[Messages],
    options: GenerationOptions,
    *,
    batch_size: int = 8,
    media_processor: MediaProcessor | None = None,
    audio: bool = True,
    on_error: OnError | None = None,
) -> list[str]:
    """Answer the last question of each dialogue; template text and stop strings are cut off the answers.

    Args:
        model, options: what answers, and how.
        dialogues: messages as `VideoLlamaProcessor.apply_chat_template` takes them, each ending with a user message.
        batch_size: dialogues that are read, encoded and answered together.
        media_processor: how files are read; by default as the model's processor says.
        audio: use the audio tracks of videos, if the model has an audio branch.
        on_error: called for a dialogue that cannot be used, whose answer is then ""; without it the error is raised.

    Returns:
        the answers, in the order of the dialogues.

    Raises:
        MediaError, MessagesError, VideoLlamaError: a file cannot be read, messages are wrong, or a dialogue is too
            long for the model, and there is no `on_error`.
    """
    answers = [""] * len(dialogues)
    reader = _Reader(model, media_processor or model.processor.media_processor, audio and model.has_audio, on_error)
    for batch in _batches(list(enumerate(dialogues)), batch_size):
        numbers, prompts = [], []
        for dialogue in reader.read(batch):
            prompt = model.prepare(dialogue.conversation.up_to_answer(), dialogue.media)
            if error := model.too_long(prompt, options):
                reader.report(dialogue.number, error)
                continue
            numbers.append(dialogue.number)
            prompts.append(prompt)
        if prompts:
            for number, text in zip(numbers, generate_text(model, prompts, options), strict=True):
                answers[number] = text
    return answers


def score_answers(
    model: VideoLlama,
    dialogues: Sequence[Messages],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
    media_processor: MediaProcessor | None = None,
    audio: bool = True,
    on_error: OnError | None = None,
) -> list[tuple[float, bool]]:
    """Return how likely each answer is: what a multiple choice is decided by.

    Args:
        dialogues, answers: each dialogue ends with the question of the answer with the same number.
        others: as for `answer_messages`.

    Returns:
        for each answer the sum of the log-probabilities of its tokens (not of what ends it), computed in float32, and
        whether each of them was the most likely one. (-inf, False) for a dialogue that `on_error` was called for.

    Raises:
        MediaError, MessagesError, VideoLlamaError: as `answer_messages`.
    """
    scores = [(float("-inf"), False)] * len(dialogues)
    reader = _Reader(model, media_processor or model.processor.media_processor, audio and model.has_audio, on_error)
    for batch in _batches(list(enumerate(dialogues)), batch_size):
        numbers, embeds, ids, is_answer = [], list[Tensor](), list[Tensor](), list[Tensor]()
        for dialogue in reader.read(batch):
            conversation = dialogue.conversation.copy()
            conversation.append_message(conversation.roles[1], answers[dialogue.number])
            parts = conversation.get_parts(model.processor.tokenizer)
            # What the template writes behind the answer is no part of it.
            while parts and (isinstance(parts[-1], Placeholder) or parts[-1].trusted):
                parts.pop()
            encoded, _, embedded = model.splice(parts, dialogue.media)
            numbers.append(dialogue.number)
            embeds.append(embedded[0])
            ids.append(torch.tensor(encoded.input_ids, device=model.device))
            is_answer.append(torch.tensor(encoded.is_answer, device=model.device))
        for number, score in zip(numbers, _score(model, embeds, ids, is_answer), strict=True):
            scores[number] = score
    return scores


@torch.inference_mode()
def _score(
    model: VideoLlama, embeds: Sequence[Tensor], ids: Sequence[Tensor], is_answer: Sequence[Tensor]
) -> list[tuple[float, bool]]:
    """Score the tokens marked in `is_answer`; all of (length, …), padded here on the right."""
    if not embeds:
        return []
    longest = max(len(item) for item in ids)
    inputs = torch.stack([pad(item, (0, 0, 0, longest - len(item))) for item in embeds])
    mask = torch.stack([pad(torch.ones_like(item), (0, longest - len(item))) for item in ids])
    with computing_on(model.device):
        logits = model.model(inputs_embeds=inputs, attention_mask=mask).logits
    scores = []
    for row, tokens, wanted in zip(logits, ids, is_answer, strict=True):
        # The logits at a position are of the token behind it.
        places = wanted.nonzero()[:, 0]
        likelihoods = log_softmax(row[places - 1].float(), dim=-1)
        chosen = likelihoods.gather(1, tokens[places, None])[:, 0]
        is_greedy = bool((likelihoods.argmax(dim=-1) == tokens[places]).all())
        scores.append((float(chosen.sum()), is_greedy))
    return scores


@dataclass(frozen=True)
class _Reader:
    """Read and encode the media of dialogues."""

    model: VideoLlama
    media_processor: MediaProcessor
    read_audio: bool
    on_error: OnError | None

    def read(self, numbered: Sequence[tuple[int, Messages]]) -> list[_Dialogue]:
        """Return the dialogues that can be used, their media encoded together."""
        conversations: list[tuple[int, Conversation, int]] = []
        media = []
        for number, messages in numbered:
            reader = MessageReader(self.media_processor, self.read_audio, has_audio=self.model.has_audio)
            conversation = self.model.new_conversation()
            try:
                reader.fill(conversation, messages)
            except VideoLlamaError as error:
                self.report(number, error)
                continue
            items = [*reader.visuals, *reader.audios]
            conversations.append((number, conversation, len(items)))
            media += items
        # Each dialogue takes its share of the encoded items back, in the same order.
        encoded = iter(self.model.encode_batch(media))
        return [
            _Dialogue(number, conversation, list(itertools.islice(encoded, count)))
            for number, conversation, count in conversations
        ]

    def report(self, number: int, error: VideoLlamaError) -> None:
        """Hand an error on, or raise it."""
        if self.on_error is None:
            raise error
        self.on_error(number, error)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
