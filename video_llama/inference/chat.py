"""A conversation about videos, images and audio that keeps what it has already computed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from video_llama.conversation import Conversation
from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.inference.cache import PrefixCache
from video_llama.inference.engine import Prompt, VideoLlama
from video_llama.inference.explain import Explanation, explain
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.transcript import Transcript
from video_llama.inference.uploads import Decoded, Turn, Upload
from video_llama.media.decode import why_no_audio
from video_llama.media.sources import describe_source
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames

__all__ = ["Chat", "Decoded", "Turn", "Upload"]

logger = logging.getLogger(__name__)


class Chat:
    """Upload files, ask questions, get answers; many files and many turns.

    Each file is decoded and encoded once. The language model's keys and values of earlier turns are kept, so a later
    turn computes only its own tokens; its answer is that of a fresh start.

    Example:
        >>> chat = Chat(load_pretrained_model("video-llama-tiny"))
        >>> chat.upload_video("clip.mp4")
        >>> chat("What is happening?", max_new_tokens=64)
        >>> chat.ask("And what is in the audio?")
        >>> for piece in chat.stream_answer():
        ...     print(piece, end="", flush=True)

    Args:
        model: the loaded model; several chats may share one, but not generate at the same time.
        conversation: template and system prompt; by default those of the weights.
        media_processor: how files are read; by default as the model's processor says.
        allow_urls: download media that are http or https addresses, as `MediaProcessor.allow_urls` does.
        options: how answers are generated, unless a turn says otherwise; greedy by default.

    Attributes:
        turns: the questions and answers so far.
        dropped_turns: how many of the oldest turns no longer fit the model's context; their media are still in it.
    """

    def __init__(
        self,
        model: VideoLlama,
        conversation: Conversation | None = None,
        *,
        media_processor: MediaProcessor | None = None,
        allow_urls: bool = False,
        options: GenerationOptions | None = None,
    ) -> None:
        self.model = model
        self.template = (conversation or model.new_conversation()).copy()
        self.media_processor = media_processor or model.processor.media_processor
        if allow_urls:
            self.media_processor = replace(self.media_processor, allow_urls=True)
        self.options = options or GenerationOptions()
        self.turns: list[Turn] = []
        self.dropped_turns = 0
        self._cache = PrefixCache()

    def __repr__(self) -> str:
        files = sum(len(turn.uploads) for turn in self.turns)
        answers = sum(turn.answer is not None for turn in self.turns)
        return f"Chat({self.model!r}, files={files}, answers={answers})"

    def show(self) -> Transcript:
        """Return the conversation to look at: the last line of a cell shows it with its frames, `print` as text."""
        return Transcript(self.turns)

    def upload_video(self, path: Any, *, num_frames: int | None = None) -> Upload:
        """Add a video with, if file and model have audio, its audio track; arguments as for `decode_video`."""
        return self.add(self.decode_video(path, num_frames=num_frames))

    def upload_video_without_audio(self, path: Any, *, num_frames: int | None = None) -> Upload:
        """Add the frames of a video."""
        return self.add(self.decode_video(path, num_frames=num_frames, listen=False))

    def upload_img(self, path: Any) -> Upload:
        """Add a still image: a video of one frame."""
        return self.add(self.decode_img(path))

    def upload_audio(self, path: Any) -> Upload:
        """Add an audio file, or the audio track of a video without its frames; errors as of `decode_audio`."""
        return self.add(self.decode_audio(path))

    def explain(self, upload: Upload | None = None) -> Explanation:
        """Return each frame's and segment's share of the attention in a file, by default the last one.

        Raises:
            VideoLlamaError: no file was added.
        """
        files = [file for turn in self.turns for file in turn.uploads]
        if upload is not None:
            files = [upload]
        if not files:
            raise VideoLlamaError("there is no file to explain; add one with upload_video(path) first")
        return explain(self.model, files[-1])

    # The two halves of an upload, for callers that show progress: `decode_…`, then `add`.

    def decode_video(self, path: Any, *, num_frames: int | None = None, listen: bool = True) -> Decoded:
        """Read a video; if its audio track cannot be decoded, `sound` of the result says so.

        Args:
            path: as for `MediaProcessor.process_video`.
            num_frames: frames to sample; by default as many as the model was trained with.
            listen: read the audio track as well.

        Raises:
            MediaError: the video cannot be read.
        """
        processor = self.media_processor
        clip = processor.decoder(listen and self.model.has_audio, num_frames).video(path)
        frames = processor.finish_frames(clip)
        source = clip.source
        if not listen:
            return Decoded(source, frames, None, "not listened to")
        if clip.audio is None:
            return Decoded(source, frames, None, "the model has no audio branch")
        # A video without usable audio still has its frames. `sound` then says why there is no audio.
        try:
            if isinstance(clip.audio, MediaError):
                raise clip.audio
            return self._decoded(source, frames, processor.finish_segments(clip.audio))
        except MediaError as error:
            if not isinstance(error, NoAudioTrackError):
                logger.warning("the audio track is left out: %s", error)
            return Decoded(source, frames, None, why_no_audio(error))

    def decode_img(self, path: Any) -> Decoded:
        """Read a still image, as `MediaProcessor.process_image` does; `MediaError` if that is impossible."""
        image = self.media_processor.process_image(path)
        return Decoded(image.source, image, None, "an image has no sound")

    def decode_audio(self, path: Any) -> Decoded:
        """Read an audio file, the audio track of a video, or samples, as `MediaProcessor.process_audio` does.

        Raises:
            MediaError: there is no audio, or it cannot be decoded.
            VideoLlamaError: the model has no audio branch.
        """
        if not self.model.has_audio:
            raise VideoLlamaError(
                f"{describe_source(path)}: the model has no audio branch; "
                "load it with equip_audio_branch and an AL_*.pth checkpoint"
            )
        audio = self.media_processor.process_audio(path)
        return self._decoded(audio.source, None, audio)

    def _decoded(self, source: str, frames: VideoFrames | None, audio: AudioSegments) -> Decoded:
        seconds = self.media_processor.log_mel.segment_seconds
        return Decoded(source, frames, audio, "heard", segment_seconds=seconds)

    def add(self, decoded: Decoded) -> Upload:
        """Encode what was read of a file, and put it in front of the next question."""
        media = (decoded.audio, decoded.frames)
        encoded = tuple(self.model.encode(item) for item in media if item is not None)
        # A copy leaves out the samples that the segments were made of: nobody needs them any more.
        audio = None if decoded.audio is None else replace(decoded.audio)
        seconds = decoded.segment_seconds
        upload = Upload(decoded.source, decoded.frames, audio, decoded.sound, encoded, segment_seconds=seconds)
        self._open_turn().uploads.append(upload)
        return upload

    def __call__(self, question: str, **options: Any) -> str:
        """Ask a question and return its answer: `ask` and `answer` in one call; options and errors as of `answer`."""
        self.ask(question)
        return self.answer(**options)

    def ask(self, text: str) -> None:
        """Ask a question; text that is asked before an answer joins the question with a space."""
        turn = self._open_turn()
        turn.question = text if turn.question is None else f"{turn.question} {text}"

    def answer(self, **options: Any) -> str:
        """Answer the open question; `options` are fields of `GenerationOptions` that differ for this answer.

        Raises:
            VideoLlamaError: nothing was asked, or the question with its media does not fit the model's context.
        """
        chosen = self.options.changed(options)
        text = self.model.complete(self._prompt(chosen), chosen, self._cache)
        self._open_turn().answer = text
        return text

    def stream_answer(self, *, stop: threading.Event | None = None, **options: Any) -> Generator[str]:
        """Answer in pieces; closing the iterator stops, and the text up to then is the answer.

        `stop`, set from another thread, ends the answer as well, even before beam search has its first piece.
        """
        chosen = self.options.changed(options)
        prompt, text = self._prompt(chosen), ""
        try:
            for piece in self.model.stream(prompt, chosen, self._cache, stop):
                text += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            # The caller closed the iterator, or Ctrl-C: the text that was seen becomes the answer.
            self._open_turn().answer = text
            raise
        self._open_turn().answer = text

    def undo(self) -> Turn | None:
        """Take back the last turn with its uploads, and return it; None if there is none."""
        if not self.turns:
            return None
        undone = self.turns.pop()
        # The dropped turns are the oldest ones, so there cannot be more of them than turns.
        self.dropped_turns = min(self.dropped_turns, len(self.turns))
        return undone

    def reset(self) -> None:
        """Remove all turns and free what was kept for them."""
        self.turns.clear()
        self.dropped_turns = 0
        self._cache.clear()

    def conversation(self, first_turn: int = 0) -> Conversation:
        """Return the turns as a conversation; media of turns before `first_turn` are introduced in that one."""
        conversation = self.template.copy()
        introduction: list[Any] = []
        for number, turn in enumerate(self.turns):
            for upload in turn.uploads:
                introduction += upload.introduction
            # Media of turns that are left out are carried along until the first turn that stays.
            if number >= first_turn and turn.question is not None:
                conversation.append_message(conversation.roles[0], [*introduction, turn.question])
                conversation.append_message(conversation.roles[1], turn.answer)
                introduction = []
        return conversation

    def _open_turn(self) -> Turn:
        """Return the turn that has no answer yet; a new one if all have."""
        if not self.turns or self.turns[-1].answer is not None:
            self.turns.append(Turn())
        return self.turns[-1]

    def _prompt(self, options: GenerationOptions) -> Prompt:
        """Return the prompt of the open question, without the oldest turns if it would be too long with them."""
        if self._open_turn().question is None:
            raise VideoLlamaError("nothing was asked; call ask(text) first")
        media = [item for turn in self.turns for upload in turn.uploads for item in upload.encoded]
        # Turns that were left out before stay out, so that what is computed of the others can be reused.
        conversation = self.conversation(self.dropped_turns)
        prompt, num_dropped = self.model.prepare_fitting(conversation, media, options)
        if num_dropped:
            self.dropped_turns += num_dropped
            logger.warning("the conversation is too long: its first %d turn(s) are left out", self.dropped_turns)
        return prompt
