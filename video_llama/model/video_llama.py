"""Video-LLaMA (Zhang, Li and Bing 2023, arXiv 2306.02858): two media branches spliced into a causal language model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from video_llama.model.audio_branch import AudioBranch
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.fusion import find_placeholders, splice_features
from video_llama.model.imagebind import AUDIO_LOGIT_SCALE, Attention, ImageBindTrunk
from video_llama.model.loss import forward_on_answers
from video_llama.model.precision import KEPT_FROM_FLOAT16, LOGIT_SCALE, half_precision_of_frozen
from video_llama.model.qformer import ChunkSize
from video_llama.model.train_mode import keep_frozen_parts_evaluating
from video_llama.model.video_branch import VideoBranch

__all__ = ["VideoLlamaForConditionalGeneration", "cache_argument"]


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a language model of this version of transformers calls the keys and values of earlier tokens."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class VideoLlamaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answer text about videos, images and sound.

    Args:
        config: sizes of all parts.
        language_model: a causal language model that is already loaded; by default one is built from
            `config.text_config`.
    """

    config_class = VideoLlamaConfig
    main_input_name = "input_ids"
    input_modalities = ("video", "image", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # What stays together on one device; FSDP shards each by itself, blocks within a branch, too. The audio branch,
    # where there is one, names itself: FSDP takes a name that is not in the model for a mistake.
    _no_split_modules: ClassVar[list[str]] = ["VideoBranch", "EvaBlock"]
    # A folder may hold more than is wanted of it: sound for a model that only looks, ImageBind's vision trunk.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^audio_branch\."]
    _keep_in_fp32_modules: ClassVar[list[str]] = list(KEPT_FROM_FLOAT16)
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [LOGIT_SCALE]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: VideoLlamaConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.video_branch = VideoBranch(config)
        self.audio_branch = AudioBranch(config) if config.use_audio else None
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def _supports_logits_to_keep(self) -> bool:
        """Whether `generate` may ask for the last position's logits only: the language model decides."""
        return bool(self.language_model._supports_logits_to_keep())

    def train(self, mode: bool = True) -> VideoLlamaForConditionalGeneration:
        """As in torch, except that a frozen part stays in evaluation mode: no dropout where nothing learns."""
        if not mode or not self.training:
            super().train(mode)
        if mode:
            keep_frozen_parts_evaluating(self)
        return self

    def set_chunk_size(self, chunk_size: ChunkSize) -> None:
        """How many frames or segments the encoders take at once; None for all, which sharding needs.

        With "auto", as at first, frozen encoders run as CUDA graphs on a GPU (see `EncoderGraphs`).
        """
        self.video_branch.chunk_size = chunk_size
        if self.audio_branch is not None:
            self.audio_branch.chunk_size = chunk_size

    def get_video_features(self, pixel_values: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Frames (videos, frames, 3, height, width) to language-model tokens (videos, video_queries, width)."""
        return self.video_branch(pixel_values, frame_mask)

    def get_audio_features(self, audio_values: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """Log-mel (sounds, segments, 1, bins, mel_frames) to language-model tokens (sounds, audio_queries, width)."""
        return self._require_audio_branch()(audio_values, segment_mask)

    def get_audio_features_from_images(self, pixel_values: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """Frames (sounds, frames, 3, 224, 224) in the place of sound, to train the audio branch on images."""
        return self._require_audio_branch()(segment_mask=segment_mask, pixel_values=pixel_values)

    def get_audio_video_features(self, pixel_values: Tensor, audio_values: Tensor) -> Tensor:
        """One summary of frames and sound together, by the video Q-Former alone.

        The original's variant of the model that needs no audio Q-Former: the sound segments join the frame tokens
        as further tokens, numbered with the same position table. It requires an ImageBind audio trunk as wide as
        the Q-Former, as the published one is.

        Args:
            pixel_values: (videos, frames, 3, height, width), float, CLIP-normalised.
            audio_values: (videos, segments, 1, mel_bins, mel_frames), float, normalised log-mel.

        Returns:
            (videos, video_queries, language_width).
        """
        branch = self.video_branch
        sound = self._require_audio_branch().audio_encoder.encode(audio_values)  # (videos, segments, width)
        seen = branch.encode_frames(pixel_values)
        states = [branch.add_frame_positions(tokens) for tokens in (seen, sound[:, :, None])]
        return branch.project_states(torch.cat(states, dim=1))

    def get_inputs_embeds(
        self,
        input_ids: Tensor,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        placeholders: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings with media features spliced over the placeholder ids.

        Args:
            input_ids: (batch, length), int64; runs of `image_token_id` / `audio_token_id` mark media.
            video_features: (videos, video_queries, width), all videos and images in order of appearance.
            audio_features: (sounds, audio_queries, width), all sounds in order of appearance.
            placeholders: what `find_placeholders` says of the ids, if it was asked before they came to a GPU.

        Returns:
            (batch, length, width).

        Raises:
            ValueError: the placeholders in `input_ids` do not fit the features.
        """
        is_image, is_audio = input_ids == self.config.image_token_id, input_ids == self.config.audio_token_id
        # Placeholder ids lie above the vocabulary; any valid id serves where the embedding is replaced anyway.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_audio, 0))
        found = find_placeholders(input_ids, self.config) if placeholders is None else placeholders
        for positions, features, what in zip(found, (video_features, audio_features), ("image", "sound"), strict=True):
            if features is not None or len(positions):
                nothing = embeds.new_empty(0, 0, embeds.shape[-1])
                embeds = splice_features(embeds, positions, nothing if features is None else features, what)
        return embeds

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
        placeholders: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: (batch, length), int64, with runs of placeholder ids.
            pixel_values: (videos, frames, 3, height, width), float, CLIP-normalised; or uint8, normalised here.
            frame_mask: (videos, frames), bool, False on padding frames.
            audio_values: (sounds, segments, 1, mel_bins, mel_frames), float, normalised log-mel.
            segment_mask: (sounds, segments), bool, False on padding segments.
            audio_pixel_values: (sounds, frames, 3, 224, 224); images that stand in for sound (branch training).
            frame_tokens, segment_vectors: what the frozen encoders returned earlier (`VideoBranch.encode_frames`,
                `AudioBranch.encode_segments`), instead of the media.
            video_features, audio_features: what the branches returned earlier, instead of the media.
            inputs_embeds: (batch, length, width), instead of everything above.
            attention_mask: (batch, length), int64, 0 on padding (either side).
            labels: (batch, length), int64, `IGNORE_INDEX` where no loss is taken. With `answers_only` they had better
                be on the CPU, where they can be looked at without waiting for a GPU.
            logits_to_keep: compute the logits of that many last positions only; 0 for all. `generate` asks for one.
            answers_only: compute the logits of the tokens that `labels` teaches only, as (answer tokens, vocabulary);
                the loss is the same.
            placeholders: as for `get_inputs_embeds`.
            position_ids, past_key_values, kwargs: passed to the language model.

        Returns:
            the language model's output; `loss` is the mean cross-entropy of the next token over supervised positions.

        Raises:
            ValueError: placeholders and media do not match, or a sound is given to a model without audio branch.
        """
        if inputs_embeds is None:
            if video_features is None:
                video_features = self._encode_frames(pixel_values, frame_tokens, frame_mask)
            if audio_features is None:
                audio_features = self._encode_sounds(audio_values, audio_pixel_values, segment_vectors, segment_mask)
            inputs_embeds = self.get_inputs_embeds(_required(input_ids), video_features, audio_features, placeholders)
        past_key_values = kwargs.pop("cache", past_key_values)  # the name in newer versions of transformers
        if position_ids is None and past_key_values is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding must not shift positions
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):  # not every language model knows it
            kwargs["logits_to_keep"] = logits_to_keep
        if past_key_values is not None:
            kwargs[cache_argument(self.language_model.forward)] = past_key_values
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        with self._in_own_precision(inputs_embeds) as embeds:
            if answers_only and labels is not None:
                return forward_on_answers(self.language_model, labels, inputs_embeds=embeds, **kwargs)
            return self.language_model(labels=labels, inputs_embeds=embeds, **kwargs)

    @torch.no_grad()
    def generate(
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
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts; arguments as in `forward`, then those of `transformers`' `generate`.

        The media are encoded once, however many beams or samples are drawn. Prompts of unequal length are
        padded on the left.

        Returns:
            (batch, new_tokens), int64: the new tokens only, or `transformers`' generation output if asked for.
        """
        if inputs_embeds is None:
            if video_features is None:
                video_features = self._encode_frames(pixel_values, frame_tokens, frame_mask)
            if audio_features is None:
                audio_features = self._encode_sounds(audio_values, audio_pixel_values, segment_vectors, segment_mask)
            inputs_embeds = self.get_inputs_embeds(_required(input_ids), video_features, audio_features)
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        if "past_key_values" in kwargs:
            kwargs[cache_argument(LlamaForCausalLM.forward)] = kwargs.pop("past_key_values")
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    @contextlib.contextmanager
    def _in_own_precision(self, inputs_embeds: Tensor) -> Iterator[Tensor]:
        """Switch autocast off for a frozen language model in half precision, where it would only look at every
        operation and change none."""
        kind = inputs_embeds.device.type
        is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = half_precision_of_frozen(self.language_model) if is_autocast else None
        if dtype is None:
            yield inputs_embeds
            return
        with torch.autocast(kind, enabled=False):
            yield inputs_embeds.to(dtype)

    def _encode_frames(
        self, pixel_values: Tensor | None, frame_tokens: Tensor | None, frame_mask: Tensor | None
    ) -> Tensor | None:
        """Video features of what is given, None if nothing is."""
        if frame_tokens is not None:
            return self.video_branch(frame_mask=frame_mask, frame_tokens=frame_tokens)
        return None if pixel_values is None else self.get_video_features(pixel_values, frame_mask)

    def _encode_sounds(
        self,
        audio_values: Tensor | None,
        audio_pixel_values: Tensor | None,
        segment_vectors: Tensor | None,
        segment_mask: Tensor | None,
    ) -> Tensor | None:
        """Audio features of what is given, None if nothing is."""
        if segment_vectors is not None:
            return self._require_audio_branch()(segment_mask=segment_mask, segment_vectors=segment_vectors)
        if audio_pixel_values is not None:
            return self.get_audio_features_from_images(audio_pixel_values, segment_mask)
        return None if audio_values is None else self.get_audio_features(audio_values, segment_mask)

    def _require_audio_branch(self) -> AudioBranch:
        if self.audio_branch is None:
            raise ValueError("this model was built without its audio branch; set use_audio (equip_audio_branch: True)")
        return self.audio_branch

    def _init_weights(self, module: nn.Module) -> None:
        """Starting values of what no checkpoint holds; encoders are meant to be loaded, never trained from here."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VideoBranch):
            init.normal_(module.query_tokens, std=std)
            init.normal_(module.video_query_tokens, std=std)
            init.trunc_normal_(module.vision_encoder.cls_token, std=std)
            init.trunc_normal_(module.vision_encoder.pos_embed, std=std)
        elif isinstance(module, AudioBranch):
            init.normal_(module.audio_query_tokens, std=std)
        elif isinstance(module, ImageBindTrunk):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
            if module.log_logit_scale is not None:
                init.constant_(module.log_logit_scale, torch.tensor(AUDIO_LOGIT_SCALE).log().item())
        elif isinstance(module, Attention) and module.bias_k is not None:
            init.normal_(module.bias_k, std=std)
            init.normal_(module.bias_v, std=std)
        elif isinstance(module, EvaAttention) and module.k_bias is not None:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
            init.zeros_(module.k_bias)  # not saved: zero by definition, but empty after a meta-device load


def _required(input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        raise ValueError("give input_ids or inputs_embeds")
    return input_ids
