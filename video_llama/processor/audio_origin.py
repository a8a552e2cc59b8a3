"""What segments of audio were made of, so that another model can have them made as it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from video_llama.errors import MediaError
from video_llama.media.audio import RawSegments, read_segments
from video_llama.media.sampling import SegmentSettings

__all__ = ["AudioOrigin", "decoded_for"]


@dataclass(frozen=True, eq=False)
class AudioOrigin:
    """Origin of segments, kept so that a model can have them made as it wants them.

    Attributes:
        raw: the decoded sound.
        settings: how it was cut and turned into log-mel.
        places: which of the segments were kept; None for all.
    """

    raw: RawSegments
    settings: SegmentSettings
    places: Sequence[int] | None = None


def decoded_for(settings: SegmentSettings, origin: AudioOrigin) -> RawSegments:
    """Return what was decoded, if it serves for the settings as well; otherwise what the file has for them."""
    raw = origin.raw
    cuts = [
        (each.num_segments, each.spacing, each.log_mel.segment_seconds, each.log_mel.sample_rate_hz)
        for each in (settings, origin.settings)
    ]
    # The whole sound, or the very parts.
    if raw.num_samples is None or cuts[0] == cuts[1]:
        return raw
    try:
        return read_segments(raw.source, settings)
    except MediaError as error:
        hint = "this model wants other parts of the sound: read it with model.processor.media_processor"
        raise MediaError(error.path, error.reason, hint) from error
