"""Rows of messages as batches with labels, for trainers other than this package's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from video_llama.constants import IGNORE_INDEX
from video_llama.conversation import conv_templates
from video_llama.data.annotations import KeyCheck, is_learnt
from video_llama.data.columns import without_nulls
from video_llama.data.rows import read_row
from video_llama.data.tokenization import build_conversation_sample
from video_llama.processor.collate import pad_ids, pad_items
from video_llama.processor.messages import MessageReader
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.request import MediaRequest

__all__ = ["VideoLlamaDataCollator"]

# No limit: more tokens than any text has.
_NO_LIMIT = 2**31


class VideoLlamaDataCollator:
    """Make batches of the `Trainer` of transformers, the `SFTTrainer` of TRL or a loop of one's own.

    A row is what the dataset `messages` takes (docs/own_data.md): `messages` whose items name their media, or files in
    columns such as `videos`, with tags in the text. Media are decoded here, so let the data loader have workers.

    Args:
        processor: of the model; its settings say how media are read.
        max_txt_len: most tokens of text; a longer conversation is cut off. Media and BOS are not counted.
        load_audio_from_video: read the audio tracks of all videos that have one.
        pad_to_multiple_of: make the lengths multiples of this.
        media: keywords of `MediaRequest`, such as `num_frames` or `fps`.

    Example:
        >>> from video_llama.checkpoints.hub import PACKAGED_MODELS
        >>> processor = VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")
        >>> collate = VideoLlamaDataCollator(processor)
        >>> row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
        >>> sorted(collate([row]))
        ['attention_mask', 'input_ids', 'labels']
    """

    def __init__(
        self,
        processor: VideoLlamaProcessor,
        *,
        max_txt_len: int | None = None,
        load_audio_from_video: bool = False,
        pad_to_multiple_of: int = 1,
        **media: Any,
    ) -> None:
        self.processor = processor
        self.max_txt_len = max_txt_len
        self.load_audio_from_video = load_audio_from_video
        self.pad_to_multiple_of = pad_to_multiple_of
        self.media = media
        # Unknown keywords and settings that contradict each other are found now.
        MediaRequest(processor.media_processor, **media)
        self._keys = KeyCheck()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (rows, length), and the media as the model takes them.

        Labels are `IGNORE_INDEX` but on answers and on what ends them.

        Raises:
            DatasetError: a row of another form, or one in which nothing is left to learn.
            MessagesError: as `MessageReader.fill`.
            MediaError: a file cannot be read.
        """
        processor = self.processor
        reader = MessageReader(
            MediaRequest(processor.media_processor, **self.media),
            read_audio=processor.use_audio and self.load_audio_from_video,
            strict=True,
            has_audio=processor.use_audio,
        )
        samples = [self._tokenise(row, f"row {number}", reader) for number, row in enumerate(rows)]
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids, mask = pad_ids(
            [sample["input_ids"] for sample in samples], processor.tokenizer.pad_token_id, "right", length
        )
        labels, _ = pad_ids([sample["labels"] for sample in samples], IGNORE_INDEX, "right", length)
        batch: dict[str, Tensor | None] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if reader.visuals:
            batch["pixel_values"], batch["frame_mask"] = pad_items([item.pixel_values for item in reader.visuals])
        if reader.audios:
            segments = [processor.media_processor.adapt_audio(item).values for item in reader.audios]
            batch["audio_values"], batch["segment_mask"] = pad_items(segments)
        return {name: tensor for name, tensor in batch.items() if tensor is not None}

    def _tokenise(self, row: Mapping[str, Any], where: str, reader: MessageReader) -> dict[str, list[int]]:
        """Return the ids and labels of one row; its media are kept by the reader."""
        messages = read_row(without_nulls(row), where, self._keys)["messages"]
        conversation = conv_templates[self.processor.conv_template].copy()
        reader.fill(conversation, messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        return build_conversation_sample(
            conversation,
            self.processor.tokenizer,
            placeholder_ids=self.processor.placeholder_ids,
            placeholder_lengths=self.processor.placeholder_lengths,
            max_txt_len=self.max_txt_len or _NO_LIMIT,
            unlearnt=[number for number, answer in enumerate(answers) if not is_learnt(answer, where)],
        )
