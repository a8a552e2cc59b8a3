"""The driver of a run: what is decoded where, what is captioned by whom, and what is written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from video_llama.captioning.corpus import CorpusLog, CorpusSettings, make_record
from video_llama.captioning.inputs import Clip
from video_llama.captioning.profile import RunProfile
from video_llama.captioning.records import CaptionFile
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.captioning import WindowCaption
from video_llama.integrations.ray.captioner import ModelSource, Part
from video_llama.integrations.ray.cluster import connect, num_cpus
from video_llama.integrations.ray.decoding import decode
from video_llama.integrations.ray.pool import CALLS_AHEAD, CaptionerPool, Running
from video_llama.integrations.ray.work import ATTEMPTS_ALONE, DECODE_ATTEMPTS, Work
from video_llama.media.sources import describe_source

__all__ = ["caption_on_cluster"]

# Batches in one call of a captioner: fewer calls leave fewer places of a batch empty at their ends.
_BATCHES_IN_CALL = 2
# The driver looks for new nodes at least so often.
_WAIT_SECONDS = 2.0


def caption_on_cluster(
    clips: Sequence[Clip],
    file: CaptionFile,
    settings: CorpusSettings,
    source: ModelSource,
    on_record: Callable[[int], object] = lambda new_windows: None,
    profile: RunProfile | None = None,
    device: str | None = None,
    num_decoders: int | None = None,
) -> int:
    """Caption the clips that the file lacks on a cluster of Ray, as `caption_corpus` does in one process.

    Args:
        clips, file, settings, on_record, profile: as for `caption_corpus`; the clips' paths must exist on every node.
        source: the model of every captioner.
        device: "cpu" for captioners without GPUs.
        num_decoders: clips that are decoded at once; by default as many as the cluster has CPUs.

    Returns:
        the number of clips that could not be captioned, or not completely, earlier runs included.

    Raises:
        ConfigError: Ray is not installed, its cluster cannot be reached, or captioners do not live long enough.
        VideoLlamaError: a captioner cannot load the model.
    """
    log = CorpusLog(clips, file, on_record)
    if log.todo:
        with connect() as ray:
            pool = CaptionerPool(ray, source, settings, device)
            _Run(ray, pool, log, profile or RunProfile(), settings.decode_seconds, num_decoders).run()
    return log.num_failed()


class _Run:
    def __init__(
        self,
        ray: Any,
        pool: CaptionerPool,
        log: CorpusLog,
        profile: RunProfile,
        decode_seconds: float,
        num_decoders: int | None,
    ) -> None:
        self._ray, self._pool, self._log, self._profile = ray, pool, log, profile
        self._profiles: dict[Running, dict[str, Any]] = {}
        profile.others = self._profiles.values()
        self._num_decoders, self._decode_seconds = num_decoders, decode_seconds
        self._decode = ray.remote(decode).options(num_cpus=1, num_returns=2, max_retries=0)
        # What was not begun, and what is to be decoded before it: the rest of long clips, and what was lost.
        self._fresh = (Work(key, clip) for key, clip in enumerate(log.todo))
        self._next = next(self._fresh, None)
        self._waiting: deque[Work] = deque()
        self._decoding: dict[Any, Work] = {}
        self._decoded: deque[Work] = deque()
        # Their captioner was lost while it worked at them and others: each is tried alone.
        self._suspects: deque[Work] = deque()

    def run(self) -> None:
        while self._next or self._waiting or self._decoding or self._decoded or self._suspects or self._pool.is_busy():
            self._pool.refresh()
            self._begin_decoding()
            self._hand_out()
            self._take_results()

    def _begin_decoding(self) -> None:
        """Decode ahead, but not more than captioners can soon take: that would fill the memory of the cluster."""
        loaded = self._pool.loaded
        if loaded is None:
            return
        room = self._call_size() * max(1, len(self._pool.ready()))
        at_once = self._profile.num_workers = self._num_decoders or num_cpus(self._ray)
        while len(self._decoding) < at_once and sum(work.num_wanted for work in self._decoded) < room:
            work = self._take_next()
            if work is None:
                return
            reference, work.payload = self._decode.remote(
                loaded.decoder, self._decode_seconds, work.clip.source, work.first
            )
            self._decoding[reference] = work

    def _take_next(self) -> Work | None:
        if self._waiting:
            return self._waiting.popleft()
        work, self._next = self._next, next(self._fresh, None)
        return work

    def _call_size(self) -> int:
        return _BATCHES_IN_CALL * self._pool.loaded.clips_at_once if self._pool.loaded else 1

    def _hand_out(self) -> None:
        for running in self._pool.ready():
            if self._suspects and not running.calls:
                running.submit([self._suspects.popleft()])
            # While there are suspects, captioners become free for them.
            ahead = 1 if self._suspects else CALLS_AHEAD
            while self._decoded and len(running.calls) < ahead and not running.is_testing:
                # One that has nothing to do takes what there is.
                if running.calls and sum(work.num_wanted for work in self._decoded) < self._call_size():
                    break
                running.submit(self._next_batch())

    def _next_batch(self) -> list[Work]:
        batch: list[Work] = []
        while self._decoded and sum(work.num_wanted for work in batch) < self._call_size():
            batch.append(self._decoded.popleft())
        return batch

    def _take_results(self) -> None:
        """Wait for anything to end, and note what it says."""
        references = list(self._decoding)
        for running in self._pool:
            references += [reference for reference, _ in running.calls]
            if running.loading is not None:
                references.append(running.loading)
        if not references:
            # All nodes with room for captioners are gone: others may come.
            time.sleep(_WAIT_SECONDS)
            return
        done, _ = self._ray.wait(references, num_returns=1, timeout=_WAIT_SECONDS)
        for reference in done:
            if reference in self._decoding:
                self._take_decoded(reference, self._decoding.pop(reference))
        for running in self._pool:
            if running.loading in done:
                self._take_loaded(running)
            elif any(reference in done for reference, _ in running.calls):
                self._take_captions(running)

    def _get(self, reference: Any) -> Any:
        """Return a result.

        Raises:
            RayError: something of the cluster was lost.
            VideoLlamaError: what the user gave is wrong, such as the model.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (VideoLlamaError, self._ray.exceptions.RayError)):
                raise error.cause from None
            raise RuntimeError(f"in a process of Ray: {error}") from error

    def _take_loaded(self, running: Running) -> None:
        try:
            self._pool.note_loaded(running, self._get(running.loading))
        except self._ray.exceptions.RayError:
            self._pool.drop(running)

    def _take_decoded(self, reference: Any, work: Work) -> None:
        try:
            num_windows, num_read, seconds = self._get(reference)
        except self._ray.exceptions.RayError:
            self._decode_again(work)
            return
        self._profile.decode_seconds += seconds
        after = work.first + num_read
        if after < num_windows:
            self._waiting.appendleft(Work(work.key, work.clip, after))
        wanted = tuple(number for number in range(work.first, after) if self._log.lacks(work.key, number))
        work.part = Part(work.key, work.clip.id, work.clip.source, work.first, num_windows, wanted)
        if wanted and work.is_suspect:
            self._suspects.append(work)
        elif wanted:
            self._decoded.append(work)

    def _decode_again(self, work: Work) -> None:
        """Decode once more what was lost, or give up."""
        work.decode_losses += 1
        work.part = work.payload = None
        if work.decode_losses >= DECODE_ATTEMPTS:
            self._write_error(work, "the process that decodes it crashes")
        else:
            self._waiting.appendleft(work)

    def _take_captions(self, running: Running) -> None:
        """Note what a captioner has done, and what is to be done again if it is lost."""
        is_lost = False
        while running.calls:
            reference, works = running.calls[0]
            # A lost captioner's calls have all ended. The first without a result is the one that it worked at.
            if not is_lost and not self._ray.wait([reference], timeout=0)[0]:
                return
            running.calls.popleft()
            try:
                captioned = self._get(reference)
            except self._ray.exceptions.RayActorError:
                if is_lost:
                    self._decoded.extendleft(reversed(works))
                else:
                    self._suspect(works, self._pool.is_there(running))
                is_lost = True
            except self._ray.exceptions.RayError:
                # What was decoded is lost with its node; the captioner is there.
                for work in works:
                    self._decode_again(work)
            else:
                self._profiles[running] = captioned.profile
                for key, record, num_windows in captioned.records:
                    if self._log.lacks(key, record.get("segment", 0)):
                        self._write(key, record, num_windows)
        if is_lost:
            self._pool.drop(running)

    def _suspect(self, works: Sequence[Work], died_by_itself: bool) -> None:
        """Try each clip alone that a captioner was lost with; one that was tried often enough gets an error."""
        for work in works:
            # A clip among others is perhaps innocent, and so is every clip of a node that is gone.
            work.losses += died_by_itself and len(works) == 1
            work.is_suspect = True
            if work.losses >= ATTEMPTS_ALONE:
                self._write_error(work, "the process that captions it crashes")
            else:
                self._suspects.append(work)

    def _write_error(self, work: Work, reason: str) -> None:
        error = MediaError(describe_source(work.clip.source), reason)
        # If nothing is known of the clip, its first window is taken for the last one.
        numbers: tuple[int, ...] = (work.first,)
        num_windows = work.first + 1
        if work.part is not None:
            numbers, num_windows = work.part.wanted, work.part.num_windows
        for number in numbers:
            caption = WindowCaption(work.key, number, num_windows, None, error)
            self._write(work.key, make_record(work.clip.id, caption), num_windows)

    def _write(self, key: int, record: dict[str, Any], num_windows: int) -> None:
        self._log.write(key, record, num_windows)
        self._profile.note("error" not in record)
