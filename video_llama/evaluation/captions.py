"""Captions and answers on datasets in the layouts of research, measured against the annotated ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from video_llama.constants import Modality
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, MediaSource, open_media
from video_llama.errors import ConfigError, MediaError, VideoLlamaError
from video_llama.evaluation.ablation import Media, apply_to_media
from video_llama.evaluation.asking import AskedFile, Question, answer_dialogues, read_media
from video_llama.inference.engine import VideoLlama
from video_llama.schema import BuildInfo, DatasetConfig
from video_llama.utils.extras import import_extra

__all__ = ["DATA_TYPES", "CaptionResult", "CaptionedFile", "caption_files", "caption_metrics", "load_captions"]

DATA_TYPES = {
    "webvid": "video",
    "webvid_instruct": "video",
    "webvid_instruct_zh": "video",
    "cc_sbu_align": "images",
    "cc_sbu": "images",
    "laion": "images",
    "llava_instruct": "images",
    "audio_caption": "audio",
    "shards": "video",
}
"""The datasets that can be captioned, by their names in configurations, and how their files are read."""

_KINDS: dict[Modality, str] = {"video": "clip", "image": "image", "audio": "sound"}
_IMAGE_TAG = re.compile(r"\s*<image>\s*")


@dataclass(frozen=True)
class CaptionedFile:
    """One question about one file, and all that may be answered.

    Attributes:
        id: dataset and the annotation's own id.
        source: the file.
        kind: "clip", "image" or "sound".
        question: of the annotation; None for a plain caption.
        references: one or more.
    """

    id: str
    source: MediaSource
    kind: str
    question: str | None
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CaptionResult:
    """What the model said of a file; `answer` is None if the file could not be read, and `error` says why."""

    file: CaptionedFile
    answer: str | None
    error: str = ""


def load_captions(
    name: str, data: Path, media: Path | None, data_type: str | None = None, limit: int | None = None
) -> list[CaptionedFile]:
    """Read a dataset's annotations; captions of the same file are gathered.

    Of a dialogue, the first question and its answer are taken.

    Args:
        name: of `DATA_TYPES`.
        data: annotation file or folder, or the storage of an image dataset or of shards.
        media: folder that media paths are relative to, where the layout has one.
        data_type: "video", "images" or "audio" instead of the dataset's usual one.
        limit: most files.

    Raises:
        ConfigError: a dataset that has no captions, or `media` is wanted and not given.
        DatasetError: annotations are absent, empty or of another form.
    """
    if name not in DATA_TYPES:
        raise ConfigError(f"dataset {name!r} cannot be evaluated by captions. Known: {', '.join(DATA_TYPES)}")
    info = BuildInfo(anno_dir=str(data), videos_dir=None if media is None else str(media), storage=str(data))
    config = DatasetConfig(data_type=data_type or DATA_TYPES[name], build_info=info)
    found: dict[tuple[MediaSource, str | None], CaptionedFile] = {}
    examples = build_examples(name, config)
    for number in range(len(examples)):
        example = examples[number]
        if example.source is None:
            raise ConfigError(f"{example.id}: names its files within messages; such sets have no captions to compare")
        question, reference = _first_turn(example)
        key = (example.source, question)
        if key not in found:
            if limit is not None and len(found) == limit:
                continue
            found[key] = CaptionedFile(example.id, example.source, _KINDS[example.kind], question)
        found[key].references.append(reference)
    return list(found.values())


def _first_turn(example: Example) -> tuple[str | None, str]:
    text = example.text
    if "caption" in text:
        return None, str(text["caption"])
    if "QA" in text:
        return str(text["QA"][0]["q"]), str(text["QA"][0]["a"])
    question, answer = text["conversations"][:2]
    return _IMAGE_TAG.sub("", str(question["value"])), str(answer["value"])


def caption_files(
    model: VideoLlama,
    files: Sequence[CaptionedFile],
    prompt: str,
    ablation: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    advance: Callable[[int], object] = lambda count: None,
) -> list[CaptionResult]:
    """Ask greedily for every file's caption, or its own question; some files are in memory at a time.

    Args:
        model: that answers.
        files: to caption.
        prompt: for files without a question of their own.
        ablation: of `evaluation.ablation`, as far as it changes the media.
        batch_size: files at a time.
        max_new_tokens: of an answer.
        advance: called with the number of files done since.
    """
    results: list[CaptionResult] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        media: list[Media] = []
        errors: list[str] = []
        for file in batch:
            try:
                with open_media(file.source) as path:
                    item = read_media(model, Path(path), file.kind)
                error = "" if any(part is not None for part in item) else "there is nothing that this model can read"
            except (VideoLlamaError, OSError) as reason:
                item, error = (None, None), str(reason)
            media.append(item)
            errors.append(error)
        answers = iter(_ask(model, batch, media, errors, prompt, ablation, max_new_tokens))
        results += [
            CaptionResult(file, None if error else next(answers), error)
            for file, error in zip(batch, errors, strict=True)
        ]
        advance(len(batch))
    return results


def _ask(
    model: VideoLlama,
    files: Iterable[CaptionedFile],
    media: Sequence[Media],
    errors: Sequence[str],
    prompt: str,
    ablation: str | None,
    max_new_tokens: int,
) -> list[str]:
    """Answers for the files without an error, in their order."""
    asked, given = [], []
    for file, item, error in zip(files, media, errors, strict=True):
        if not error:
            question = Question(0, 1, "caption", file.references[0], file.question or prompt)
            asked.append(AskedFile(Path(file.source.name or file.source.path), file.kind, True, [[question]]))
            given.append(item)
    answered = answer_dialogues(
        model, asked, apply_to_media(ablation, given), len(asked) or 1, max_new_tokens=max_new_tokens
    )
    return [item.answer for item in answered]


def caption_metrics(results: Sequence[CaptionResult]) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr of the files that could be read, by pycocoevalcap.

    Texts are compared in lower case and without punctuation. CIDEr weighs words by how rare they are among the
    references, so it means little for a few files; it goes up to 10, the others up to 1.

    Raises:
        ConfigError: pycocoevalcap is not installed.
        MediaError: no file could be read.
    """
    modules = {
        name: import_extra(f"pycocoevalcap.{name}.{name}", "caption metrics") for name in ("bleu", "rouge", "cider")
    }
    answered = [result for result in results if result.answer is not None]
    if not answered:
        first = results[0]
        raise MediaError(first.file.id, f"{first.error}; none of {len(results)} files could be read")
    said = {number: [_plain(str(result.answer))] for number, result in enumerate(answered)}
    expected = {number: [_plain(text) for text in result.file.references] for number, result in enumerate(answered)}
    bleu, _ = modules["bleu"].Bleu(4).compute_score(expected, said, verbose=0)
    metrics = {f"BLEU-{length}": float(score) for length, score in enumerate(bleu, start=1)}
    metrics["ROUGE-L"] = float(modules["rouge"].Rouge().compute_score(expected, said)[0])
    metrics["CIDEr"] = float(modules["cider"].Cider().compute_score(expected, said)[0])
    return {name: round(value, 4) for name, value in metrics.items()}


def _plain(text: str) -> str:
    """Lower-case words (single signs in writing without spaces) with single spaces between them."""
    return " ".join(re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower()))
