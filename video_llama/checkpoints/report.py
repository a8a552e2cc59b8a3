"""Match the weights a model needs with those that files hold, and report by part what is missing or does not fit.

Only names and shapes are read: every gap is known before the first gigabyte is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from video_llama.checkpoints.chosen_parts import EncoderWeights
from video_llama.checkpoints.memory import build_skeleton
from video_llama.checkpoints.original_layout import OriginalFiles
from video_llama.checkpoints.weight_files import TensorRef, Weights, open_weights
from video_llama.checkpoints.weight_mapping import (
    AUDIO_BRANCH,
    AUDIO_ENCODER,
    IMAGEBIND_VISION,
    LANGUAGE_MODEL,
    MODEL_PARTS,
    PROJECTION,
    QFORMER,
    VIDEO_BRANCH,
    VISION_ENCODER,
    Part,
    is_stray,
    part_of,
    to_original_name,
    to_our_name,
)
from video_llama.errors import CheckpointError
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.model.weight_names import to_saved_name

__all__ = ["LoadReport", "PartReport", "Source", "match_checkpoint", "match_weights"]

logger = logging.getLogger(__name__)

POSITION_TABLE = "video_branch.vision_encoder.pos_embed"
LLAMA_BY_WIDTH = {4096: " (LLaMA-7B)", 5120: " (LLaMA-13B)", 6656: " (LLaMA-30B)", 8192: " (LLaMA-65B or 70B)"}
NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True)
class Source:
    """An opened file, and what its names lack in front (`Part.file_prefix`)."""

    weights: Weights
    prefix: str = ""


@dataclass
class PartReport:
    """List the weights of one part, under the names that the files have for them.

    Args:
        loaded, missing: names that are there and fit, and names that no file has.
        unexpected: weights of this part that the model does not have: another depth, say.
        wrong_shape: weights of another shape, with the shape that the model has.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[TensorRef] = field(default_factory=list)
    wrong_shape: list[tuple[TensorRef, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class LoadReport:
    """Hold the result of matching.

    Args:
        found: our name to where the weight is stored; only what fits.
        parts: the parts that the model was built with.
        unknown: names that are in no row of the name table, by file.
        useless: files that hold nothing for this model, with the parts they do hold.
        folder: the one folder that should hold all parts under our names; None if each part has its own file.
    """

    found: dict[str, TensorRef] = field(default_factory=dict)
    parts: dict[Part, PartReport] = field(default_factory=dict)
    unknown: dict[Path, list[str]] = field(default_factory=dict)
    useless: dict[Path, list[Part]] = field(default_factory=dict)
    folder: Path | None = None

    def problems(self) -> list[str]:
        """Return one sentence for each gap; empty if the model can be loaded."""
        sentences = [_useless_sentence(path, parts) for path, parts in self.useless.items()]
        for part, outcome in self.parts.items():
            if outcome.wrong_shape:
                sentences.append(_shape_sentence(part, outcome))
            if outcome.unexpected:
                sentences.append(_unexpected_sentence(part, outcome))
            # A useless file explains what is missing.
            if outcome.missing and not self.useless:
                sentences.append(_missing_sentence(part, outcome, self.folder))
        return sentences

    def raise_for_problems(self) -> None:
        """Raise a `CheckpointError` that names all gaps, if there are any."""
        problems = self.problems()
        if problems:
            raise CheckpointError(f"the checkpoint cannot be loaded: {'; '.join(problems)}")

    def summary(self) -> str:
        """Return one line for the log."""
        loaded = [f"{part.name} {len(outcome.loaded)}" for part, outcome in self.parts.items() if outcome.loaded]
        lines = ["weights loaded: " + ", ".join(loaded)]
        untrained = [part.name for part, outcome in self.parts.items() if not outcome.loaded]
        if untrained:
            lines.append(f"no weights, starts untrained: {', '.join(untrained)}")
        for path, names in self.unknown.items():
            lines.append(f"{len(names)} unknown names in {path.name} ({_some(names)})")
        return "; ".join(lines)


def match_checkpoint(
    source: OriginalFiles | Path,
    config: VideoLlamaConfig,
    skeleton: VideoLlamaForConditionalGeneration | None = None,
    override: Path | None = None,
) -> LoadReport:
    """Find every weight of a model, and log what was found.

    Args:
        source: the files of the original layout, or a folder that `save_pretrained` wrote.
        config: of the model, and `skeleton`: what `build_skeleton(config)` gave, to save its time.
        override: a checkpoint whose weights count in the place of those of a folder.

    Raises:
        CheckpointError: a file is missing or damaged, or its weights do not fit the model.
    """
    skeleton = skeleton or build_skeleton(config)
    # transformers may rename and merge the stored weights of other language models, so it must match them itself.
    is_renamed = config.text_config.model_type != "llama"
    # Tied weights are stored under one of their names.
    left_out = set(skeleton.all_tied_weights_keys)
    needed = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in left_out}
    expected = {to_saved_name(name): tensor for name, tensor in needed.items()}
    if is_renamed:
        expected = {name: tensor for name, tensor in expected.items() if part_of(name) is not LANGUAGE_MODEL}
    if isinstance(source, Path):
        language_model = Source(open_weights(source))
        sources = [language_model]
        if override is not None:
            sources.append(Source(open_weights(override)))
        report = match_weights(expected, sources, MODEL_PARTS, source)
    else:
        files = _files_and_parts(source)
        sources = [Source(open_weights(path), parts[0].file_prefix) for path, parts in files]
        # Behind the language model, so that a checkpoint with a trained encoder counts.
        sources[1:1] = [Source(weights) for weights in _encoder_weights(source)]
        # The language model comes first. Leave it out where transformers renames its weights: names would not match.
        language_model = sources[0]
        if is_renamed:
            sources.pop(0)
        report = match_weights(expected, sources, {part for _, parts in files for part in parts})
    report.raise_for_problems()
    if is_renamed:
        report.found |= _as_stored(language_model)
        report.found |= _trained_language_model([one for one in sources if one is not language_model])
    logger.log(logging.WARNING if report.unknown else logging.INFO, report.summary())
    return report


def _files_and_parts(files: OriginalFiles) -> list[tuple[Path, Sequence[Part]]]:
    """Return the files with the parts that each must hold whole; trainable parts without a file start untrained.

    The order is the original's: later files override earlier ones. The language model is the first, so that a
    checkpoint that holds a trained one overrides it.
    """
    of_video_branch = [VIDEO_BRANCH, PROJECTION]
    if files.qformer is None:
        # With another frame encoder than BLIP-2's it is in no other file.
        of_video_branch.append(QFORMER)
    in_order: list[tuple[Path | None, Sequence[Part]]] = [
        (files.language_model, [LANGUAGE_MODEL]),
        (files.vision_encoder, [VISION_ENCODER]),
        (files.qformer, [QFORMER]),
        (files.imagebind, [AUDIO_ENCODER, IMAGEBIND_VISION]),
        (files.projection, [PROJECTION]),
        (files.video_branch, of_video_branch),
        (files.audio_branch, [AUDIO_BRANCH]),
    ]
    return [(path, parts) for path, parts in in_order if path is not None]


def _encoder_weights(files: OriginalFiles) -> Iterator[EncoderWeights]:
    """Yield the weights of other encoders than the published ones."""
    if files.frame_encoder is not None:
        yield EncoderWeights("frame_encoder", files.frame_encoder)
    if files.audio_encoder is not None:
        yield EncoderWeights("audio_encoder", files.audio_encoder)


def match_weights(
    expected: Mapping[str, Tensor],
    sources: Sequence[Source],
    required: Collection[Part] = (),
    folder: Path | None = None,
) -> LoadReport:
    """Find every weight of a model in files.

    Where two files have a weight, the later file counts, as in the original. A part must be found whole, or not at all
    if it is not required.

    Args:
        expected: the model's own names and tensors; only shapes are looked at.
        sources: opened files, under the original's names or ours.
        required: parts that must be found.
        folder: `LoadReport.folder`.
    """
    present = {_part_of(name) for name in expected}
    report = LoadReport(parts={part: PartReport() for part in MODEL_PARTS if part in present}, folder=folder)
    # First find the file of each weight, then compare shapes. A later file may replace a weight of an earlier one, and
    # only the shape of the last one matters.
    for source in sources:
        _match_file(report, expected, source)
    for name, tensor in expected.items():
        _match_shape(report, name, tuple(tensor.shape))
    # A part that is not required may be absent, and then starts untrained. A part that is there must be whole.
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


def _match_file(report: LoadReport, expected: Mapping[str, Tensor], source: Source) -> None:
    """Note what a file has for the model, and what it has besides."""
    weights, is_useful, held = source.weights, False, set()
    for name in weights:
        original = source.prefix + name
        ours = to_saved_name(name) if part_of(name) else to_our_name(original)
        # The names of a file are the original's, or ours if this package wrote it.
        if ours is not None and ours in expected:
            report.found[ours] = TensorRef(weights, name)
            is_useful = True
        elif is_stray(original) or (ours is not None and _is_left_out(ours, expected)):
            continue
        elif ours is None:
            report.unknown.setdefault(weights.path, []).append(name)
        else:
            # A weight of ours that this model does not have: of a part it was built without, or of another depth.
            part = _part_of(ours)
            held.add(part)
            if part in report.parts:
                report.parts[part].unexpected.append(TensorRef(weights, name))
    if not is_useful:
        report.useless[weights.path] = [part for part in MODEL_PARTS if part in held]


def _is_left_out(name: str, expected: Mapping[str, Tensor]) -> bool:
    """Return whether a weight is of the Q-Former on each frame, and the model has none, with another connector.

    Of BLIP-2's file such a model takes the norm alone.
    """
    queries = "video_branch.query_tokens"
    return queries not in expected and (name == queries or name.startswith("video_branch.qformer."))


def _match_shape(report: LoadReport, name: str, shape: tuple[int, ...]) -> None:
    """Note whether a weight of the model was found and fits."""
    part = _part_of(name)
    outcome, found = report.parts[part], report.found.get(name)
    if found is None:
        # Report the name that the weight should have in the file, since users look for it there.
        in_file = (to_original_name(name) or name).removeprefix(part.file_prefix)
        outcome.missing.append(name if report.folder else in_file)
        return
    stored = found.header.shape
    # The position table of another image size is interpolated.
    if stored == shape or (name == POSITION_TABLE and stored[-1] == shape[-1]):
        outcome.loaded.append(found.name)
    else:
        # Take it out of `found`, which holds only weights that can be loaded.
        outcome.wrong_shape.append((report.found.pop(name), shape))


def _as_stored(source: Source) -> dict[str, TensorRef]:
    """Return the language model's weights as its files name them, which transformers renames."""
    found = {}
    for name in source.weights:
        ours = f"language_model.{name}" if source.prefix else name
        if part_of(ours) is LANGUAGE_MODEL and not is_stray(source.prefix + name):
            found[ours] = TensorRef(source.weights, name)
    return found


def _trained_language_model(sources: Sequence[Source]) -> dict[str, TensorRef]:
    """Return the weights of a language model that trained, from the checkpoints that hold them beside others."""
    found = {}
    for source in sources:
        for name in source.weights:
            ours = to_our_name(source.prefix + name)
            if ours is not None and part_of(ours) is LANGUAGE_MODEL:
                found[ours] = TensorRef(source.weights, name)
    return found


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_IN_A_MESSAGE
    if rest > 0:
        return f"{', '.join(names[:NAMES_IN_A_MESSAGE])} and {rest} more"
    return ", ".join(names)


def _useless_sentence(path: Path, parts: Sequence[Part]) -> str:
    if not parts:
        return f"{path} has none of the model's weights"
    held = " and ".join(part.name for part in parts)
    return f"{path} has only weights of the {held}, which this model is built without; give another file"


def _missing_sentence(part: Part, outcome: PartReport, folder: Path | None) -> str:
    total = len(outcome.loaded) + len(outcome.missing) + len(outcome.wrong_shape)
    return (
        f"{part.name}: {len(outcome.missing)} of {total} weights are missing ({_some(outcome.missing)}); "
        f"they belong in {folder or part.file}"
    )


def _unexpected_sentence(part: Part, outcome: PartReport) -> str:
    names = [found.name for found in outcome.unexpected]
    return (
        f"{part.name}: {outcome.unexpected[0].file} has {len(names)} weights that the model does not have "
        f"({_some(names)}); the configuration gives another depth or kind of this part"
    )


def _shape_sentence(part: Part, outcome: PartReport) -> str:
    """Say what is wrong with the first weight of another shape, in words for the mistakes that occur in practice."""
    found, shape = outcome.wrong_shape[0]
    file, stored = found.file, tuple(found.header.shape)
    if found.name.endswith(("llama_proj.weight", "llama_proj.bias")):
        theirs, ours = stored[0], shape[0]
        return (
            f"{file} was trained for a language model of width {theirs}{LLAMA_BY_WIDTH.get(theirs, '')}, but the one "
            f"given here has width {ours}{LLAMA_BY_WIDTH.get(ours, '')}; take the file and the language model of the "
            f"same size"
        )
    if part is LANGUAGE_MODEL and stored[1:] == shape[1:]:
        vicuna = ""
        if 32001 in (stored[0], shape[0]):
            vicuna = " (Vicuna's first release has one token more than LLaMA's 32000)"
        return (
            f"language model: {file} has a vocabulary of {stored[0]} tokens, its config.json says {shape[0]}{vicuna}; "
            f"take weights, config.json and tokenizer of the same release"
        )
    names = [found.name for found, _ in outcome.wrong_shape]
    return (
        f"{part.name}: {len(names)} weights in {file} have another shape than the model ({_some(names)}): "
        f"the first is {stored}, should be {shape}"
    )
