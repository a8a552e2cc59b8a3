"""VideoLlamaModel: two media branches and the layers of a language model, without its output layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from video_llama.model.audio_branch import AudioBranch
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize
from video_llama.model.frame_branch import FrameBranch
from video_llama.model.frozen import in_own_precision, keep_frozen_parts_evaluating
from video_llama.model.imagebind import AUDIO_LOGIT_SCALE, Attention, ImageBindTrunk
from video_llama.model.inputs import check_embeds_alone, decoder_inputs, pop_media
from video_llama.model.placeholders import check_number, find_placeholders, splice_features
from video_llama.model.precision import KEPT_FROM_FLOAT16, LOGIT_SCALE, let_gradients_through, spare_parts
from video_llama.model.video_branch import build_video_branch
from video_llama.model.weight_names import to_model_places

__all__ = ["VideoLlamaModel", "VideoLlamaPreTrainedModel"]

logger = logging.getLogger(__name__)


class VideoLlamaPreTrainedModel(PreTrainedModel):
    """What both models tell transformers about themselves."""

    config_class = VideoLlamaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "image", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # What stays together on one device, FSDP shards each by itself, and blocks within a branch as well. The branches
    # name themselves: FSDP refuses a name that is not in the model.
    _no_split_modules: ClassVar[list[str]] = []
    # A folder may hold more than is wanted: an audio branch that is left out, ImageBind's vision trunk.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(model\.)?audio_branch\."]
    _keep_in_fp32_modules: ClassVar[list[str]] = list(KEPT_FROM_FLOAT16)
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [LOGIT_SCALE]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but never quantize the branches and the output layer.

        A `device_map` may name parts as files do (`language_model`, `video_branch`).
        """
        if "device_map" in kwargs:
            kwargs["device_map"] = to_model_places(kwargs["device_map"])
        if "quantization_config" in kwargs:
            kwargs["quantization_config"] = spare_parts(kwargs["quantization_config"])
        return super().from_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize as transformers does; placeholder ids that the new vocabulary reaches move above it.

        The processor has to learn the same ids, which is logged.
        """
        embeddings: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        vocab_size = self.config.get_text_config().vocab_size
        if min(self.config.image_token_id, self.config.audio_token_id) < vocab_size:
            self.config.image_token_id, self.config.audio_token_id = vocab_size, vocab_size + 1
            logger.warning(
                "the vocabulary has %d tokens now, so the placeholder ids move above it: set processor.image_token_id "
                "= model.config.image_token_id and processor.audio_token_id = model.config.audio_token_id",
                vocab_size,
            )
        return embeddings

    def train(self, mode: bool = True) -> VideoLlamaPreTrainedModel:
        """Set the mode as torch does, except that frozen parts stay in evaluation mode, without dropout."""
        if not mode:
            return super().train(mode)
        if getattr(self, "is_quantized", False):
            let_gradients_through(self)
        # It sets the mode of every module; torch's own walk would do so once more for each model within.
        keep_frozen_parts_evaluating(self)
        return self

    def initialize_weights(self) -> None:
        """Initialise what was not loaded. Modules whose own tensors are all loaded never reach `_init_weights`."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, (FrameBranch, AudioBranch)):
                module.fill_buffers()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint holds; encoders are meant to be loaded, never trained from here."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, FrameBranch):
            for name in ("query_tokens", "video_query_tokens"):
                if hasattr(module, name):
                    init.normal_(getattr(module, name), std=std)
            if isinstance(module.vision_encoder, Eva):
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


