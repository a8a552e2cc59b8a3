"""Captions and dialogues of the generated world as tokens, without any media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase

from examples.tiny_world.pretraining.architecture import CONV_TEMPLATE
from examples.tiny_world.world.facts import Facts, facts_of
from examples.tiny_world.world.language import FOLLOW_UPS, QUESTIONS
from examples.tiny_world.world.samples import STREAMS, Sample, random_sample
from examples.tiny_world.world.vocabulary import ATTRIBUTES
from video_llama.conversation import conv_templates
from video_llama.data.tokenization import Turn, build_caption_sample, build_conversation_sample, video_instruct_turns
from video_llama.media.sampling import frame_times_message, sample_uniform_indices
from video_llama.processor.captions import BlipCaptionProcessor
from video_llama.prompt_parts import audio_prefix, image_prefix, video_prefix, video_with_audio_prefix

__all__ = ["END", "TextSample", "TextWriter", "facts_of_sample", "tokenizer_texts"]

END = "</s>"
_MAX_TOKENS = 400
_NUM_FRAMES = 8
_CAPTION_SHARE = 0.2

_clean = BlipCaptionProcessor()


@dataclass(frozen=True)
class TextSample:
    """One text with the facts that stand in for its media.

    Attributes:
        input_ids, labels: of equal length.
        visible: facts for the placeholders of frames; None without frames.
        audible: facts for the placeholders of audio; None without audio.
    """

    input_ids: list[int]
    labels: list[int]
    visible: Facts | None
    audible: Facts | None


class TextWriter:
    """Draws texts of all kinds that the training stages use.

    Args:
        tokenizer: of the language model.
        image, audio: id of the placeholders, and how many of them.
        seed: of the samples, which are of the training split: nothing held out is in them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image: tuple[int, int], audio: tuple[int, int], seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._image, self._audio = image, audio
        self._seed = seed

    def __call__(self, rng: Generator) -> TextSample:
        """Return a random text."""
        stream = str(rng.choice(["clip", "clip", "clip", "image", "sound"]))
        sample = random_sample(self._seed, "train", stream, int(rng.integers(2**31)))
        seen, heard = facts_of_sample(sample)
        if rng.random() < _CAPTION_SHARE:
            return self.caption(sample.caption, seen, heard if seen is None else None)
        if sample.kind == "image":
            return self._dialogue(_after(image_prefix(), _spaced(sample.visual_turns, rng)), seen, None)
        if sample.kind == "sound":
            return self._dialogue(_after([*audio_prefix(), " "], sample.sound_turns), None, heard)
        return self._clip_dialogue(sample, seen, heard, rng)

    def caption(self, text: str, visible: Facts | None, audible: Facts | None) -> TextSample:
        """Return a caption behind the media, as in stage 1."""
        tokens = build_caption_sample(
            _clean(text),
            self._tokenizer,
            placeholder=self._image if audible is None else self._audio,
            end_sym=END,
            max_txt_len=_MAX_TOKENS,
        )
        return TextSample(**tokens, visible=visible, audible=audible)

    def _clip_dialogue(self, sample: Sample, seen: Facts | None, heard: Facts | None, rng: Generator) -> TextSample:
        indices = sample_uniform_indices(sample.num_frames, _NUM_FRAMES)
        message = frame_times_message([index / sample.fps for index in indices])
        # Sometimes the audio track of a clip alone.
        if heard is not None and rng.random() < 0.2:
            return self._dialogue(_after([*audio_prefix(), " "], sample.sound_turns), None, heard)
        with_sound = heard is not None and rng.random() < 0.6
        turns = _spaced(sample.mixed_turns if with_sound or heard is None else sample.visual_turns, rng)
        if with_sound:
            return self._dialogue(_after([*video_with_audio_prefix(), " "], turns), seen, heard)
        return self._dialogue(
            video_instruct_turns([{"q": question, "a": answer} for question, answer in turns], message), seen, None
        )

    def _dialogue(self, turns: Sequence[Turn], visible: Facts | None, audible: Facts | None) -> TextSample:
        conversation = conv_templates[CONV_TEMPLATE].copy()
        for turn in turns:
            for role, content in zip(conversation.roles, turn, strict=True):
                conversation.append_message(role, content)
        tokens = build_conversation_sample(
            conversation,
            self._tokenizer,
            placeholder_ids={"image": self._image[0], "audio": self._audio[0]},
            placeholder_lengths={"image": self._image[1], "audio": self._audio[1]},
            max_txt_len=_MAX_TOKENS,
        )
        return TextSample(**tokens, visible=visible, audible=audible)


def facts_of_sample(sample: Sample) -> tuple[Facts | None, Facts | None]:
    """Return the visible and the audible facts of a sample."""
    seen = None if sample.scene is None else facts_of(sample.scene, None)
    return seen, None if sample.sound is None else facts_of(None, sample.sound)


def _spaced(turns: Sequence[tuple[str, str]], rng: Generator) -> Sequence[tuple[str, str]]:
    """Return turns, half of them with one more space in front: chats have two behind media, training has one."""
    first, *others = turns
    return [(f" {first[0]}", first[1]), *others] if rng.random() < 0.5 else turns


def _after(prefix: Sequence[object], turns: Sequence[tuple[str, str]]) -> list[Turn]:
    """Return turns with media in front of the first question."""
    first, *others = turns
    return [([*prefix, first[0]], first[1]), *others]  # type: ignore[list-item]


def tokenizer_texts(seed: int, count: int = 3000) -> list[str]:
    """Return texts to train the tokenizer on: captions, dialogues and the words around media."""
    words = [f" {word}" for words in ATTRIBUTES.values() for word in words] * 100
    texts = [*words, *(line for lines in (*QUESTIONS.values(), *FOLLOW_UPS.values()) for line in lines)]
    for index in range(count):
        stream = STREAMS[index % 3]
        sample = random_sample(seed, "train", stream, index)
        turns = [*sample.visual_turns, *sample.sound_turns, *sample.mixed_turns]
        texts += [_clean(sample.caption), *(line for turn in turns for line in turn)]
    rng = np.random.default_rng(seed)
    media = [video_with_audio_prefix(), audio_prefix(), image_prefix()]
    for _ in range(count // 3):
        times = np.sort(rng.uniform(0, 4, size=_NUM_FRAMES)).tolist()
        media.append(video_prefix(frame_times_message(times)))
        media += media[:3]
    texts += ["".join(part if isinstance(part, str) else " " for part in parts) for parts in media]
    texts += ["[INST] <<SYS>>\n \n<</SYS>>\n\n", " [/INST] "] * (count // 10)
    return texts
