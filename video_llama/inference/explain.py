"""What the model looked at: the share of each frame and segment in the attention of a branch's last Q-Former."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from video_llama.inference.uploads import Upload
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.utils.extras import is_installed, require_extra

if TYPE_CHECKING:
    from video_llama.inference.engine import VideoLlama

__all__ = ["Explanation", "attention_shares", "explain", "reading_qformer", "recorded_attention"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attention shares of one file. They do not depend on a question: the Q-Formers do not see it.

    Attributes:
        source: the file.
        frame_seconds, segment_seconds: (frames,) and (segments,), the time of each frame and the start of each segment.
        frame_shares, segment_shares: (frames,) and (segments,), each adding up to 1. Empty without frames, without
            audio, or for a connector without attention.
    """

    source: str
    frame_seconds: NDArray[np.float64]
    frame_shares: NDArray[np.float64]
    segment_seconds: NDArray[np.float64]
    segment_shares: NDArray[np.float64]

    def __repr__(self) -> str:
        return f"Explanation({self.source!r}: {len(self.frame_shares)} frames, {len(self.segment_shares)} segments)"

    def _repr_png_(self) -> bytes | None:
        """Return the plot, as notebooks show it."""
        if not is_installed("matplotlib"):
            return None
        content = io.BytesIO()
        self.plot().savefig(content, format="png", dpi=90)
        return content.getvalue()

    def plot(self) -> Any:
        """Draw the shares over time and return matplotlib's figure.

        Raises:
            VideoLlamaError: matplotlib, the extra `plots`, is not installed.
        """
        require_extra("matplotlib", "plots of attention")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.2), layout="constrained")
        rows = {"frames": (self.frame_seconds, self.frame_shares), "audio": (self.segment_seconds, self.segment_shares)}
        rows = {name: row for name, row in rows.items() if len(row[1])}
        for axes, (name, (seconds, shares)) in zip(
            figure.subplots(1, len(rows) or 1, squeeze=False)[0], rows.items(), strict=False
        ):
            axes.bar([f"{second:.1f}" for second in seconds], 100 * shares)
            axes.set(title=name, xlabel="seconds", ylabel="share of attention, %")
        return figure


def explain(model: VideoLlama, upload: Upload) -> Explanation:
    """Encode the frames and the audio of an upload once more and return what the Q-Formers attended to."""
    values: dict[str, list[float]] = {"frames": [], "audio": []}
    seconds: dict[str, list[float]] = {"frames": [], "audio": []}
    if upload.frames is not None:
        # An image has no times.
        seconds["frames"] = list(upload.frames.times_seconds) or [0.0]
    if upload.audio is not None:
        seconds["audio"] = list(upload.audio.start_seconds)
    for name, media in (("frames", upload.frames), ("audio", upload.audio)):
        qformer = None if media is None else reading_qformer(model, media)
        if media is not None and qformer is not None:
            with recorded_attention(qformer) as attention:
                # `encode` would take features that it has, without running the Q-Former.
                model.encode_batch([media])
            values[name] = attention_shares(attention, len(seconds[name]))
    arrays = [np.asarray(each[name]) for name in ("frames", "audio") for each in (seconds, values)]
    return Explanation(upload.source, *arrays)


def reading_qformer(model: VideoLlama, media: VideoFrames | AudioSegments | Tensor) -> nn.Module | None:
    """Return the Q-Former that reads all frames or segments; None where the branch has none."""
    if isinstance(media, AudioSegments):
        branch = model.model.audio_branch
        return None if branch is None else branch.audio_qformer
    if isinstance(media, VideoFrames):
        qformer: nn.Module | None = model.model.video_branch.attention
        return qformer
    return None


def attention_shares(attention: list[Tensor], parts: int) -> list[float]:
    """Return the mean attention over layers, heads and queries of each part of the input.

    Args:
        attention: one (1, heads, queries, tokens) per layer, rows that add up to 1.
        parts: frames or segments; each has the same number of tokens, in order.
    """
    mean = torch.stack([layer[0].float().mean(dim=(0, 1)) for layer in attention]).mean(dim=0)  # (tokens,)
    return mean.reshape(parts, -1).sum(dim=1).tolist()


@contextmanager
def recorded_attention(qformer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the attention of every cross-attention layer, computed again from its queries and keys."""
    recorded: list[Tensor] = []

    def record(layer: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        heads = layer.num_attention_heads
        # The fused attention kernel does not return its weights, so they are computed here from the same inputs.
        query = layer.query(given["hidden_states"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = layer.key(given["encoder_hidden_states"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        recorded.append((query @ key.transpose(-1, -2) * layer.scaling).float().softmax(dim=-1))

    layers = [module for name, module in qformer.named_modules() if name.endswith("crossattention.attention")]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
