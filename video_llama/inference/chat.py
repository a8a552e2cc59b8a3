"""A conversation about videos, images and sound that remembers what it has already computed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from video_llama.conversation import Conversation
from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.inference.engine import EncodedMedia, Prompt, VideoLlama
from video_llama.inference.generation import GenerationOptions, PrefixCache
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.prompt_parts import media_prefix

__all__ = ["Chat", "Decoded", "Turn", "Upload"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decoded:
    """A file that was read, and what came of it.

    Args:
        source: the file.
        frames: what the model will see; None for a sound file.
        audio: what the model will hear; None if there is nothing to hear.
        sound: one phrase for people: "heard", "no sound track", "not listened to", or why it cannot be decoded.
    """

    source: str
    frames: VideoFrames | None
    audio: AudioSegments | None
    sound: str


@dataclass(frozen=True, eq=False)
class Upload(Decoded):
    """A file of a conversation: what was read of it, and its features.

    Args:
        encoded: the features, in the order of the introduction's placeholders.
    """

    encoded: tuple[EncodedMedia, ...]

    @property
    def introduction(self) -> list[Any]:
        """The words and placeholders that introduce the file in a prompt."""
        return media_prefix([] if self.frames is None else [self.frames], self.audio)


@dataclass
class Turn:
    """One question with the files uploaded before it, and its answer once there is one."""

    uploads: list[Upload] = field(default_factory=list)
    question: str | None = None
    answer: str | None = None


class Chat:
    """Upload files, ask questions, get answers; many files and many turns.

    Each file is decoded and encoded once. The language model's keys and values of earlier turns are kept, so
    a later turn computes only its own tokens and still gives the tokens that a fresh start would give.

    Args:
        model: the loaded model; many chats may share one, but not generate at the same time.
        conversation: template and system prompt; by default those that belong to the weights.
        media_processor: how files are read; by default as the model's processor says.
        options: how answers are drawn, for every turn that does not say otherwise; greedy by default.
    """

    def __init__(
        self,
        model: VideoLlama,
        conversation: Conversation | None = None,
        *,
        media_processor: MediaProcessor | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        self.model = model
        self.template = (conversation or model.new_conversation()).copy()
        self.media_processor = media_processor or model.processor.media_processor
        self.options = options or GenerationOptions()
        self.turns: list[Turn] = []
        self.dropped_turns = 0
        """How many of the oldest turns no longer fit the model's context; their media are still in it."""
        self._cache = PrefixCache()

    def upload_video(self, path: str | Path, *, num_frames: int | None = None) -> Upload:
        """Show a video and, if the model can hear and the file has a sound track, let it be heard.

        Args, Raises: as for `decode_video`.
        """
        return self.add(self.decode_video(path, num_frames=num_frames))

    def upload_video_without_audio(self, path: str | Path, *, num_frames: int | None = None) -> Upload:
        """Show a video and do not listen to it."""
        return self.add(self.decode_video(path, num_frames=num_frames, listen=False))

    def upload_img(self, path: str | Path) -> Upload:
        """Show a still image: a video of one frame."""
        return self.add(self.decode_img(path))

    def upload_audio(self, path: str | Path) -> Upload:
        """Play a sound file, or the sound track of a video without its frames.

        Raises: as `decode_audio`.
        """
        return self.add(self.decode_audio(path))

    def decode_video(self, path: str | Path, *, num_frames: int | None = None, listen: bool = True) -> Decoded:
        """The first half of `upload_video`, for those who show how far they are; `add` is the second.

        A sound track that cannot be decoded does not hide the video: the result says so in `sound`.

        Args:
            path: the file.
            num_frames: frames to look at; by default as many as the model was trained with.
            listen: to its sound track as well.

        Raises:
            MediaError: the video cannot be read.
        """
        frames, _ = self.media_processor.process_video(path, num_frames=num_frames, audio=False)
        if not listen:
            return Decoded(str(path), frames, None, "not listened to")
        audio, sound = self._listen(path) if self.model.has_audio else (None, "the model has no audio branch")
        return Decoded(str(path), frames, audio, sound)

    def decode_img(self, path: str | Path) -> Decoded:
        """The first half of `upload_img`."""
        return Decoded(str(path), self.media_processor.process_image(path), None, "an image has no sound")

    def decode_audio(self, path: str | Path) -> Decoded:
        """The first half of `upload_audio`.

        Raises:
            MediaError: there is no sound to decode.
            VideoLlamaError: the model was built without its audio branch.
        """
        if not self.model.has_audio:
            raise VideoLlamaError(
                f"{path}: the model has no audio branch; load it with equip_audio_branch and an AL_*.pth checkpoint"
            )
        return Decoded(str(path), None, self.media_processor.process_audio(path), "heard")

    def add(self, decoded: Decoded) -> Upload:
        """Encode what was read of a file and put it into the conversation, before the next question."""
        media = (decoded.audio, decoded.frames)
        encoded = tuple(self.model.encode(item) for item in media if item is not None)
        audio = None if decoded.audio is None else replace(decoded.audio)  # without what it was made of: it is encoded
        upload = Upload(decoded.source, decoded.frames, audio, decoded.sound, encoded)
        self._open_turn().uploads.append(upload)
        return upload

    def ask(self, text: str) -> None:
        """Put a question; text asked before an answer is given joins the question with a space."""
        turn = self._open_turn()
        turn.question = text if turn.question is None else f"{turn.question} {text}"

    def answer(self, **options: Any) -> str:
        """Answer the open question.

        Args:
            options: fields of `GenerationOptions` that differ from the chat's, for this answer.

        Raises:
            VideoLlamaError: nothing was asked, or the question with its media does not fit the model's context.
        """
        chosen = self.options.changed(options)
        text = self.model.complete(self._prompt(chosen), chosen, self._cache)
        self._open_turn().answer = text
        return text

    def stream_answer(self, *, stop: threading.Event | None = None, **options: Any) -> Generator[str]:
        """Like `answer`, in pieces; closing the iterator stops, and what was said until then is the answer.

        Args:
            stop: set from another thread, it ends the answer, too, and even one that beam search has not begun to say.
            options: as for `answer`.
        """
        chosen = self.options.changed(options)
        prompt, said = self._prompt(chosen), ""
        try:
            for piece in self.model.stream(prompt, chosen, self._cache, stop):
                said += piece
                yield piece
        except GeneratorExit:  # the listener left: what was said until then stays said
            self._open_turn().answer = said
            raise
        self._open_turn().answer = said

    def undo(self) -> Turn | None:
        """Take back the last turn, its uploads too, and return it; None if there is none."""
        undone = self.turns.pop() if self.turns else None
        self.dropped_turns = min(self.dropped_turns, len(self.turns))
        return undone

    def reset(self) -> None:
        """Forget all turns and free what was kept for them."""
        self.turns.clear()
        self.dropped_turns = 0
        self._cache.clear()

    def conversation(self, first_turn: int = 0) -> Conversation:
        """The turns as a conversation in the chat's template.

        Args:
            first_turn: leave out the words of earlier turns; their media are introduced in this one.
        """
        conversation = self.template.copy()
        introduction: list[Any] = []
        for number, turn in enumerate(self.turns):
            for upload in turn.uploads:
                introduction += upload.introduction
            if number >= first_turn and turn.question is not None:
                conversation.append_message(conversation.roles[0], [*introduction, turn.question])
                conversation.append_message(conversation.roles[1], turn.answer)
                introduction = []
        return conversation

    def _listen(self, path: str | Path) -> tuple[AudioSegments | None, str]:
        try:
            audio = self.media_processor.process_audio(path)
        except NoAudioTrackError:
            return None, "no sound track"
        except MediaError as error:
            logger.warning("the sound track is left out: %s", error)
            return None, f"sound track cannot be decoded: {error.reason}"
        return audio, "heard"

    def _open_turn(self) -> Turn:
        """The turn that has no answer yet; a new one if all have."""
        if not self.turns or self.turns[-1].answer is not None:
            self.turns.append(Turn())
        return self.turns[-1]

    def _prompt(self, options: GenerationOptions) -> Prompt:
        """The prompt of the open question, without the oldest turns' words where all of it would be too long."""
        if self._open_turn().question is None:
            raise VideoLlamaError("nothing was asked; call ask(text) first")
        media = [item for turn in self.turns for upload in turn.uploads for item in upload.encoded]
        dropped = self.dropped_turns
        prompt = self.model.prepare(self.conversation(dropped), media)
        while error := self.model.too_long(prompt, options):
            dropped += 1
            if dropped >= len(self.turns):
                raise error
            prompt = self.model.prepare(self.conversation(dropped), media)
        if dropped > self.dropped_turns:
            logger.warning("the conversation is too long: its first %d turn(s) are no longer read", dropped)
            self.dropped_turns = dropped
        return prompt