class VideoLlamaModel(VideoLlamaPreTrainedModel):
    """The media branches and the layers of the language model.

    Args:
        config: sizes of all parts.
        build_decoder: returns the layers of a causal language model; by default they are built from
            `config.text_config`.

    Example:
        >>> from transformers import AutoModel
        >>> from video_llama.checkpoints.hub import PACKAGED_MODELS
        >>> model = AutoModel.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")
        >>> model(input_ids=torch.tensor([[1, 5, 6]])).last_hidden_state.shape  # (batch, length, width)
        torch.Size([1, 3, 128])
    """

    # The output layer of a whole model.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *VideoLlamaPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
    ]

    language_model: Any

    def __init__(self, config: VideoLlamaConfig, build_decoder: Callable[[], nn.Module] | None = None) -> None:
        super().__init__(config)
        self.video_branch = build_video_branch(config)
        self.audio_branch = AudioBranch(config) if config.use_audio else None
        if build_decoder is not None:
            self.language_model = build_decoder()
        else:
            self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder of a modality, "image", "video" or "audio"; without one, the model itself."""
        if modality in ("image", "video"):
            return self.video_branch.vision_encoder
        if modality == "audio":
            return self._require_audio_branch().audio_encoder
        return self

    def set_chunk_size(self, chunk_size: ChunkSize) -> None:
        """Set how many frames or segments the encoders take at once; None for all, which sharded weights need.

        With "auto", the default, frozen encoders run as CUDA graphs on a GPU (see `EncoderGraphs`).
        """
        self.video_branch.chunk_size = chunk_size
        if self.audio_branch is not None:
            self.audio_branch.chunk_size = chunk_size

    def get_video_features(
        self, pixel_values: Tensor, frame_mask: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """Map frames to language-model tokens.

        Args:
            pixel_values: (videos, frames, 3, height, width).
            frame_mask: (videos, frames), bool, False on padding frames.
            return_dict: return both what the frozen encoders gave, as `last_hidden_state` (it can be passed on as
                `frame_tokens`), and the language-model tokens, as `pooler_output`.

        Returns:
            (videos, video_queries, width), unless `return_dict`.
        """
        branch = self.video_branch
        if not return_dict:
            return branch(pixel_values, frame_mask)
        tokens = branch.encode_frames(pixel_values, frame_mask)
        return BaseModelOutputWithPooling(tokens, branch.pool(tokens, frame_mask))

    def get_image_features(self, pixel_values: Tensor, return_dict: bool = False) -> Any:
        """Map images to language-model tokens (images, video_queries, width): each is a video of one frame.

        Args:
            pixel_values: (images, 3, height, width), or (images, 1, 3, height, width) as the processor makes them.
            return_dict: as for `get_video_features`.
        """
        if pixel_values.ndim == 4:
            pixel_values = pixel_values[:, None]
        return self.get_video_features(pixel_values, return_dict=return_dict)

    def get_audio_features(
        self, audio_values: Tensor, segment_mask: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """Map log-mel (audios, segments, 1, bins, frames) to language-model tokens (audios, audio_queries, width).

        Args:
            audio_values, segment_mask: as for `VideoLlamaForConditionalGeneration.forward`.
            return_dict: as for `get_video_features`; `last_hidden_state` can be passed on as `segment_vectors`.
        """
        branch = self._require_audio_branch()
        if not return_dict:
            return branch(audio_values, segment_mask)
        vectors = branch.encode_segments(audio_values)
        return BaseModelOutputWithPooling(vectors, branch.pool(vectors, segment_mask))

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

    def get_placeholder_mask(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the ids that stand for media.

        Args:
            input_ids: (batch, length), int64; labels serve as well.
            inputs_embeds: (batch, length, width); with them, the masks have this shape, for `masked_scatter`.
            image_features, audio_features: (items, tokens, width); there must be as many placeholders as tokens.

        Returns:
            where images and videos are, and where audio is: (batch, length), bool, each.

        Raises:
            ValueError: more or fewer placeholders than features, where these are given.
        """
        masks = input_ids == self.config.image_token_id, input_ids == self.config.audio_token_id
        for mask, features, modality in zip(masks, (image_features, audio_features), ("image", "audio"), strict=True):
            if features is not None:
                check_number(int(mask.sum()), features, modality)
        if inputs_embeds is None:
            return masks
        return masks[0][..., None].expand_as(inputs_embeds), masks[1][..., None].expand_as(inputs_embeds)

    def get_inputs_embeds(
        self,
        input_ids: Tensor | None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        placeholders: Sequence[Tensor | None] | None = None,
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
            placeholders: what `find_placeholders` returned for the ids, if they were on the CPU before. None in place
                of positions: such media are computed, as they are by other processes, and put nowhere.
            pixel_values, frame_mask, frame_tokens: as for `VideoLlamaForConditionalGeneration.forward`, where
                video_features are not given.
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
        is_image, is_audio = self.get_placeholder_mask(input_ids)
        # Placeholder ids lie above the vocabulary; any valid id serves where the embedding is replaced anyway.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_audio, 0))
        image_positions, audio_positions = placeholders or find_placeholders(input_ids, self.config)
        embeds = splice_features(embeds, image_positions, video_features, "image")
        return splice_features(embeds, audio_positions, audio_features, "audio")

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the states that an output layer makes logits from.

        Args:
            input_ids, inputs_embeds, attention_mask, position_ids: as for `VideoLlamaForConditionalGeneration.forward`.
            kwargs: media (`MEDIA_INPUTS`), as there, and arguments of the language model.

        Returns:
            the language model's output, with `last_hidden_state` (batch, length, width).

        Raises:
            ValueError: as `get_inputs_embeds`; or ids or media beside `inputs_embeds`.
        """
        media = pop_media(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_inputs_embeds(input_ids, **media)
        else:
            check_embeds_alone(input_ids=input_ids, **media)
        inputs = decoder_inputs(self.language_model.forward, attention_mask, position_ids, **kwargs)
        with in_own_precision(self.language_model, inputs_embeds) as embeds:
            return self.language_model(inputs_embeds=embeds, **inputs)

    def _require_audio_branch(self) -> AudioBranch:
        if self.audio_branch is None:
            raise ValueError("this model was built without its audio branch; set use_audio (equip_audio_branch: True)")
        return self.audio_branch
