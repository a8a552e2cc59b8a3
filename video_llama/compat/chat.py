"""`Chat` as the original's demos use it: the caller keeps the conversation and the list of encoded media."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_llama.conversation import Conversation, SeparatorStyle, conv_templates
from video_llama.inference.chat import Chat as MediaReader
from video_llama.inference.chat import Decoded
from video_llama.inference.completion import answer_text, generate_one
from video_llama.inference.engine import EncodedMedia, VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.processor.media_processor import MediaProcessor
from video_llama.prompt_parts import media_prefix

__all__ = [
    "Chat",
    "Conversation",
    "SeparatorStyle",
    "conv_llava_llama_2",
    "conv_templates",
    "default_conversation",
]

default_conversation = conv_templates["default"].copy()
conv_llava_llama_2 = conv_templates["llama_2"].copy()


class Chat:
    """Answer questions about media that the caller keeps in a conversation and a list.

    Args:
        model: from `registry.get_model_class(…).from_config(…)`.
        vis_processor: how frames are read.
        device: where the model is moved to; by default it stays where it is.
    """

    def __init__(
        self, model: VideoLlama, vis_processor: MediaProcessor, device: str | torch.device | None = None
    ) -> None:
        if device is not None and torch.device(device) != model.device:
            model.to(device)
        self.model = model
        self.vis_processor = vis_processor
        self._reader = MediaReader(model, media_processor=vis_processor)

    def upload_video(self, video_path: str | Path, conv: Conversation, img_list: list[EncodedMedia]) -> str:
        """Add a video with its audio, if file and model have audio; `MediaError` if it cannot be read."""
        return self._add(self._reader.decode_video(video_path), conv, img_list)

    def upload_video_without_audio(
        self, video_path: str | Path, conv: Conversation, img_list: list[EncodedMedia]
    ) -> str:
        """Add the frames of a video; `MediaError` if it cannot be read."""
        return self._add(self._reader.decode_video(video_path, listen=False), conv, img_list)

    def upload_img(self, image: str | Path, conv: Conversation, img_list: list[EncodedMedia]) -> str:
        """Add a still image; `MediaError` if it cannot be read."""
        return self._add(self._reader.decode_img(image), conv, img_list)

    def ask(self, text: str, conv: Conversation) -> None:
        """Ask a question; directly after an upload it joins the message of the media."""
        conv.ask(text)

    def answer(
        self,
        conv: Conversation,
        img_list: list[EncodedMedia],
        max_new_tokens: int = 300,
        num_beams: int = 1,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        max_length: int = 2000,
    ) -> tuple[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """Answer the last question, and put the answer into the conversation; sampled, as in the original.

        `min_length` counts the answer alone and `max_length` all tokens, as there. What does not fit into `max_length`
        or into the model's context loses its oldest turns, not its first tokens.

        Returns:
            the answer, and the ids of its tokens.

        Raises:
            VideoLlamaError: the last question alone, with its media, is too long.
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            min_new_tokens=max(1, min_length),
            num_beams=num_beams,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            temperature=temperature,
        )
        question = self.model.in_own_template(conv).up_to_answer()
        prompt, _ = self.model.prepare_fitting(question, img_list, options)
        ids = generate_one(self.model, prompt, options.within(len(prompt.keys), max_length, None), None)
        text = answer_text(self.model, ids, prompt.stop_strings)
        conv.append_message(conv.roles[1], text)
        return text, np.asarray(ids)

    def _add(self, decoded: Decoded, conv: Conversation, img_list: list[EncodedMedia]) -> str:
        img_list += [self.model.encode(item) for item in (decoded.audio, decoded.frames) if item is not None]
        introduction = media_prefix([] if decoded.frames is None else [decoded.frames], decoded.audio)
        # `ask` puts the space between media and question.
        if introduction[-1] == " ":
            introduction.pop()
        conv.append_message(conv.roles[0], introduction)
        return "Received."
