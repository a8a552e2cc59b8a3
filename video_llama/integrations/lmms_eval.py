"""The model `video_llama` of lmms-eval, which finds it by the entry point `lmms_eval.models`.

python -m lmms_eval --model video_llama --model_args pretrained=FOLDER --tasks mvbench --batch_size 8

Answers come from the package's own batches, the same as of `Chat`. docs/evaluation.md has the commands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.inference.load import load_pretrained_model
from video_llama.inference.messages import answer_messages, score_answers
from video_llama.media.containers import media_kind
from video_llama.utils.devices import execution_device

__all__ = ["VideoLlamaChat", "VideoLlamaSimple", "manifest"]

# Keys of a task's generation settings that are about other models' images.
_OF_OTHER_MODELS = ("image_aspect_ratio",)


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest(
        model_id="video_llama",
        simple_class_path=f"{__name__}.VideoLlamaSimple",
        chat_class_path=f"{__name__}.VideoLlamaChat",
    )


class _VideoLlama(lmms):
    """Both interfaces of lmms-eval; they differ in how a request names its media.

    Args:
        pretrained: as `load_pretrained_model` takes it.
        batch_size: questions answered together, of each process.
        device: by default a GPU if there is one, each process its own.
        num_frames: frames of each video; by default as many as the model was trained with.
        audio: use the audio tracks of videos, if the model has an audio branch.
        max_new_tokens: of an answer, where the task does not say.
        others: as of `load_pretrained_model`: `model_base`, `dtype`, `load_in_8bit`, `load_in_4bit`, `device_map`.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        num_frames: int | None = None,
        audio: bool = True,
        max_new_tokens: int = 128,
        **others: Any,
    ) -> None:
        super().__init__()
        self.model = load_pretrained_model(pretrained, device=_device_of_process(device), **others)
        media = self.model.processor.media_processor
        self.media_processor = replace(media, num_frames=num_frames or media.num_frames)
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.audio = audio
        self.max_new_tokens = max_new_tokens
        self.num_errors = 0
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def device(self) -> Any:
        """Return the device of the model's inputs; lmms-eval gathers sizes on it."""
        return execution_device(self.model.model.get_input_embeddings())

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request; one whose media cannot be read is logged and answered by nothing."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for settings, numbers in _grouped(self._generation_settings(request) for request in requests):
                options, until = self._options(dict(settings))
                for batch in _batches(numbers, self.batch_size):
                    texts = answer_messages(
                        self.model,
                        [self._messages(requests[number]) for number in batch],
                        options,
                        batch_size=self.batch_size,
                        media_processor=self.media_processor,
                        audio=self.audio,
                        on_error=self._report,
                    )
                    for number, text in zip(batch, texts, strict=True):
                        answers[number] = cut_at_stop(text, until).strip()
                        self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return how likely each request's continuation is, and whether it is the most likely one."""
        scores: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in _batches(requests, self.batch_size):
                scores += score_answers(
                    self.model,
                    [self._simple_messages(*_context(request)) for request in batch],
                    [self._continuation(request) for request in batch],
                    batch_size=self.batch_size,
                    media_processor=self.media_processor,
                    audio=self.audio,
                    on_error=self._report,
                )
                bar.update(len(batch))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks that ask again after each answer."""
        raise NotImplementedError("video_llama does not run tasks of several rounds (generate_until_multi_round)")

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _generation_settings(self, request: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def _options(self, settings: dict[str, Any]) -> tuple[GenerationOptions, list[str]]:
        """Return the generation options of a task's settings, and the texts that end an answer."""
        until = settings.pop("until", None) or []
        if isinstance(until, str):
            until = [until]
        settings.setdefault("max_new_tokens", self.max_new_tokens)
        for name in _OF_OTHER_MODELS:
            settings.pop(name, None)
        # lmms-eval's tasks write do_sample: false beside any temperature, which then has no effect.
        if settings.get("do_sample") is False or settings.get("temperature") == 0:
            settings = {name: value for name, value in settings.items() if name not in ("do_sample", "temperature")}
        return GenerationOptions.from_call(settings), list(until)

    def _continuation(self, request: Any) -> str:
        target = request.args[1]
        if isinstance(target, str):
            return target.strip()
        return str(target(self._document(request))).strip()

    def _document(self, request: Any) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _simple_messages(self, context: str, visuals: Any, request: Any) -> list[dict[str, Any]]:
        """Return a question with the media that a task's `doc_to_visual` gives: paths, images or decoded audio."""
        items = [_item(visual) for visual in visuals(self._document(request)) or ()]
        return [{"role": "user", "content": [*items, {"type": "text", "text": context}]}]

    def _report(self, number: int, error: VideoLlamaError) -> None:
        self.num_errors += 1
        logger.error(f"counted as wrong, {self.num_errors} in all so far: {error}")


class VideoLlamaChat(_VideoLlama):
    """Requests as messages: `doc_to_messages` of a task."""

    is_simple = False

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        messages = ChatMessages(messages=request.args[1](self._document(request)))
        return list(messages.to_hf_messages())

    def _generation_settings(self, request: Any) -> Mapping[str, Any]:
        return dict(request.args[2])


class VideoLlamaSimple(_VideoLlama):
    """Requests as a text and a list of media: `doc_to_text` and `doc_to_visual` of a task."""

    is_simple = True

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        return self._simple_messages(request.args[0], request.args[2], request)

    def _generation_settings(self, request: Any) -> Mapping[str, Any]:
        return dict(request.args[1])


def _device_of_process(device: str | None) -> str | None:
    """Return the device of this process; `cuda`, lmms-eval's default, is a GPU if there is one."""
    import torch

    if device is not None and not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        return None
    if device in (None, "cuda") and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def _context(request: Any) -> tuple[str, Any, Any]:
    """Return the text, the function that gives the media, and the request itself, of a request of likelihood."""
    return request.args[0], request.args[2], request


def _item(visual: Any) -> dict[str, Any]:
    """Return the content item of one medium."""
    if isinstance(visual, Image.Image):
        return {"type": "image", "image": visual}
    if isinstance(visual, Mapping) and "array" in visual:
        return {"type": "audio", "audio": (visual["array"], visual["sampling_rate"])}
    try:
        return {"type": media_kind(visual), "path": visual}
    except MediaError:
        # Whoever reads the file reports the error, with the number of the request.
        return {"type": "video", "path": visual}


def _grouped(settings: Any) -> list[tuple[tuple[tuple[str, Any], ...], list[int]]]:
    """Return the numbers of the requests with equal settings, in their order."""
    groups: dict[str, tuple[tuple[tuple[str, Any], ...], list[int]]] = {}
    for number, setting in enumerate(settings):
        groups.setdefault(repr(sorted(setting.items())), (tuple(setting.items()), []))[1].append(number)
    return list(groups.values())


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
