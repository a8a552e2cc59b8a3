"""Video-LLaMA (Zhang, Li and Bing 2023, arXiv 2306.02858): two media branches spliced into a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from video_llama.model.audio_branch import AudioBranch
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize
from video_llama.model.frozen import in_own_precision, keep_frozen_parts_evaluating
from video_llama.model.imagebind import AUDIO_LOGIT_SCALE, Attention, ImageBindTrunk
from video_llama.model.loss import forward_on_answers
from video_llama.model.precision import KEPT_FROM_FLOAT16, LOGIT_SCALE
from video_llama.model.video_branch import VideoBranch

__all__ = ["VideoLlamaForConditionalGeneration", "cache_argument", "find_placeholders"]

MEDIA_INPUTS = (
    *("pixel_values", "frame_mask", "audio_values", "segment_mask", "audio_pixel_values"),
    *("frame_tokens", "segment_vectors", "video_features", "audio_features"),
)
"""Arguments of `forward` and `generate` that are media, or features of media."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return what a language model of this version of transformers calls the keys and values of earlier tokens."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def find_placeholders(input_ids: Tensor, config: VideoLlamaConfig) -> tuple[Tensor, Tensor]:
    """Find where the media of a batch go.

    On a GPU this waits for the device: call it while the ids are on the CPU where possible.

    Args:
        input_ids: (batch, length), int64.
        config: names the placeholder ids.

    Returns:
        positions of images and of audio in the flattened ids, (positions,), int64 each, on the device of the ids.
    """
    ids = input_ids.flatten()
    return (ids == config.image_token_id).nonzero()[:, 0], (ids == config.audio_token_id).nonzero()[:, 0]


