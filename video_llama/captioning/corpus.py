"""Read, caption and write what is not captioned yet, in one pass over a corpus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from video_llama.captioning.inputs import Clip
from video_llama.captioning.profile import RunProfile
from video_llama.captioning.records import CaptionFile
from video_llama.inference.captioning import DEFAULT_PROMPT, BatchCaptioner, Captioner, WindowCaption
from video_llama.inference.decode_process import DECODE_SECONDS
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.processor.clips import ClipReader
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

__all__ = [
    "CorpusLog",
    "CorpusSettings",
    "build_reader",
    "caption_corpus",
    "caption_with",
    "default_workers",
    "make_record",
]


@dataclass(frozen=True)
class CorpusSettings:
    """How a corpus is captioned.

    Args:
        prompt: the question about every clip.
        options: how answers are generated.
        batch_size: clips that are answered together; by default as many as `BatchCaptioner` chooses.
        num_workers: processes that decode ahead; 0 decodes in this one.
        num_frames: of each clip or window; by default as many as the model was trained with.
        audio: use audio tracks, if the model has an audio branch.
        window_seconds: length of the windows that a video is captioned in; None captions it as a whole.
        decode_seconds: that a decoding process has for a clip or window, before the clip gets an error.
    """

    prompt: str = DEFAULT_PROMPT
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int | None = None
    num_workers: int = 2
    num_frames: int | None = None
    audio: bool = True
    window_seconds: float | None = None
    decode_seconds: float = DECODE_SECONDS

    def of_captions(self) -> dict[str, Any]:
        """Return the settings that the captions depend on, for `CaptionFile`."""
        settings = {name: getattr(self, name) for name in ("prompt", "num_frames", "audio", "window_seconds")}
        settings |= vars(self.options)
        # These two change the speed only.
        for name in ("static_cache", "compile"):
            settings.pop(name, None)
        return settings


def caption_corpus(
    model: VideoLlama,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    on_record: Callable[[int], object] = lambda new_windows: None,
    profile: RunProfile | None = None,
) -> int:
    """Caption the clips that the file lacks.

    Args:
        model: the loaded model.
        clips: those that are complete in the file are not read again.
        file: takes captions and errors, as they come.
        settings: how.
        on_record: called after each record with the number of missing windows that it reveals.
        profile: gets the seconds of each stage.

    Returns:
        the number of clips that could not be captioned, or not completely, earlier runs included.
    """
    captioner = BatchCaptioner(model, settings.prompt, settings.options, settings.batch_size)
    spent = profile or RunProfile()
    with spent.watch(model):
        return caption_with(captioner, build_reader(model.processor, settings), clips, file, settings, on_record, spent)


def caption_with(
    captioner: Captioner,
    reader: ClipReader,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    on_record: Callable[[int], object],
    profile: RunProfile,
) -> int:
    """Caption the clips that the file lacks, as `caption_corpus` does, with any captioner.

    Args:
        captioner, reader: what answers, and what reads clips for it.
        clips, file, settings, on_record, profile: as for `caption_corpus`.
    """
    log = CorpusLog(clips, file, on_record)
    # Enough decoded clips to fill a batch while the workers are at the next one.
    ahead = 2 * captioner.clips_at_once + 2 * settings.num_workers
    sources = ((key, clip.source) for key, clip in enumerate(log.todo))
    reads = read_ahead(sources, reader, settings.num_workers, ahead, settings.decode_seconds)
    profile.num_workers = settings.num_workers
    # A clip may be captioned in part, so drop the windows that the file has. This stays lazy: nothing is decoded
    # before it is needed.
    missing = (read for read in _add_up(reads, profile) if log.lacks(read.key, read.number))
    for caption in profile.time_items("tokens", captioner.run(profile.time_items("wait", missing))):
        with profile.stage("write"):
            log.write(caption.key, make_record(log.todo[caption.key].id, caption), caption.num_windows)
        profile.note(caption.error is None)
    return log.num_failed()


def build_reader(processor: VideoLlamaProcessor, settings: CorpusSettings) -> ClipReader:
    """Return what reads clips for a model, which its processor describes."""
    return ClipReader(
        processor.media_processor,
        settings.audio and processor.use_audio,
        settings.num_frames,
        settings.window_seconds,
    )


class CorpusLog:
    """Which clips and windows the file of captions lacks, and who gets to know of new records.

    Args:
        clips: all of the run. Those that cannot be tried at all, such as a broken shard, get their error at once.
        file: takes the records.
        on_record: as for `caption_corpus`.

    Attributes:
        todo: the clips that are not complete in the file; a clip's number in it is its key.
    """

    def __init__(self, clips: Sequence[Clip], file: CaptionFile, on_record: Callable[[int], object]) -> None:
        self._clips, self._file, self._on_record = clips, file, on_record
        self._begun: set[int] = set()
        missing = [clip for clip in clips if not file.is_complete(clip.id)]
        for clip in missing:
            if clip.source is None:
                file.write({"id": clip.id, "error": clip.problem})
                on_record(0)
        self.todo = [clip for clip in missing if clip.source is not None]

    def lacks(self, key: int, number: int) -> bool:
        """Return whether there is no record of a window yet."""
        return not self._file.has(self.todo[key].id, number)

    def write(self, key: int, record: Mapping[str, Any], num_windows: int) -> None:
        """Write the record of a window, of a clip with so many windows."""
        # The number of windows of a clip is known with the first of them.
        num_new = 0
        if key not in self._begun:
            num_new = sum(self.lacks(key, number) for number in range(num_windows)) - 1
        self._file.write(record)
        self._on_record(num_new)
        self._begun.add(key)

    def num_failed(self) -> int:
        """Return how many clips could not be captioned, or not completely, earlier runs included."""
        return sum(self._file.has_failed(clip.id) for clip in self._clips)


def _add_up(reads: Iterable[WindowRead], profile: RunProfile) -> Iterator[WindowRead]:
    for read in reads:
        profile.decode_seconds += read.seconds
        yield read


def default_workers(device: torch.device, num_processes: int = 1) -> int:
    """Return how many processes should decode ahead for each that captions.

    Args:
        device: of the model. On the CPU two suffice; a GPU needs all cores.
        num_processes: that caption on this machine, and share its cores.
    """
    if device.type != "cuda":
        return 2
    cores = os.cpu_count() or 1
    # A container or a job may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # Two cores of each share stay free for the process that captions.
    return max(1, min(cores // num_processes - 2, 12))


def make_record(clip_id: str, caption: WindowCaption) -> dict[str, Any]:
    """Return one line of the results."""
    record: dict[str, Any] = {"id": clip_id}
    if caption.num_windows > 1 or caption.start_seconds is not None:
        record |= {"segment": caption.number, "num_segments": caption.num_windows}
    if caption.start_seconds is not None and caption.end_seconds is not None:
        record |= {"start_seconds": round(caption.start_seconds, 3), "end_seconds": round(caption.end_seconds, 3)}
    if caption.error is None:
        return record | {"caption": caption.text, "sound": caption.sound}
    # The id says which file it is.
    path = getattr(caption.error, "path", "")
    return record | {"error": str(caption.error).removeprefix(f"{path}: ")}
