"""Match what a model needs with what files hold, and say by part what fits, what lacks and what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from video_llama.checkpoints.weight_files import Weights
from video_llama.checkpoints.weight_mapping import (
    LANGUAGE_MODEL,
    MODEL_PARTS,
    Part,
    is_stray,
    part_of,
    to_original_name,
    to_our_name,
)
from video_llama.errors import CheckpointError

__all__ = ["Found", "LoadReport", "PartReport", "Source", "match_weights"]

POSITION_TABLE = "video_branch.vision_encoder.pos_embed"
LLAMA_BY_WIDTH = {4096: "LLaMA-7B", 5120: "LLaMA-13B", 6656: "LLaMA-30B", 8192: "LLaMA-65B or 70B"}
NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True)
class Source:
    """A file to read weights from.

    Args:
        weights: the opened file.
        prefix: what its names lack in front, `Part.file_prefix`.
    """

    weights: Weights
    prefix: str = ""


@dataclass(frozen=True)
class Found:
    """Where one weight is read from."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return tuple(self.weights.header(self.name).shape)

    @property
    def file(self) -> Path:
        """The very file, where the weights are several."""
        return self.weights.file_of(self.name)


@dataclass
class PartReport:
    """What became of one part; all names are the original's, as the files have them.

    Args:
        loaded: names that are there and fit.
        missing: names that no file has (ours, where one folder should hold all).
        unexpected: names of this part that the model does not have, with their file: another depth, say.
        wrong_shape: name, where it was found, and the shape the model has.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[tuple[str, Path]] = field(default_factory=list)
    wrong_shape: list[tuple[str, Found, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class LoadReport:
    """The outcome of matching; made by `match_weights`.

    Args:
        found: our name to where it is read from; only what fits.
        parts: by part, in the order of `MODEL_PARTS`; parts the model was built without are absent.
        unknown: names that mean nothing to us, by file.
        useless: files that have nothing for this model, with the parts they do hold.
        folder: the one folder that should hold all parts under our names; None if each part has its own file.
    """

    found: dict[str, Found] = field(default_factory=dict)
    parts: dict[Part, PartReport] = field(default_factory=dict)
    unknown: dict[Path, list[str]] = field(default_factory=dict)
    useless: dict[Path, list[Part]] = field(default_factory=dict)
    folder: Path | None = None

    def problems(self) -> list[str]:
        """One sentence for each real gap; empty if the model can be loaded."""
        sentences = [_useless_sentence(path, parts) for path, parts in self.useless.items()]
        for part, report in self.parts.items():
            if report.wrong_shape:
                sentences.append(_shape_sentence(part, report))
            if report.unexpected:
                sentences.append(_unexpected_sentence(part, report))
            if report.missing and not self.useless:  # the useless file explains what is missing
                sentences.append(_missing_sentence(part, report, self.folder))
        return sentences

    def raise_for_problems(self, what: str) -> None:
        """Fail on a real gap.

        Args:
            what: what was being loaded, for the message.

        Raises:
            CheckpointError: something is missing, does not fit or does not belong.
        """
        problems = self.problems()
        if problems:
            raise CheckpointError(f"{what} cannot be loaded: {'; '.join(problems)}")

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{part.name} {len(report.loaded)}" for part, report in self.parts.items() if report.loaded]
        unknown = [
            f"{len(names)} unknown names in {path.name} ({_some(names)})" for path, names in self.unknown.items()
        ]
        untrained = [part.name for part, report in self.parts.items() if not report.loaded]
        starts = [f"no weights, starts untrained: {', '.join(untrained)}"] if untrained else []
        return "; ".join(["weights loaded: " + ", ".join(parts), *starts, *unknown])


def match_weights(
    expected: Mapping[str, Tensor],
    sources: Sequence[Source],
    required: Collection[Part] = (),
    folder: Path | None = None,
) -> LoadReport:
    """Find every weight of a model in files.

    Where two files have a weight, the later file counts, as it does in the original. A part must be found whole,
    or not at all if it is not required.

    Args:
        expected: the model's own names and tensors (on any device; only shapes are looked at).
        sources: opened files, under the original's names or ours.
        required: parts that must be found.
        folder: for the messages: where all parts should be, under our names; by default each has a file of its own.
    """
    report = LoadReport(parts={part: PartReport() for part in _parts_of(expected)}, folder=folder)
    for source in sources:
        _match_file(report, expected, source)
    for name, tensor in expected.items():
        _judge(report, name, tuple(tensor.shape))
    for part, outcome in report.parts.items():
        touched = outcome.loaded or outcome.wrong_shape or outcome.unexpected
        if part not in required and not touched:
            outcome.missing.clear()
    return report


def _part_of(name: str) -> Part:
    part = part_of(name)
    if part is None:
        raise ValueError(f"{name} is not in the name table")
    return part


def _parts_of(names: Collection[str]) -> list[Part]:
    present = {part_of(name) for name in names}
    return [part for part in MODEL_PARTS if part in present]


def _match_file(report: LoadReport, expected: Mapping[str, Tensor], source: Source) -> None:
    held: set[Part] = set()
    useful = False
    for name in source.weights:
        original = source.prefix + name
        ours = name if part_of(name) else to_our_name(original)
        if ours is not None and ours in expected:
            report.found[ours] = Found(source.weights, name)
            useful = True
        elif is_stray(original):
            continue
        elif ours is None:
            report.unknown.setdefault(source.weights.path, []).append(name)
        else:
            part = _part_of(ours)
            held.add(part)
            if part in report.parts:
                report.parts[part].unexpected.append((name, source.weights.file_of(name)))
    if not useful:
        report.useless[source.weights.path] = [part for part in MODEL_PARTS if part in held]


def _judge(report: LoadReport, name: str, shape: tuple[int, ...]) -> None:
    part = _part_of(name)
    outcome, found = report.parts[part], report.found.get(name)
    if found is None:
        outcome.missing.append(name if report.folder else _name_in_file(part, name))
    elif found.shape == shape or (name == POSITION_TABLE and found.shape[-1] == shape[-1]):
        outcome.loaded.append(found.name)
    else:
        outcome.wrong_shape.append((found.name, report.found.pop(name), shape))


def _name_in_file(part: Part, name: str) -> str:
    return (to_original_name(name) or name).removeprefix(part.file_prefix)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_IN_A_MESSAGE
    return ", ".join(names[:NAMES_IN_A_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


def _useless_sentence(path: Path, parts: Sequence[Part]) -> str:
    if not parts:
        return f"{path} has none of the model's weights"
    held = " and ".join(part.name for part in parts)
    return f"{path} has only weights of the {held}, which this model is built without; wanted is another file"


def _missing_sentence(part: Part, report: PartReport, folder: Path | None) -> str:
    total = len(report.loaded) + len(report.missing) + len(report.wrong_shape)
    return (
        f"{part.name}: {len(report.missing)} of {total} weights are missing ({_some(report.missing)}); "
        f"they belong in {folder or part.file}"
    )


def _unexpected_sentence(part: Part, report: PartReport) -> str:
    names, path = [name for name, _ in report.unexpected], report.unexpected[0][1]
    return (
        f"{part.name}: {path} has {len(names)} weights that the model does not have ({_some(names)}); "
        f"the configuration gives another depth or kind of this part"
    )


def _shape_sentence(part: Part, report: PartReport) -> str:
    name, found, shape = report.wrong_shape[0]
    if name.endswith("llama_proj.weight") or name.endswith("llama_proj.bias"):
        return _other_llama(found, shape)
    if part is LANGUAGE_MODEL and found.shape[1:] == shape[1:]:
        return _other_vocabulary(found, shape)
    names = [name for name, _, _ in report.wrong_shape]
    return (
        f"{part.name}: {len(names)} weights in {found.file} have another shape than the model ({_some(names)}): "
        f"the first is {found.shape}, should be {shape}"
    )


def _other_llama(found: Found, shape: tuple[int, ...]) -> str:
    theirs, ours = found.shape[0], shape[0]
    names = {width: f" ({LLAMA_BY_WIDTH[width]})" if width in LLAMA_BY_WIDTH else "" for width in (theirs, ours)}
    return (
        f"{found.file} was trained for a language model of width {theirs}{names[theirs]}, but the one given here has "
        f"width {ours}{names[ours]}; take the file and the language model of the same size"
    )


def _other_vocabulary(found: Found, shape: tuple[int, ...]) -> str:
    vicuna = (
        " (Vicuna's first release has one token more than LLaMA's 32000)" if 32001 in (found.shape[0], shape[0]) else ""
    )
    return (
        f"language model: {found.file} has a vocabulary of {found.shape[0]} tokens, its config.json says {shape[0]}"
        f"{vicuna}; take weights, config.json and tokenizer of the same release"
    )
