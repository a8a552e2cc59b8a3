"""The tables of docs/training.md: which keys train which part, and which data lead to which branch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import write_picture
from video_llama.config import BuildInfo, Config, DatasetConfig, ModelConfig
from video_llama.data.build import build_datasets
from video_llama.errors import ConfigError
from video_llama.model.parts import trained_parts
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.schema import FREEZING_KEYS
from video_llama.training.reach import Reach, check_reach, sends_images_to_audio

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BRANCHES = {"pixel_values": "video_branch", "audio_values": "audio_branch", "audio_pixel_values": "audio_branch"}
# Of each branch a part that trains, by the original's keys.
KEYS = {"video_branch": "frozen_video_Qformer", "audio_branch": "frozen_audio_Qformer"}
# By the first cell of a row: samples of the data that it names.
ITEMS = {
    "messages with video or images": [["video"], ["image"]],
    "messages with audio": [["audio"]],
    "messages with a video and its audio": [["video", "audio"]],
    "messages of text alone": [[]],
}


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading."""
    below = TEXT[TEXT.index(f"\n{heading}\n") :]
    lines = below[below.index("\n|") :].strip().partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_parts_names_all_of_them_with_their_keys() -> None:
    described = {row[1].strip("`"): row[2] for row in table("## What trains")}
    assert described.keys() == FREEZING_KEYS.keys()
    for part, key in FREEZING_KEYS.items():
        assert described[part].startswith("–" if key is None else f"`{key}`")
        assert trained_parts(ModelConfig(unfreeze=[part])) == {part}
        if key is not None:
            together = {other for other in FREEZING_KEYS if FREEZING_KEYS[other] == key}
            assert trained_parts(ModelConfig(**{key: False})) == together
            assert ("both audio parts" in described[part]) == (len(together) > 1 and part == "audio_projection")


def of_one_file(corpus: Path, data_type: str) -> dict[str, DatasetConfig]:
    train = corpus / "train"
    if data_type == "images":
        info = BuildInfo(storage=str(train / "cc_sbu_align"))
        return {"cc_sbu_align": DatasetConfig(data_type="images", build_info=info)}
    info = BuildInfo(anno_dir=str(train / "webvid/annotations"), videos_dir=str(train / "webvid/videos"))
    return {"webvid": DatasetConfig(data_type=data_type, build_info=info)}


def messages(kind: str, items: list[str], corpus: Path, folder: Path) -> dict[str, DatasetConfig]:
    """A dataset of one dialogue, as `messages` or as a row of a table."""
    clip = str(next((corpus / "train/webvid/videos").rglob("*.mp4")))
    path = {"image": str(write_picture(folder / "a.png")), "video": clip, "audio": clip}
    content: Any = [{"type": item, "path": path[item]} for item in items] + [{"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return {kind: DatasetConfig(data_type="video", build_info=BuildInfo(anno_dir=str(folder / "rows.jsonl")))}


def mixtures(data: str, corpus: Path, folder: Path) -> list[dict[str, DatasetConfig]]:
    if data in ITEMS:
        return [messages(kind, items, corpus, folder) for kind in ("messages", "table") for items in ITEMS[data]]
    kinds = {"`data_type: video` or `images`": ["video", "images"], "`data_type: audio`": ["audio"]}
    return [of_one_file(corpus, kind) for kind in kinds[data.partition(",")[0]]]


@pytest.mark.parametrize("row", table("### Which data teach which branch"), ids=lambda row: row[0])
def test_data_lead_where_the_table_says(
    row: list[str], corpus: Path, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    data, *cells = row
    expected = {branch for branch, cell in zip(KEYS, cells, strict=True) if "learns" in cell}
    # Rows that do not name the keys hold with either value.
    frozen = {"audio parts frozen": [True], "an audio part in training": [False]}.get(
        data.rpartition(", ")[2], [True, False]
    )
    for datasets, is_frozen in itertools.product(mixtures(data, corpus, tmp_path), frozen):
        config = Config(datasets=datasets)
        config.model.max_txt_len, config.model.frozen_audio_Qformer = 300, is_frozen
        as_audio = sends_images_to_audio(config)
        [dataset] = build_datasets(config, processor, training=True, images_as_audio=as_audio)
        media = dataset.encoder(dataset.examples[0]).media
        assert {BRANCHES[item.name] for item in media} == expected
        # What the data do not lead to cannot train on them alone.
        for branch in KEYS.keys() - expected:
            setattr(config.model, KEYS[branch], False)
            # With the audio part in training it is another row.
            if sends_images_to_audio(config) == as_audio:
                with pytest.raises(ConfigError, match=f"no dataset leads to the {branch.replace('_', ' ')}"):
                    check_reach(config, Reach.of_datasets(config, [dataset]), has_model=True)
