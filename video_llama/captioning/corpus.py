"""One pass over a corpus: what is not captioned yet is read, captioned and written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from video_llama.captioning.inputs import Clip
from video_llama.captioning.records import CaptionFile
from video_llama.inference.captioning import DEFAULT_PROMPT, BatchCaptioner, WindowCaption
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.inference.workers import read_ahead
from video_llama.processor.clips import ClipReader

__all__ = ["CorpusSettings", "caption_corpus", "default_workers"]


@dataclass(frozen=True)
class CorpusSettings:
    """How a corpus is captioned.

    Args:
        prompt: the question that is asked about every clip.
        options: how answers are drawn.
        batch_size: clips that are answered together; by default as many as `BatchCaptioner` chooses.
        num_workers: processes that decode ahead; 0 decodes in this one.
        num_frames: to look at in each clip or window; by default as many as the model was trained with.
        audio: listen, if the model can hear.
        window_seconds: caption videos window by window.
    """

    prompt: str = DEFAULT_PROMPT
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int | None = None
    num_workers: int = 2
    num_frames: int | None = None
    audio: bool = True
    window_seconds: float | None = None

    def of_captions(self) -> dict[str, Any]:
        """Those that the captions depend on, for `CaptionFile`."""
        names = ("prompt", "num_frames", "audio", "window_seconds")
        options = {name: value for name, value in vars(self.options).items() if name not in ("static_cache", "compile")}
        return {**{name: getattr(self, name) for name in names}, **options}


def caption_corpus(
    model: VideoLlama,
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    on_record: Callable[[int], object] = lambda new_windows: None,
) -> int:
    """Caption what the file lacks of the clips.

    Args:
        model: the loaded model.
        clips: what to caption; those that are complete in the file are not read again.
        file: where captions and errors go, as they come.
        settings: how.
        on_record: called after each record with how many windows are newly known to be there besides it: the
            others of its clip when it is the first of that clip, else 0.

    Returns:
        how many of the clips could not be captioned, or not completely, earlier runs included.
    """
    todo = [clip for clip in clips if not file.is_complete(clip.id)]
    for clip in todo:
        if clip.source is None:
            file.write({"id": clip.id, "error": clip.problem})
            on_record(0)
    readable = [clip for clip in todo if clip.source is not None]
    reader = ClipReader(
        model.processor.media_processor,
        settings.audio and model.has_audio,
        settings.num_frames,
        settings.window_seconds,
    )
    captioner = BatchCaptioner(model, settings.prompt, settings.options, settings.batch_size)
    ahead = 2 * captioner.clips_at_once + 2 * settings.num_workers
    sources = ((key, clip.source) for key, clip in enumerate(readable))
    reads = read_ahead(sources, reader, settings.num_workers, ahead)
    begun: set[int] = set()
    for caption in captioner.run(read for read in reads if not file.has(readable[read.key].id, read.number)):
        clip_id = readable[caption.key].id
        lacking = sum(not file.has(clip_id, number) for number in range(caption.num_windows))
        file.write(make_record(clip_id, caption))
        on_record(0 if caption.key in begun else lacking - 1)
        begun.add(caption.key)
    return sum(file.has_failed(clip.id) for clip in clips)


def default_workers(device: torch.device, num_processes: int = 1) -> int:
    """How many processes should decode ahead for each that captions.

    Args:
        device: that captions. On the CPU two do; a GPU is fast enough to need all cores.
        num_processes: that caption on this machine, and share its cores.
    """
    if device.type != "cuda":
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // num_processes - 2, 12))


def make_record(clip_id: str, caption: WindowCaption) -> dict[str, Any]:
    """One line of the results."""
    return {"id": clip_id, **dict(_fields(caption))}


def _fields(caption: WindowCaption) -> Iterator[tuple[str, Any]]:
    if caption.num_windows > 1 or caption.start_seconds is not None:
        yield from {"segment": caption.number, "num_segments": caption.num_windows}.items()
    if caption.start_seconds is not None and caption.end_seconds is not None:
        yield "start_seconds", round(caption.start_seconds, 3)
        yield "end_seconds", round(caption.end_seconds, 3)
    if caption.error is None:
        yield from {"caption": caption.text, "sound": caption.sound}.items()
    else:
        path = getattr(caption.error, "path", "")
        yield "error", str(caption.error).removeprefix(f"{path}: ")  # the id says which file
