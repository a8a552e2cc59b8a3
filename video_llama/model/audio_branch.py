"""The audio-language branch (Zhang, Li and Bing 2023, section 2.1.2): audio in, language-model tokens out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import ChunkSize, EncoderGraphs
from video_llama.model.frozen import as_frozen
from video_llama.model.imagebind import ImageBindTrunk
from video_llama.model.qformer import QFormer, position_rows, run_qformer
from video_llama.model.towers import fill_buffers
from video_llama.processor.transforms import normalize_pixels
from video_llama.registry import AUDIO_ENCODERS

__all__ = ["AudioBranch"]


class AudioBranch(nn.Module):
    """ImageBind on each two-second segment, segment positions, a Q-Former over all segments, a projection.

    ImageBind maps images and audio to one space. The original trains this branch on images and then feeds it
    audio; `vision_encoder` exists only for that training and is absent at inference.

    Attributes:
        chunk_size: segments, or frames, that the encoder takes at once.
    """

    _no_split_modules: ClassVar[list[str]] = ["AudioBranch"]

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__()
        self.chunk_size: ChunkSize = "auto"
        # By the modality of the encoder.
        self._graphs = {"audio": EncoderGraphs(), "vision": EncoderGraphs()}
        vision, width = config.imagebind_vision_config, config.audio_qformer_config.hidden_size
        self.config = config
        # Frozen: one segment, or one frame, at a time to one vector of the joint space; or to tokens.
        self.audio_encoder: Any = self.build_encoder()
        self.vision_encoder = ImageBindTrunk(vision) if vision is not None else None
        # Trained: from the vectors of all segments to the width of the language model.
        self.segment_position_embedding = nn.Embedding(config.max_segment_positions, config.audio_config.output_size)
        self.audio_qformer = QFormer(config.audio_qformer_config)
        self.audio_query_tokens = nn.Parameter(torch.empty(1, config.num_audio_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.get_text_config().hidden_size)

    def build_encoder(self) -> nn.Module:
        """Build the audio encoder that the configuration names, without its weights."""
        audio = self.config.audio_config
        return AUDIO_ENCODERS.get(audio.name, audio.module).build(audio)

    def fill_buffers(self) -> None:
        """Compute what the encoder has in buffers that no file holds; ImageBind has none."""
        if not isinstance(self.audio_encoder, ImageBindTrunk):
            fill_buffers(self.audio_encoder, self.build_encoder)

    def forward(
        self,
        audio_values: Tensor | None = None,
        segment_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        segment_vectors: Tensor | None = None,
    ) -> Tensor:
        """Return the language-model tokens of each audio item.

        Args:
            audio_values: (audios, segments, 1, mel_bins, mel_frames), float, normalised log-mel.
            segment_mask: (audios, segments), bool, False on the segments that pad a shorter item.
            pixel_values: (audios, frames, 3, height, width), images in place of audio.
            segment_vectors: what `encode_segments` or `encode_images` returned earlier, in place of both.

        Returns:
            (audios, audio_queries, language_width).

        Raises:
            ValueError: none of the three, or images without ImageBind's vision trunk.
        """
        if segment_vectors is None:
            if pixel_values is not None:
                segment_vectors = self.encode_images(pixel_values)
            elif audio_values is not None:
                segment_vectors = self.encode_segments(audio_values)
            else:
                raise ValueError("give audio_values, pixel_values or segment_vectors")
        return self.pool(segment_vectors, segment_mask)

    def encode_segments(self, audio_values: Tensor) -> Tensor:
        """Return ImageBind's vector for every segment: (audios, segments, joint_width).

        Other encoders return tokens: (audios, segments, tokens, width).
        """
        return self._encode("audio", self.audio_encoder, audio_values)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return ImageBind's vector for every frame, to train the branch on images in place of audio.

        Args:
            pixel_values: (audios, frames, 3, 224, 224), float, normalised with CLIP's mean and std; or uint8.

        Returns:
            (audios, frames, joint_width).

        Raises:
            ValueError: the model was built without ImageBind's vision trunk.
        """
        if self.vision_encoder is None:
            raise ValueError("this model has no ImageBind vision trunk; its config needs imagebind_vision_config")
        return self._encode("vision", self.vision_encoder, pixel_values)

    def _encode(self, modality: str, encoder: nn.Module, items: Tensor) -> Tensor:
        # The head's, as a few weights of ImageBind are always float32.
        weight = encoder.head.weight if isinstance(encoder, ImageBindTrunk) else next(encoder.parameters())

        def prepare(part: Tensor) -> Tensor:
            if part.dtype == torch.uint8:
                part = normalize_pixels(part)
            return part.to(weight.dtype)

        graphs = self._graphs[modality]
        with as_frozen(items.device.type, encoder):
            vectors = graphs.run(encoder, items.flatten(0, 1), self.chunk_size, encoder, prepare=prepare)
        return vectors.unflatten(0, items.shape[:2])  # (audios, segments, joint_width)

    def pool(self, segment_vectors: Tensor, segment_mask: Tensor | None = None) -> Tensor:
        """Map segment vectors to language-model tokens.

        Args:
            segment_vectors: (audios, segments, joint_width) or (audios, segments, tokens, width), as `encode_segments`
                returns them.
            segment_mask: (audios, segments), bool.

        Returns:
            (audios, audio_queries, language_width).
        """
        positions = position_rows(self.segment_position_embedding, segment_vectors.shape[1], segment_mask)
        if segment_vectors.ndim == 4:
            # All tokens of a segment have its position, and its value of the mask.
            positions = positions.repeat_interleave(segment_vectors.shape[2], dim=1)
            if segment_mask is not None:
                segment_mask = segment_mask.repeat_interleave(segment_vectors.shape[2], dim=1)
            segment_vectors = segment_vectors.flatten(1, 2)
        states = segment_vectors.to(positions) + positions  # (audios, segments, joint_width)
        pooled = run_qformer(self.audio_qformer, self.audio_query_tokens, states, segment_mask)
        return self.projection(pooled.to(self.projection.weight.dtype))
