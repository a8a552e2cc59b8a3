"""Compare captions and answers with the annotated ones, on datasets in the layouts of research."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from video_llama.constants import Modality
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example, MediaSource, open_media
from video_llama.data.tokenization import question_text
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
    "table": "video",
}
"""The datasets that can be captioned, by their names in configurations, and their usual `data_type`."""

_IMAGE_TAG = re.compile(r"\s*<image>\s*")


@dataclass(frozen=True)
class CaptionedFile:
    """One question about one file, and its annotated answers.

    Attributes:
        id: dataset and the annotation's own id.
        source, modality: the file, and how it is read.
        question: of the annotation; None for a plain caption.
        references: one or more.
    """

    id: str
    source: MediaSource
    modality: Modality
    question: str | None
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CaptionResult:
    """Hold the model's answer about a file; None if the file could not be read, and `error` says why."""

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
        ConfigError: a dataset without captions, or `media` is required and not given.
        DatasetError: annotations are absent, empty or of another form.
    """
    if name not in DATA_TYPES:
        raise ConfigError(f"dataset {name!r} cannot be evaluated by captions. Known: {', '.join(DATA_TYPES)}")
    info = BuildInfo(anno_dir=str(data), videos_dir=None if media is None else str(media), storage=str(data))
    examples = build_examples(name, DatasetConfig(data_type=data_type or DATA_TYPES[name], build_info=info))
    found: dict[tuple[MediaSource, str | None], CaptionedFile] = {}
    for number in range(len(examples)):
        example = examples[number]
        if example.source is None:
            raise ConfigError(f"{example.id}: names its files within messages; such sets have no captions to compare")
        question, reference = _first_turn(example)
        key = (example.source, question)
        if key not in found:
            # Go on after the limit: more captions of the files that were taken may follow.
            if limit is not None and len(found) == limit:
                continue
            found[key] = CaptionedFile(example.id, example.source, example.kind, question)
        found[key].references.append(reference)
    return list(found.values())


def _first_turn(example: Example) -> tuple[str | None, str]:
    text = example.text
    if "caption" in text:
        return None, str(text["caption"])
    if "QA" in text:
        return question_text(text["QA"][0]), str(text["QA"][0]["a"])
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
    """Ask greedily about every file; `batch_size` files are in memory at a time.

    Args:
        model, files: what answers, and what is asked about.
        prompt: for files without a question of their own.
        ablation: of `evaluation.ablation`, as far as it changes the media.
        max_new_tokens: of an answer.
        advance: called with the number of files done since.
    """
    results: list[CaptionResult] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        media: dict[int, Media] = {}
        errors: dict[int, str] = {}
        asked: list[AskedFile] = []
        for number, file in enumerate(batch):
            try:
                media[number] = _read(model, file)
            except (VideoLlamaError, OSError) as error:
                # One broken file must not end the evaluation.
                errors[number] = str(error)
                continue
            question = Question(0, 1, "caption", file.references[0], file.question or prompt)
            path = Path(file.source.name or file.source.path)
            asked.append(AskedFile(path, file.modality, True, [[question]]))
        given = apply_to_media(ablation, list(media.values()))
        answered = answer_dialogues(model, asked, given, len(asked) or 1, max_new_tokens=max_new_tokens)
        # `media`, `asked` and the answers leave out the same files, so they have the same order.
        answers = {number: item.answer for number, item in zip(media, answered, strict=True)}
        for number, file in enumerate(batch):
            results.append(CaptionResult(file, answers.get(number), errors.get(number, "")))
        advance(len(batch))
    return results


def _read(model: VideoLlama, file: CaptionedFile) -> Media:
    with open_media(file.source) as path:
        frames, audio = read_media(model, Path(path), file.modality)
    if frames is None and audio is None:
        raise MediaError(file.id, "an audio file, and the model has no audio branch")
    return frames, audio


def caption_metrics(results: Sequence[CaptionResult]) -> dict[str, float]:
    """Return BLEU-1 to 4, ROUGE-L and CIDEr of the files that could be read, by pycocoevalcap.

    Texts are compared in lower case and without punctuation. CIDEr weighs words by how rare they are among the
    references, so it means little for a few files; it goes up to 10, the others up to 1.

    Raises:
        ConfigError: pycocoevalcap is not installed.
        MediaError: no file could be read.
    """
    names = ("bleu", "rouge", "cider")
    bleu, rouge, cider = (import_extra(f"pycocoevalcap.{name}.{name}", "caption metrics") for name in names)
    answered = [result for result in results if result.answer is not None]
    if not answered:
        first = results[0]
        raise MediaError(first.file.id, f"{first.error}; none of {len(results)} files could be read")
    answers = {number: [_plain(str(result.answer))] for number, result in enumerate(answered)}
    expected = {number: [_plain(text) for text in result.file.references] for number, result in enumerate(answered)}
    scores, _ = bleu.Bleu(4).compute_score(expected, answers, verbose=0)
    metrics = {f"BLEU-{length}": float(score) for length, score in enumerate(scores, start=1)}
    metrics["ROUGE-L"] = float(rouge.Rouge().compute_score(expected, answers)[0])
    metrics["CIDEr"] = float(cider.Cider().compute_score(expected, answers)[0])
    return {name: round(value, 4) for name, value in metrics.items()}


def _plain(text: str) -> str:
    """Return lower-case words (single characters in writing without spaces) with single spaces between them."""
    return " ".join(re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower()))
