"""Where the time of a captioning run goes: waiting for clips, encoding, prefill, decoding of tokens, writing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from video_llama.errors import ConfigError
from video_llama.inference.loaded_model import LoadedModel
from video_llama.utils.files import write_whole

__all__ = ["STAGES", "RunProfile"]

STAGES = ("wait", "encode", "prefill", "tokens", "write", "other")
"""What the process with the model does, one after the other: together they are the whole time of a run."""

Item = TypeVar("Item")


class RunProfile:
    """Adds up the seconds of each stage of one process, from when it is made; one thread uses it.

    A stage within another one counts alone: the time of the outer one goes on when it ends. `wait` is time in which no
    clip is decoded, so the model has nothing to do; with `num_workers=0` it is the decoding itself.

    Args:
        outside: the stage of all time that is in no other.

    Attributes:
        others: what `to_record` returned in other processes, which do the work of this run: the stages are theirs.
    """

    def __init__(self, outside: str = "other") -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.decode_seconds = 0.0
        self.num_workers = 0
        self.captions = 0
        self.errors = 0
        self.others: Collection[Mapping[str, Any]] = ()
        self._stage = outside
        self._synchronize: Callable[[], object] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Count time from now on."""
        self._since = self._begun = time.perf_counter()

    def note(self, is_caption: bool) -> None:
        """Count a record."""
        self.captions += is_caption
        self.errors += not is_caption

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of a stage."""
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def time_items(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; the time that getting each of them takes is that of a stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def watch(self, model: LoadedModel) -> Iterator[None]:
        """Tell encoding and prefill from the rest of the time in which captions are generated."""
        if model.device.type == "cuda":
            # A GPU computes later than it is asked to. Both ends of a stage wait for it, some thousandths of the time.
            self._synchronize = partial(torch.cuda.synchronize, model.device)
        whole = model.model.model
        with ExitStack() as hooks:
            for branch in (whole.video_branch, whole.audio_branch):
                if branch is not None:
                    self._count(hooks, branch, lambda arguments: "encode")
            self._count(hooks, whole.language_model, _stage_of_decoder)
            yield

    def _count(self, hooks: ExitStack, module: nn.Module, stage_of: Callable[[dict[str, Any]], str]) -> None:
        """Count each call of a module as the stage that its keyword arguments tell."""
        outer: list[str] = []

        def enter(module: nn.Module, inputs: Any, arguments: dict[str, Any]) -> None:
            outer.append(self._enter(stage_of(arguments)))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._enter(outer.pop())

        hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        # Also after an error: where memory runs out, the run goes on with fewer clips.
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _enter(self, name: str) -> str:
        """Begin a stage and return the one before it."""
        before = self._stage
        # Without a change nothing is waited for: one token after the other is the same stage.
        if name != before:
            self._synchronize()
            now = time.perf_counter()
            self.seconds[before] += now - self._since
            self._stage, self._since = name, now
        return before

    def to_record(self) -> dict[str, Any]:
        """Return the figures; `stages` has the seconds of this process, or those of all the others together."""
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self._since = now
        seconds, stages = now - self._begun, dict(self.seconds)
        if self.others:
            stages = {name: sum(other["stages"][name] for other in self.others) for name in STAGES}
        return {
            "seconds": seconds,
            "captions": self.captions,
            "errors": self.errors,
            "captions_per_second": self.captions / max(seconds, 1e-9),
            "stages": stages,
            "share_of_waiting": stages["wait"] / max(sum(stages.values()), 1e-9),
            "decode": {"seconds": self.decode_seconds, "workers": self.num_workers},
        }

    def summary(self) -> str:
        """Return one line for people."""
        record = self.to_record()
        total = max(sum(record["stages"].values()), 1e-9)
        shares = ", ".join(f"{name} {100 * spent / total:.0f} %" for name, spent in record["stages"].items())
        workers = f"{self.num_workers} worker(s)"
        if not self.num_workers:
            workers = "this process"
        return (
            f"{record['seconds']:.1f} s, {record['captions_per_second']:.2f} captions/s: {shares}; "
            f"decoding took {self.decode_seconds:.1f} s of {workers}"
        )

    def save(self, path: Path) -> None:
        """Write the figures as JSON.

        Raises:
            ConfigError: the file cannot be written.
        """
        text = json.dumps(self.to_record(), indent=2) + "\n"
        try:
            write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: the profile cannot be written ({error})") from error


def _stage_of_decoder(arguments: dict[str, Any]) -> str:
    """Return whether a call of the language model's layers reads a prompt, or one token for each answer."""
    inputs = arguments.get("inputs_embeds")
    if inputs is None:
        inputs = arguments.get("input_ids")
    if inputs is not None and inputs.shape[1] > 1:
        return "prefill"
    return "tokens"
