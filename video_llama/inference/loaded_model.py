"""A model with its processor: where it runs, features of media, and prompts from conversations."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from video_llama.checkpoints.hub import upload_folder
from video_llama.checkpoints.model_card import write_model_card
from video_llama.conversation import Conversation, conv_templates
from video_llama.errors import VideoLlamaError
from video_llama.inference.cache import MediaCache
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.static_decoder import DecoderPool
from video_llama.inference.summary import summarize_model
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.placeholders import find_placeholders
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.processor.collate import pad_items
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import EncodedPrompt, encode_parts
from video_llama.processor.tensor_like import as_frames, as_segments
from video_llama.processor.transforms import normalize_anew, normalize_pixels
from video_llama.prompt_parts import PromptPart
from video_llama.utils.devices import computing_on, execution_device, resolve_device, resolve_dtype, to_device

__all__ = ["EncodedMedia", "LoadedModel", "Prompt"]

# Frames or segments that are encoded at once on a device; more need more memory and gain nothing.
_MAX_FRAMES = {"cuda": 256}
_USUAL_MAX_FRAMES = 64

Media = VideoFrames | AudioSegments | Tensor
Kind = Literal["image", "audio"]
"""Of placeholders: "image" stands for a video as well."""
Self = TypeVar("Self", bound="LoadedModel")


@dataclass(frozen=True, eq=False)
class EncodedMedia:
    """One media item as the language model sees it: features (tokens, language_width)."""

    kind: Kind
    features: Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be continued.

    Args:
        keys: what stands at each position: a token id, or a media item and the number of its token.
        inputs_embeds: (1, length, language_width).
        stop_strings: texts that end the answer.
    """

    keys: list[Hashable]
    inputs_embeds: Tensor
    stop_strings: list[str]


