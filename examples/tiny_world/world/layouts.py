"""A split's folder: the place of each file, and annotations in the layouts of published datasets.

examples/tiny_world/README.md shows the tree.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.tiny_world.world.samples import FIRST_IDS, Sample, Turn
from video_llama.utils.extras import import_extra
from video_llama.utils.jsonl import append_jsonl

__all__ = ["FOLDERS", "SHARD_SIZE", "media_file", "write_annotations", "write_json", "write_json_lines", "write_shard"]

# Images in a tar file.
SHARD_SIZE = 200
FOLDERS = (
    "webvid/annotations",
    "webvid/videos",
    "webvid_instruct",
    "webvid_instruct_zh",
    "cc_sbu_align/image",
    "cc_sbu",
    "laion",
    "llava_instruct",
    "audio_caption/audio",
    "messages",
)
# The date of all members of a shard: 2000-01-01.
_FIXED_TIME = 946_684_800
# Clips in a folder.
_PAGE_SIZE = 100
# Every fourth audio file is a wav, the others are AAC.
_WAV_STEP = 4
# The position of the image in LLaVA's conversations.
_IMAGE_TAG = "<image>"


def media_file(sample: Sample) -> str:
    """Return the path of a sample's file, relative to the split's folder."""
    if sample.kind == "clip":
        return f"webvid/videos/{_page(sample)}/{sample.id}.mp4"
    if sample.kind == "image":
        return f"cc_sbu_align/image/{sample.id}.jpg"
    return f"audio_caption/audio/{sample.id}.{'wav' if int(sample.id) % _WAV_STEP == 0 else 'm4a'}"


def write_annotations(
    folder: Path, clips: Sequence[Sample], images: Sequence[Sample], sounds: Sequence[Sample], seed: int
) -> None:
    """Write all annotations of a split except those in shards and the ground truth."""
    _write_webvid(folder / "webvid/annotations", clips, seed)
    instruct = folder / "webvid_instruct"
    write_json(instruct / "instruct.json", [_instruction(clip, clip.visual_turns) for clip in clips])
    heard = [_instruction(clip, clip.sound_turns) for clip in clips if clip.sound is not None]
    write_json(instruct / "instruct_sound.json", heard)
    chinese = [_instruction(clip, clip.chinese_turns) for clip in clips]
    write_json(folder / "webvid_instruct_zh/instruct.json", chinese)
    captions = [{"image_id": image.id, "caption": image.caption} for image in images]
    write_json(folder / "cc_sbu_align/filter_cap.json", {"annotations": captions})
    write_json(folder / "llava_instruct/llava_instruct_150k.json", [_llava(image) for image in images])
    rows = [[Path(media_file(sound)).name, sound.caption] for sound in sounds]
    _write_table(folder / "audio_caption/captions.csv", ["audio", "caption"], rows)
    conversations = [_messages(sample) for sample in (*clips, *images, *sounds)]
    write_json_lines(folder / "messages/messages.jsonl", conversations)


def write_shard(path: Path, images: Iterable[tuple[Sample, bytes]]) -> None:
    """Write a webdataset tar of `KEY.jpg` and `KEY.json`; the same images give the same bytes."""
    webdataset = import_extra("webdataset", "writing shards")
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=_FIXED_TIME) as tar:
        for sample, content in images:
            tar.write({"__key__": sample.id, "jpg": content, "json": {"caption": sample.caption}})


def write_json(path: Path, content: Any) -> None:
    """Write UTF-8 JSON, one entry of a list a line."""
    entries = [json.dumps(entry, ensure_ascii=False) for entry in content] if isinstance(content, list) else []
    text = "[\n" + ",\n".join(entries) + "\n]" if entries else json.dumps(content, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: Path, entries: Iterable[Any]) -> None:
    """Write UTF-8 JSONL."""
    path.touch()
    for entry in entries:
        append_jsonl(path, entry)


def _page(clip: Sample) -> str:
    split_first = max(first for first in FIRST_IDS.values() if first <= int(clip.id))
    start = (int(clip.id) - split_first) // _PAGE_SIZE * _PAGE_SIZE
    return f"{start:06d}_{start + _PAGE_SIZE - 1:06d}"


def _write_webvid(folder: Path, clips: Sequence[Sample], seed: int) -> None:
    """Write every second clip to a `.csv`, the others to a `.tsv`."""
    header = ["videoid", "contentUrl", "duration", "page_dir", "name"]
    rows = [
        [clip.id, f"clipworld:{seed}/{clip.id}", f"PT00H00M{round(clip.seconds):02d}S", _page(clip), clip.caption]
        for clip in clips
    ]
    _write_table(folder / "clips_0.csv", header, rows[::2])
    if rows[1::2]:
        _write_table(folder / "clips_1.tsv", header, rows[1::2])


def _write_table(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _instruction(clip: Sample, turns: Sequence[Turn]) -> dict[str, Any]:
    video = media_file(clip).removeprefix("webvid/videos/")
    return {"video": video, "QA": [{"q": question, "a": answer} for question, answer in turns]}


def _llava(image: Sample) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(image.visual_turns):
        # LLaVA has the image before some questions and after others.
        if number == 0:
            question = f"{_IMAGE_TAG}\n{question}" if int(image.id) % 2 else f"{question}\n{_IMAGE_TAG}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": image.id, "image": f"{image.id}.jpg", "conversations": conversations}


def _messages(sample: Sample) -> dict[str, Any]:
    """Return a conversation on all modalities of a sample; a clip without audio track has no audio item."""
    path = f"../{media_file(sample)}"
    kinds = {"clip": ["video", "audio"], "image": ["image"], "sound": ["audio"]}[sample.kind]
    if sample.kind == "clip" and sample.sound is None:
        kinds = ["video"]
    content: list[dict[str, str]] = [{"type": kind, "path": path} for kind in kinds]
    messages: list[dict[str, Any]] = []
    for question, answer in sample.mixed_turns or sample.visual_turns or sample.sound_turns:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        content = []
    return {"id": f"{sample.kind}/{sample.id}", "messages": messages}
