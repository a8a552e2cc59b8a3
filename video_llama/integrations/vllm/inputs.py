"""What vLLM's engine gets of a prompt: where its media go, and their tensors, which the renderer has read already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
)
from vllm.transformers_utils.processor import cached_get_processor

from video_llama.integrations.vllm.prompts import Marks
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = ["INPUTS", "VideoLlamaDummyInputs", "VideoLlamaInfo", "VideoLlamaMultiModalProcessor"]

INPUTS = {"image": "image_values", "video": "pixel_values", "audio": "audio_values"}
"""The keywords of the model by kind of media."""

# Of the embeddings that features replace: any id of the vocabulary serves.
_FILLING = 0


class _Items(ProcessorBatchItems[Tensor]):
    """Tensors as the branches take them."""


class _Parser(MultiModalDataParser):
    """Takes what `make_prompt` returns."""

    def _parse_image_data(self, data: Any) -> Any:
        return _items(data, "image")

    def _parse_video_data(self, data: Any) -> Any:
        return _items(data, "video")

    def _parse_audio_data(self, data: Any) -> Any:
        return _items(data, "audio")


def _items(data: Any, kind: str) -> _Items | None:
    """Return the items of one kind.

    Raises:
        VLLMValidationError: something else than tensors.
    """
    if data is None or len(data) == 0:
        return None
    tensors = list(data)
    if not all(isinstance(item, Tensor) and item.ndim == 4 for item in tensors):
        raise VLLMValidationError(
            f"{kind} items must be tensors as video_llama.integrations.vllm.prompts.make_prompt returns them; messages "
            "with files are for LLM.chat",
            parameter="multi_modal_data",
        )
    return _Items(tensors, kind)


def _in_precision(item: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the model's precision; bytes stay bytes, which the branch normalises itself."""
    if item.dtype == torch.uint8:
        return item
    return item.to(dtype)


class VideoLlamaInfo(BaseProcessingInfo):
    """What vLLM asks about the model's media."""

    def get_hf_config(self) -> VideoLlamaConfig:
        config: VideoLlamaConfig = self.ctx.get_hf_config(VideoLlamaConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> VideoLlamaProcessor:
        """Return the processor of the folder; what requests set about it is for the renderer."""
        config = self.ctx.model_config
        processor: VideoLlamaProcessor = cached_get_processor(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            processor_cls=VideoLlamaProcessor,
        )
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        return _Parser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.kinds)

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of media that the model takes."""
        return [kind for kind in INPUTS if kind != "audio" or self.get_hf_config().use_audio]

    @property
    def max_num_frames(self) -> int:
        """Return the most frames that a request may ask for: vLLM measures the memory of so many at its start."""
        return max(self.get_hf_config().max_frame_positions, self.get_hf_processor().media_processor.num_frames)

    @property
    def marks(self) -> Marks:
        return Marks.of(self.get_hf_processor())

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the number of ids that an item takes, the same for all of its kind."""
        return {kind: self.marks.lengths[kind] for kind in self.kinds if mm_counts.get(kind, 1)}


class VideoLlamaDummyInputs(BaseDummyInputsBuilder[VideoLlamaInfo]):
    """The largest media that a request can hold, from which vLLM measures how much memory they need."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        config, media = self.info.get_hf_config(), self.info.get_hf_processor().media_processor
        side = config.vision_config.image_size
        largest = {
            "image": torch.zeros(1, 3, side, side),
            "video": torch.zeros(self.info.max_num_frames, 3, side, side),
            "audio": torch.zeros(media.num_audio_segments, 1, *config.audio_config.input_size),
        }
        return {kind: [largest[kind]] * count for kind, count in mm_counts.items() if count}


class VideoLlamaMultiModalProcessor(BaseMultiModalProcessor[VideoLlamaInfo]):
    """Replaces the marks of a prompt by ids of the vocabulary, and says which features go there."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """Return a prompt with the marks of the dummy media: they cannot be written as text."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        marks = self.info.marks
        inputs.prompt = [mark for kind, count in mm_counts.items() for mark in marks.run(kind) * count]
        return inputs

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Return ids, tensors and places of a prompt.

        Raises:
            VLLMValidationError: the prompt has lost a part of its media.
        """
        marks = self.info.marks
        for kind, count in inputs.mm_data_items.get_all_counts().items():
            if inputs.prompt.count(marks.ids[kind]) != count * marks.lengths[kind]:
                raise VLLMValidationError(
                    f"the prompt has no room for its {kind} items: allow more tokens (truncate_prompt_tokens)",
                    parameter="truncate_prompt_tokens",
                )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Return the tensors as they are, in the model's precision; the renderer has read the files."""
        dtype = self.info.ctx.model_config.dtype
        # vLLM calls a kind by its plural, and audio by either.
        given = {name.removesuffix("s"): items for name, items in hf_data.items()}
        return BatchFeature(
            {INPUTS[kind]: [_in_precision(item, dtype) for item in items] for kind, items in given.items()}
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {INPUTS[kind]: MultiModalFieldConfig.batched(kind) for kind in self.info.kinds}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        marks = self.info.marks
        # Features replace the embeddings of all these ids; vLLM refuses prompts with ids above the vocabulary.
        return [
            PromptReplacement(kind, marks.run(kind), [_FILLING] * marks.lengths[kind])
            for kind in INPUTS
            if kind in mm_items
        ]