class LoadedModel:
    """The part of `VideoLlama` that turns media and conversations into prompts; see there for the arguments."""

    def __init__(self, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.media_cache = MediaCache()
        self.decoders = DecoderPool(model)
        # What it was loaded from, for its card.
        self.origin: str | os.PathLike[str] | None = None
        self._logged: set[str] = set()

    @property
    def summary(self) -> str:
        """Return in a few words which model it is: name, size, precision and modalities."""
        return summarize_model(self.model, self.origin)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary}, on {self.device})"

    @property
    def device(self) -> torch.device:
        """Return the device of the token embeddings, where inputs go."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights or, if they are quantized, of the computations."""
        return self.model.dtype

    @property
    def config(self) -> VideoLlamaConfig:
        """Return the model's configuration."""
        return self.model.config

    @property
    def has_audio(self) -> bool:
        """Whether the model has an audio branch."""
        return self.model.audio_branch is not None

    @property
    def max_length(self) -> int:
        """Return how many tokens of prompt and answer together the language model was trained for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def max_frames(self) -> int:
        """Return how many frames or segments `encode_batch` encodes at once by default."""
        return _MAX_FRAMES.get(self.device.type, _USUAL_MAX_FRAMES)

    # What scripts call on a module; methods that change the model return this object.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the model's parameters."""
        return self.model.parameters(recurse)

    def state_dict(self) -> dict[str, Any]:
        """Return the model's weights by name."""
        return self.model.state_dict()

    def train(self: Self, mode: bool = True) -> Self:
        """Put the model in training mode."""
        self.model.train(mode)
        return self

    def eval(self: Self) -> Self:
        """Put the model in evaluation mode, in which it is loaded."""
        return self.train(False)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model; arguments as for `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        # Features and decoders belong to the old device and precision.
        self.media_cache.clear()
        self.decoders.kept.clear()
        return self

    def cpu(self: Self) -> Self:
        """Move the model to the CPU."""
        return self.to("cpu")

    def cuda(self: Self, device: str | int | torch.device | None = None) -> Self:
        """Move the model to a GPU, by default the current one; `ConfigError` if there is none."""
        return self.to(resolve_device("cuda" if device is None else torch.device(device)))

    def half(self: Self) -> Self:
        """Convert the model to the half precision of its device; on a CPU without bfloat16 nothing changes."""
        precision = resolve_dtype("auto", self.device)
        if precision == torch.float32:
            return self
        return self.to(precision)

    def float(self: Self) -> Self:
        """Convert the model to float32."""
        return self.to(torch.float32)

    # Sharing.

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, name: str | None = None, **options: Any
    ) -> None:
        """Write model, processor and a model card to a folder, which `load_pretrained_model` and transformers read.

        Args:
            save_directory: is made if need be.
            name: of the model on its card; by default the folder's.
            options: of transformers' `save_pretrained`, such as `max_shard_size`.
        """
        folder = Path(save_directory).expanduser()
        self.model.save_pretrained(folder, **options)
        self.processor.save_pretrained(folder)
        write_model_card(folder, self.config, self.origin, name or folder.name)

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload model", private: bool | None = None, token: Any = None
    ) -> str:
        """Upload model, processor and a model card to the hub; the address of the commit.

        The card of a model that was loaded from a training run names its data, stages, figures and licences.

        Raises:
            CheckpointError: the hub cannot be reached, or does not let this account write there.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repo_id)
            return upload_folder(Path(folder), repo_id, commit_message, private, token)

    # Media to features.

    @torch.inference_mode()
    def encode(self, media: Media) -> EncodedMedia:
        """Encode one media item; `media_cache` has the features of the last ones.

        Args:
            media: from `process_video`, `process_images` or `process_audio`, or a tensor: (frames, 3, height, width)
                for frames, (segments, 1, mel_bins, mel_frames) for audio. Frames of another size are resized, and
                audio that was read for another model (or for none, by `load_processor()`) gets this model's log-mel.

        Raises:
            ValueError: audio, and the model has no audio branch.
            MediaError: a tensor of another shape.
            OutOfMemoryError: the device has no room for it.
        """
        values = self.prepare_values(media)
        kind = _kind(values)
        branch, encode = self._branch(kind)
        with computing_on(self.device):
            features = self.media_cache.get(values, branch, lambda: encode(to_device(values[None], self.device))[0])
        return EncodedMedia(kind, features)

    @torch.inference_mode()
    def encode_batch(self, media: Sequence[Media], max_frames: int | None = None) -> list[EncodedMedia]:
        """Encode items as `encode` does, in the same order, but together; unequal numbers of frames are padded.

        Args:
            media: as for `encode`.
            max_frames: frames or segments that are encoded at once; an item with more is encoded alone.
        """
        values = [self.prepare_values(item) for item in media]
        encoded: dict[int, EncodedMedia] = {}
        # Groups mix the order of the items; their numbers bring the results back into order.
        for group in _groups(values, max_frames or self.max_frames):
            kind = _kind(values[group[0]])
            _, encode = self._branch(kind)
            with computing_on(self.device):
                items = [to_device(values[number], self.device) for number in group]
                features = encode(*pad_items(items, self.device))
            for number, tokens in zip(group, features, strict=True):
                encoded[number] = EncodedMedia(kind, tokens)
        return [encoded[number] for number in range(len(media))]

    def _branch(self, kind: Kind) -> tuple[nn.Module | None, Callable[..., Tensor]]:
        """Return the branch of a kind of media, and the function that runs it."""
        if kind == "audio":
            return self.model.audio_branch, self.model.get_audio_features
        return self.model.video_branch, self.model.get_video_features

    def prepare_values(self, media: Media) -> Tensor:
        """Return the tensor that a branch takes: frames in the model's size, or segments in its log-mel."""
        if isinstance(media, VideoFrames):
            frames, media = media, media.pixel_values
            vision = self.model.config.vision_config
            own = tuple(vision.mean), tuple(vision.std)
            # The branch normalises bytes itself, so they stay bytes unless they have to be resized.
            if media.dtype == torch.uint8 and not self._has_own_size(media):
                media = normalize_pixels(media, *own)
            if media.dtype == torch.uint8:
                return media
            if (frames.mean, frames.std) != own and frames.pixel_values is media:
                # Another processor has read them.
                media = normalize_anew(media, (frames.mean, frames.std), own)
        elif isinstance(media, AudioSegments):
            if self.has_audio:
                media = self.processor.media_processor.adapt_audio(media)
            media = media.values
        # One channel means log-mel segments, any other number means frames.
        if media.ndim < 3 or media.shape[-3] != 1:
            return self._resize(as_frames(media))
        values = as_segments(media)
        if self.has_audio and tuple(values.shape[-2:]) != (wanted := tuple(self.model.config.audio_config.input_size)):
            raise ValueError(
                f"this model takes segments of {wanted} mel bins and frames, not {tuple(values.shape[-2:])}: "
                "read the audio with its own processor (model.processor.media_processor)"
            )
        return values

    def _has_own_size(self, pixel_values: Tensor) -> bool:
        size = self.model.config.vision_config.image_size
        return pixel_values.shape[-2:] == (size, size)

    def _resize(self, pixel_values: Tensor) -> Tensor:
        if self._has_own_size(pixel_values):
            return pixel_values
        size = self.model.config.vision_config.image_size
        return interpolate(pixel_values.float(), (size, size), mode="bicubic", antialias=True)

    # Conversations to prompts.

    def new_conversation(self) -> Conversation:
        """Return an empty conversation in the template of the weights."""
        return conv_templates[self.processor.conv_template].copy()

    @torch.inference_mode()
    def prepare(self, conversation: Conversation, media: Sequence[EncodedMedia]) -> Prompt:
        """Tokenise a conversation that ends with a question, and splice the media in.

        Args:
            conversation: its placeholders of each kind are, in order of appearance, the media of that kind.
            media: encoded items.

        Raises:
            ValueError: the conversation's placeholders do not fit the media.
        """
        encoded, of_kind, embeds = self.splice(conversation.get_parts(self.processor.tokenizer), media)
        keys = _prompt_keys(encoded.input_ids, of_kind, self.processor.placeholder_ids)
        return Prompt(keys, embeds, conversation.stop_strings)

    @torch.inference_mode()
    def splice(
        self, parts: Sequence[PromptPart], media: Sequence[EncodedMedia]
    ) -> tuple[EncodedPrompt, dict[str, list[EncodedMedia]], Tensor]:
        """Tokenise prompt parts, and put the features of media in the place of their placeholders.

        Returns:
            the token ids, the media by kind, and the embeddings (1, length, language_width).

        Raises:
            ValueError: the placeholders do not fit the media.
        """
        placeholder_ids, lengths = self.processor.placeholder_ids, self.processor.placeholder_lengths
        encoded = encode_parts(parts, self.processor.tokenizer, placeholder_ids, lengths)
        # Features of one kind are stacked in their order, which is that of the placeholders.
        of_kind = {kind: [item for item in media if item.kind == kind] for kind in ("image", "audio")}
        features = {kind: torch.stack([item.features for item in items]) for kind, items in of_kind.items() if items}
        input_ids = torch.tensor([encoded.input_ids])
        # On the CPU, so that nothing waits for a GPU.
        places = find_placeholders(input_ids, self.model.config)
        with computing_on(self.device):
            input_ids = to_device(input_ids, self.device)
            embeds = self.model.get_inputs_embeds(input_ids, features.get("image"), features.get("audio"), places)
        return encoded, of_kind, embeds

    def prepare_fitting(
        self, conversation: Conversation, media: Sequence[EncodedMedia], options: GenerationOptions
    ) -> tuple[Prompt, int]:
        """Prepare a conversation, which loses as many of its oldest turns as make it too long; their media stay.

        Returns:
            the prompt, and how many turns were left out.

        Raises:
            VideoLlamaError: the last question alone is too long.
        """
        num_dropped = 0
        # The length is known only after tokenising, so this is done again after each dropped turn.
        while error := self.too_long(prompt := self.prepare(conversation, media), options):
            if not conversation.drop_oldest_turn():
                raise error
            num_dropped += 1
        return prompt, num_dropped

    def too_long(self, prompt: Prompt, options: GenerationOptions) -> VideoLlamaError | None:
        """Return the error to raise if prompt and answer together exceed the model's context; None if they fit."""
        length, room = len(prompt.keys), max(0, self.max_length - options.max_new_tokens)
        if length <= room:
            return None
        return VideoLlamaError(
            f"the question with its media takes {length} tokens, but {room} fit beside an answer of "
            f"{options.max_new_tokens}; ask a shorter question, upload less, or lower max_new_tokens"
        )


def _kind(values: Tensor) -> Kind:
    """Tell segments (segments, 1, mel_bins, mel_frames) from frames."""
    return "audio" if values.shape[-3] == 1 else "image"


def _groups(values: Sequence[Tensor], largest: int) -> Iterator[list[int]]:
    """Yield the numbers of items to encode together: of one kind and type, with at most `largest` frames."""
    # Only what has the same kind and type can be stacked; the order within each is kept.
    sorts = [(_kind(tensor), tensor.dtype) for tensor in values]
    for sort in dict.fromkeys(sorts):
        group: list[int] = []
        size = 0
        for number in (number for number, other in enumerate(sorts) if other == sort):
            # One item that is larger than the limit still forms a group of its own.
            if group and size + len(values[number]) > largest:
                yield group
                group, size = [], 0
            group.append(number)
            size += len(values[number])
        yield group


def _prompt_keys(
    ids: Sequence[int], of_kind: Mapping[str, Sequence[EncodedMedia]], placeholder_ids: Mapping[str, int]
) -> list[Hashable]:
    """Return the ids, with a media item and the number of its token in the place of each placeholder id."""
    # Token ids of placeholders are all the same, so they would not tell one file from another.
    keys: list[Hashable] = list(ids)
    for kind, items in of_kind.items():
        tokens = ((item, number) for item in items for number in range(len(item.features)))
        positions = (position for position, token in enumerate(ids) if token == placeholder_ids[kind])
        for position, token_of_item in zip(positions, tokens, strict=True):
            keys[position] = token_of_item
    return keys
