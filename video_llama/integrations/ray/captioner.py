"""What an actor of Ray does: hold the model and caption what was decoded elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from video_llama.captioning.corpus import CorpusSettings, build_reader, make_record
from video_llama.captioning.profile import RunProfile
from video_llama.errors import VideoLlamaError
from video_llama.inference.captioning import BatchCaptioner
from video_llama.inference.load import load_pretrained_model
from video_llama.inference.workers import WindowRead
from video_llama.media.decode import ClipDecoder, DecodedClip

__all__ = ["Captioned", "Captioner", "Loaded", "ModelSource", "Part"]


@dataclass(frozen=True)
class ModelSource:
    """What each captioner loads; its paths must exist on every node.

    Args:
        arguments: of `load_pretrained_model`, without `device`.
        video_reader: decodes in place of the default one.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    video_reader: str | None = None


@dataclass(frozen=True)
class Part:
    """A clip, or consecutive windows of a long one, that were decoded together.

    Args:
        key, clip_id, source: of the clip.
        first, num_windows: the first window that was decoded, and how many the whole clip has.
        wanted: the windows to caption.
    """

    key: int
    clip_id: str
    source: Any
    first: int
    num_windows: int
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """What a captioner says of its model: how clips are decoded for it, and how many it answers together."""

    decoder: ClipDecoder
    clips_at_once: int


@dataclass(frozen=True)
class Captioned:
    """Records by the keys of their clips, with the number of windows of each; and the captioner's profile so far."""

    records: list[tuple[int, dict[str, Any], int]]
    profile: dict[str, Any]


class Captioner:
    """One model on one device; its process may be lost at any time."""

    def load(self, source: ModelSource, settings: CorpusSettings, device: str, num_threads: int) -> Loaded:
        """Load the model.

        Raises:
            VideoLlamaError: as `load_pretrained_model`.
        """
        if device == "cpu":
            # Ray gives its processes one thread.
            torch.set_num_threads(num_threads)
        model = load_pretrained_model(**source.arguments, device=device)
        if source.video_reader is not None:
            media = replace(model.processor.media_processor, video_reader=source.video_reader)
            model.processor.media_processor = media
        self._reader = build_reader(model.processor, settings)
        self._captioner = BatchCaptioner(model, settings.prompt, settings.options, settings.batch_size)
        # Between two calls there is nothing to do.
        self._profile = RunProfile(outside="wait")
        return Loaded(self._reader.decoder, self._captioner.clips_at_once)

    def caption(self, parts: Sequence[Part], *decoded: Sequence[DecodedClip | VideoLlamaError]) -> Captioned:
        """Caption the wanted windows of some parts.

        Args:
            parts: of different clips, or different parts of one.
            decoded: for each of them, what `decode` returned.
        """
        ids = {part.key: part.clip_id for part in parts}
        records = []
        with self._profile.watch(self._captioner.model):
            reads = self._profile.time_items("other", self._finish(parts, decoded))
            for caption in self._profile.time_items("tokens", self._captioner.run(reads)):
                self._profile.note(caption.error is None)
                records.append((caption.key, make_record(ids[caption.key], caption), caption.num_windows))
        return Captioned(records, self._profile.to_record())

    def _finish(
        self, parts: Sequence[Part], decoded: Sequence[Sequence[DecodedClip | VideoLlamaError]]
    ) -> Iterator[WindowRead]:
        for part, windows in zip(parts, decoded, strict=True):
            for number, window in enumerate(windows, start=part.first):
                if number in part.wanted:
                    finished = self._reader.finish(window, part.source)
                    yield WindowRead(part.key, number, part.num_windows, finished)