def _splice_features(inputs_embeds: Tensor, positions: Tensor, features: Tensor | None, modality: str) -> Tensor:
    """Replace the embeddings at the placeholder positions by media features, in order of appearance.

    Args:
        inputs_embeds: (batch, length, width).
        positions: (positions,), int64, of placeholders among the batch * length embeddings.
        features: (items, tokens, width), on any device; items of the whole batch, first sample first.
        modality: "image" or "audio", for the error message.

    Returns:
        (batch, length, width), with the dtype and the device of `inputs_embeds`; differentiable in both inputs.

    Raises:
        ValueError: the number of placeholders is not items * tokens.
    """
    items, tokens = (0, 0) if features is None else features.shape[:2]
    if len(positions) != items * tokens:
        raise ValueError(
            f"the prompt holds {len(positions)} {modality} placeholder ids, but {items} {modality} item(s) of "
            f"{tokens} tokens were given; each item needs one run of placeholders"
        )
    if features is None:
        return inputs_embeds
    length = inputs_embeds.shape[1]
    rows = (positions // length).to(inputs_embeds.device, non_blocking=True)
    columns = (positions % length).to(inputs_embeds.device, non_blocking=True)
    # No view of a flat tensor: a compiled first layer would be compiled once more for it.
    return inputs_embeds.index_put((rows, columns), features.flatten(0, 1).to(inputs_embeds))


class VideoLlamaForConditionalGeneration(PreTrainedModel, GenerationMixin):
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

    config_class = VideoLlamaConfig
    main_input_name = "input_ids"
    input_modalities = ("video", "image", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # What stays together on one device; FSDP shards each by itself, and blocks within a branch as well. The audio
    # branch, where there is one, names itself: FSDP refuses a name that is not in the model.
    _no_split_modules: ClassVar[list[str]] = ["VideoBranch", "EvaBlock"]
    # A folder may hold more than is wanted: an audio branch that is left out, ImageBind's vision trunk.
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
        """Set the mode as torch does, except that frozen parts stay in evaluation mode, without dropout."""
        if not mode or not self.training:
            super().train(mode)
        if mode:
            keep_frozen_parts_evaluating(self)
        return self

    def set_chunk_size(self, chunk_size: ChunkSize) -> None:
        """Set how many frames or segments the encoders take at once; None for all, which sharded weights need.

        With "auto", the default, frozen encoders run as CUDA graphs on a GPU (see `EncoderGraphs`).
        """
        self.video_branch.chunk_size = chunk_size
        if self.audio_branch is not None:
            self.audio_branch.chunk_size = chunk_size

    def get_video_features(self, pixel_values: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Map frames (videos, frames, 3, height, width) to language-model tokens (videos, video_queries, width)."""
        return self.video_branch(pixel_values, frame_mask)

    def get_audio_features(self, audio_values: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """Map log-mel (audios, segments, 1, bins, frames) to language-model tokens (audios, audio_queries, width)."""
        return self._require_audio_branch()(audio_values, segment_mask)

    def get_audio_features_from_images(self, pixel_values: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """Map frames (audios, frames, 3, 224, 224) in place of audio, to train the audio branch on images."""
        return self._require_audio_branch()(segment_mask=segment_mask, pixel_values=pixel_values)

    def get_audio_video_features(self, pixel_values: Tensor, audio_values: Tensor) -> Tensor:
        """Pool frames and audio together, by the video Q-Former alone.

        The original's variant of the model that needs no audio Q-Former: the audio segments join the frame tokens
        as further tokens, with positions from the same table. It requires an ImageBind audio trunk as wide as the
        Q-Former, as the published one is.

        Args:
            pixel_values: (videos, frames, 3, height, width), float, CLIP-normalised.
            audio_values: (videos, segments, 1, mel_bins, mel_frames), float, normalised log-mel.

        Returns:
            (videos, video_queries, language_width).
        """
        branch = self.video_branch
        segment_states = self._require_audio_branch().audio_encoder.encode(audio_values)  # (videos, segments, width)
        frame_tokens = branch.encode_frames(pixel_values)
        states = [branch.add_frame_positions(tokens) for tokens in (frame_tokens, segment_states[:, :, None])]
        return branch.project(torch.cat(states, dim=1))

    def get_inputs_embeds(
        self,
        input_ids: Tensor | None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        placeholders: tuple[Tensor, Tensor] | None = None,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        audio_values: Tensor | None = None,
        segment_mask: Tensor | None = None,
        audio_pixel_values: Tensor | None = None,
        frame_tokens: Tensor | None = None,
        segment_vectors: Tensor | None = None,
    ) -> Tensor:
        """Return token embeddings with media features in place of the placeholder ids.

        Args:
            input_ids: (batch, length), int64; runs of `image_token_id` / `audio_token_id` mark media.
            video_features: (videos, video_queries, width), all videos and images in order of appearance.
            audio_features: (audios, audio_queries, width), all audio items in order of appearance.
            placeholders: what `find_placeholders` returned for the ids, if they were on the CPU before.
            pixel_values, frame_mask, frame_tokens: as for `forward`, where video_features are not given.
            audio_values, segment_mask, audio_pixel_values, segment_vectors: the same of audio_features.

        Returns:
            (batch, length, width).

        Raises:
            ValueError: no ids, placeholders that do not fit the features, or audio without an audio branch.
        """
        if input_ids is None:
            raise ValueError("give input_ids or inputs_embeds")
        if video_features is None and (pixel_values is not None or frame_tokens is not None):
            video_features = self.video_branch(pixel_values, frame_mask, frame_tokens)
        has_audio = any(value is not None for value in (audio_values, audio_pixel_values, segment_vectors))
        if audio_features is None and has_audio:
            branch = self._require_audio_branch()
            audio_features = branch(audio_values, segment_mask, audio_pixel_values, segment_vectors)
        is_image, is_audio = input_ids == self.config.image_token_id, input_ids == self.config.audio_token_id
        # Placeholder ids lie above the vocabulary; any valid id serves where the embedding is replaced anyway.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_audio, 0))
        image_positions, audio_positions = placeholders or find_placeholders(input_ids, self.config)
        embeds = _splice_features(embeds, image_positions, video_features, "image")
        return _splice_features(embeds, audio_positions, audio_features, "audio")

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
            labels: (batch, length), int64, `IGNORE_INDEX` where no loss is taken. With `answers_only` keep them on
                the CPU, where they can be read without waiting for a GPU.
            logits_to_keep: compute the logits of that many last positions only; 0 for all. `generate` asks for one.
            answers_only: compute only the logits of tokens with a label, as (answer tokens, vocabulary); the loss
                is the same.
            placeholders: as for `get_inputs_embeds`.
            position_ids, past_key_values, kwargs: passed to the language model.

        Returns:
            the language model's output; `loss` is the mean cross-entropy of the next token over supervised positions.

        Raises:
            ValueError: placeholders and media do not match, or audio is given to a model without audio branch.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_inputs_embeds(
                input_ids, video_features, audio_features, placeholders, pixel_values, frame_mask, audio_values,
                segment_mask, audio_pixel_values, frame_tokens, segment_vectors,
            )  # fmt: skip
        # The name in newer versions of transformers.
        past_key_values = kwargs.pop("cache", past_key_values)
        if position_ids is None and past_key_values is None and attention_mask is not None:
            # Left padding must not shift positions.
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        # Not every language model knows `logits_to_keep`.
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            kwargs["logits_to_keep"] = logits_to_keep
        if past_key_values is not None:
            kwargs[cache_argument(self.language_model.forward)] = past_key_values
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        with in_own_precision(self.language_model, inputs_embeds) as embeds:
            if answers_only and labels is not None:
                return forward_on_answers(self.language_model, labels, inputs_embeds=embeds, **kwargs)
            return self.language_model(labels=labels, inputs_embeds=embeds, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts.

        The media are encoded once, however many beams or samples are drawn. Prompts of unequal length are
        padded on the left.

        Args:
            input_ids, inputs_embeds, attention_mask: as for `forward`.
            kwargs: media (`MEDIA_INPUTS`), as for `forward`, and arguments of `transformers`' `generate`.

        Returns:
            (batch, new_tokens), int64: the new tokens only, or `transformers`' generation output if asked for.
        """
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        if inputs_embeds is None:
            inputs_embeds = self.get_inputs_embeds(input_ids, **media)
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        if "past_key_values" in kwargs:
            kwargs[cache_argument(LlamaForCausalLM.forward)] = kwargs.pop("past_key_values")
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _require_audio_branch(self) -> AudioBranch:
        if self.audio_branch is None:
            raise ValueError("this model was built without its audio branch; set use_audio (equip_audio_branch: True)")
        return self.audio_branch

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint holds; encoders are meant to be loaded, never trained from here."""
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
            # Not saved: zero by definition, but empty after a meta-device load.
            init.zeros_(module.k_bias)
