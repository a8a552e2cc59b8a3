"""Video-LLaMA (Zhang, Li and Bing 2023, arXiv 2306.02858): two media branches spliced into a causal language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from video_llama.constants import IGNORE_INDEX
from video_llama.model.audio_branch import AudioBranch
from video_llama.model.backbone import VideoLlamaModel, VideoLlamaPreTrainedModel
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize
from video_llama.model.frame_branch import FrameBranch
from video_llama.model.frozen import in_own_precision
from video_llama.model.inputs import cache_argument, check_embeds_alone, decoder_inputs, pop_media
from video_llama.model.loss import forward_on_answers
from video_llama.model.weight_names import accept_saved_names, to_model_name

__all__ = ["VideoLlamaForConditionalGeneration"]


class VideoLlamaForConditionalGeneration(VideoLlamaPreTrainedModel, GenerationMixin):
    """Answer text about videos, images and audio.

    Args:
        config: sizes of all parts.
        language_model: a causal language model that is already loaded; by default one is built from
            `config.text_config`.

    Example:
        >>> import torch
        >>> from video_llama.checkpoints.hub import PACKAGED_MODELS
        >>> folder = PACKAGED_MODELS / "video-llama-tiny"
        >>> model = VideoLlamaForConditionalGeneration.from_pretrained(folder)
        >>> side = model.config.vision_config.image_size
        >>> model.get_video_features(torch.zeros(1, 8, 3, side, side)).shape  # (videos, video_queries, width)
        torch.Size([1, 12, 128])
    """

    def __init__(self, config: VideoLlamaConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)

        def build_decoder() -> nn.Module:
            whole = language_model or AutoModelForCausalLM.from_config(config.text_config)
            # Not a module of this one: its two parts are, below.
            self.__dict__["_causal_model"] = whole
            return whole.base_model

        self.model = VideoLlamaModel(config, build_decoder)
        self.lm_head = self._causal_model.get_output_embeddings()
        # What may be tied; whether it is, the language model's configuration says.
        self._tied_weights_keys = _in_whole_model(self._causal_model._tied_weights_keys or {})
        self.register_load_state_dict_pre_hook(accept_saved_names)
        self.post_init()
        # The layers are part of the plan already; a tied output layer must be split among GPUs as the embeddings are.
        plan = type(self._causal_model)._tp_plan or {}
        if "lm_head" in plan:
            self._tp_plan = {**(getattr(self, "_tp_plan", None) or {}), "lm_head": plan["lm_head"]}

    @property
    def language_model(self) -> Any:
        """The causal language model, made of `model.language_model` and `lm_head`: any of transformers.

        It does between and behind those two what its own class does, such as a cap on the logits.
        """
        whole = self._causal_model
        # Both parts may have been exchanged here, by PEFT or a resize, say.
        if whole.get_output_embeddings() is not self.lm_head:
            whole.set_output_embeddings(self.lm_head)
        if whole.base_model is not self.model.language_model:
            setattr(whole, whole.base_model_prefix, self.model.language_model)
        whole.training = self.model.language_model.training
        return whole

    @property
    def video_branch(self) -> FrameBranch:
        return self.model.video_branch

    @property
    def audio_branch(self) -> AudioBranch | None:
        return self.model.audio_branch

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return which weights are tied, those of the language model included: its configuration decides."""
        keys: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels)
        return keys | _in_whole_model(self._causal_model.get_expanded_tied_weights_keys())

    def _supports_logits_to_keep(self) -> bool:
        """Whether `generate` may ask for the last position's logits only: the language model decides."""
        return bool(self.language_model._supports_logits_to_keep())

    def set_chunk_size(self, chunk_size: ChunkSize) -> None:
        """As `VideoLlamaModel.set_chunk_size`."""
        self.model.set_chunk_size(chunk_size)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """As `VideoLlamaModel.get_encoder`."""
        if modality is None:
            return self
        return self.model.get_encoder(modality)

    def get_video_features(
        self, pixel_values: Tensor, frame_mask: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """As `VideoLlamaModel.get_video_features`: (videos, video_queries, width)."""
        return self.model.get_video_features(pixel_values, frame_mask, return_dict)

    def get_image_features(self, pixel_values: Tensor, return_dict: bool = False) -> Any:
        """As `VideoLlamaModel.get_image_features`: (images, video_queries, width)."""
        return self.model.get_image_features(pixel_values, return_dict)

    def get_audio_features(
        self, audio_values: Tensor, segment_mask: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """As `VideoLlamaModel.get_audio_features`: (audios, audio_queries, width)."""
        return self.model.get_audio_features(audio_values, segment_mask, return_dict)

    def get_audio_features_from_images(self, pixel_values: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """As `VideoLlamaModel.get_audio_features_from_images`."""
        return self.model.get_audio_features_from_images(pixel_values, segment_mask)

    def get_audio_video_features(self, pixel_values: Tensor, audio_values: Tensor) -> Tensor:
        """As `VideoLlamaModel.get_audio_video_features`."""
        return self.model.get_audio_video_features(pixel_values, audio_values)

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `VideoLlamaModel.get_placeholder_mask`."""
        return self.model.get_placeholder_mask(*args, **kwargs)

    def get_inputs_embeds(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `VideoLlamaModel.get_inputs_embeds`."""
        return self.model.get_inputs_embeds(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        audio_values: Tensor | None = None,
        segment_mask: Tensor | None = None,
        audio_pixel_values: Tensor | None = None,
        frame_tokens: Tensor | None = None,
        segment_vectors: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        answers_only: bool = False,
        placeholders: Sequence[Tensor | None] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss where labels are given.

        Args:
            input_ids: (batch, length), int64, with runs of placeholder ids.
            pixel_values: (videos, frames, 3, height, width), float, CLIP-normalised; or uint8, normalised here.
            frame_mask: (videos, frames), bool, False on padding frames.
            audio_values: (audios, segments, 1, mel_bins, mel_frames), float, normalised log-mel.
            segment_mask: (audios, segments), bool, False on padding segments.
            audio_pixel_values: (audios, frames, 3, 224, 224); images in place of audio (branch training).
            frame_tokens, segment_vectors: what the frozen encoders returned earlier (`VideoBranch.encode_frames`,
                `AudioBranch.encode_segments`), instead of the media.
            video_features, audio_features: what the branches returned earlier, instead of the media.
            inputs_embeds: (batch, length, width), instead of everything above.
            attention_mask: (batch, length), int64, 0 on padding (either side).
            labels: (batch, length), int64, `IGNORE_INDEX` where no loss is taken; placeholder ids count as that. With
                `answers_only` keep them on the CPU, where they can be read without waiting for a GPU.
            logits_to_keep: compute the logits of that many last positions only; 0 for all. `generate` asks for one.
            answers_only: compute logits of tokens with a label only, (answer tokens, vocabulary); the same loss.
            placeholders: as for `get_inputs_embeds`.
            position_ids, past_key_values, kwargs: passed to the language model.

        Returns:
            the language model's output; `loss` is the mean cross-entropy of the next token over supervised positions.

        Raises:
            ValueError: placeholders and media do not match, or audio, ids or media are given where none can be used.
        """
        given: dict[str, Any] = {
            "input_ids": input_ids, "video_features": video_features, "audio_features": audio_features,
            "placeholders": placeholders, "pixel_values": pixel_values, "frame_mask": frame_mask,
            "audio_values": audio_values, "segment_mask": segment_mask, "audio_pixel_values": audio_pixel_values,
            "frame_tokens": frame_tokens, "segment_vectors": segment_vectors,
        }  # fmt: skip
        if inputs_embeds is not None:
            check_embeds_alone(**given)
        else:
            inputs_embeds = self.model.get_inputs_embeds(**given)
        language_model = self.language_model
        # Not every language model knows `logits_to_keep`.
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        kwargs["past_key_values"] = past_key_values
        inputs = decoder_inputs(language_model.forward, attention_mask, position_ids, **kwargs)
        labels = self._learnable(labels)
        with in_own_precision(language_model, inputs_embeds) as embeds:
            if answers_only and labels is not None:
                return forward_on_answers(language_model, labels, inputs_embeds=embeds, **inputs)
            return language_model(labels=labels, inputs_embeds=embeds, **inputs)

    def _learnable(self, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        # `labels=input_ids` is what other trainers pass; there is no logit of a placeholder to learn.
        is_image, is_audio = self.get_placeholder_mask(labels)
        return labels.masked_fill(is_image | is_audio, IGNORE_INDEX)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts.

        The media are encoded once, however many beams or samples are drawn. Prompts of unequal length are
        padded on the left.

        Args:
            input_ids, inputs_embeds, attention_mask: as for `forward`; with embeddings, the ids count for nothing.
            inputs: the name that transformers has for `input_ids` here.
            kwargs: media (`MEDIA_INPUTS`), as for `forward`, and arguments of `transformers`' `generate`.

        Returns:
            (batch, new_tokens), int64: the new tokens only, or `transformers`' generation output if asked for.

        Raises:
            ValueError: an assistant model, prompt lookup or a guidance scale; media beside `inputs_embeds`.
        """
        for name in ("assistant_model", "prompt_lookup_num_tokens", "guidance_scale"):
            # A scale of 1 guides nothing. Prompt lookup gives other tokens in some versions of transformers.
            if kwargs.get(name, getattr(kwargs.get("generation_config"), name, None)) not in (None, 1):
                raise ValueError(f"{name} needs a prompt of token ids alone, and here media are spliced in")
        media = pop_media(kwargs)
        kwargs.pop("mm_token_type_ids", None)
        if input_ids is None:
            input_ids = inputs
        if inputs_embeds is None:
            inputs_embeds = self.get_inputs_embeds(input_ids, **media)
        else:
            check_embeds_alone(**media)
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        if "past_key_values" in kwargs:
            kwargs[cache_argument(LlamaForCausalLM.forward)] = kwargs.pop("past_key_values")
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def _in_whole_model(tied: Mapping[str, str]) -> dict[str, str]:
    """Return pairs of names of a causal language model as names of the whole model."""
    return {to_model_name(f"language_model.{a}"): to_model_name(f"language_model.{b}") for a, b in tied.items()}
