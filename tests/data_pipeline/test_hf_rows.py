"""Hugging Face datasets: saved folders and local files, with media as paths or as bytes in the rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_pipeline.conftest import write_picture
from video_llama.config import BuildInfo, Config, DatasetConfig
from video_llama.data.batches import BatchReader, load_batches
from video_llama.data.build import EncodedDataset, build_batch_reader, build_datasets, holds_messages
from video_llama.data.checking import check_datasets
from video_llama.data.packing import pack_examples
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor

NUM_ROWS = 23

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the extra datasets: pip install -e .[datasets]"
)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [write_picture(tmp_path / f"{number}.png", (10 * number, 0, 90)) for number in range(NUM_ROWS)]


@pytest.fixture
def saved(pictures: list[Path], tmp_path: Path) -> Path:
    """Captions of images whose bytes are in the rows, as most image datasets on the hub have them."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "caption": f"number {number}"}
        for number, path in enumerate(pictures)
    ]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def make_config(storage: Path | str, **settings: Any) -> Config:
    info = BuildInfo(storage=str(storage), **settings)
    config = Config(datasets={"hf": DatasetConfig(data_type="images", build_info=info, clean_captions=False)})
    config.model.max_txt_len = 200
    config.run.batch_size_train, config.run.iters_per_epoch = 3, 20
    return config


def build(config: Config, processor: VideoLlamaProcessor) -> EncodedDataset:
    [dataset] = build_datasets(config, processor, training=True)
    return dataset


def make_reader(config: Config, processor: VideoLlamaProcessor) -> BatchReader:
    return build_batch_reader(config, [build(config, processor)], processor)


def contents(batches: Iterator[Any]) -> list[Any]:
    return [
        (batch.ids, batch.text["input_ids"].tolist(), [m.values.sum().item() for m in batch.media]) for batch in batches
    ]


@needs_datasets
def test_images_in_rows_are_those_of_files(saved: Path, pictures: list[Path], processor: VideoLlamaProcessor) -> None:
    dataset = build(make_config(saved), processor)
    assert len(dataset.examples) == NUM_ROWS
    example = dataset.examples[5]
    media = dataclasses.replace(dataset.encoder.media, crop_scale=None)
    sample = dataclasses.replace(dataset.encoder, media=media)(example)
    read = processor.media_processor.process_image(pictures[5])
    assert torch.equal(sample.media[0].values, torch.tensor(read.frames).permute(0, 3, 1, 2))
    assert example.text == {"caption": "number 5"}
    assert example.id == "hf/5"


@needs_datasets
@pytest.mark.parametrize("is_held", [True, False])
def test_conversations_name_their_media_by_path_or_hold_them(
    is_held: bool, pictures: list[Path], processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Blue."}]
    image = {"bytes": pictures[2].read_bytes(), "path": "held.png"} if is_held else "2.png"
    features = datasets.Features(
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        images=datasets.List(datasets.Image() if is_held else datasets.Value("string")),
    )
    rows = datasets.Dataset.from_list([{"messages": talk, "images": [image]}], features=features)
    datasets.DatasetDict(validation=rows).save_to_disk(tmp_path / "talks")
    config = make_config(tmp_path / "talks", split="validation", videos_dir=str(tmp_path))
    assert holds_messages("hf", config.datasets["hf"])
    dataset = build(config, processor)
    sample = dataset.encoder(dataset.examples[0])
    text = processor.tokenizer.decode([token for token in sample.input_ids if token < len(processor.tokenizer)])
    assert "<Image></Image>" in text.replace(" ", "")
    media = dataclasses.replace(dataset.encoder.media, crop_scale=None)
    [item] = dataclasses.replace(dataset.encoder, media=media)(dataset.examples[0]).media
    read = processor.media_processor.process_image(pictures[2])
    assert torch.equal(item.values, torch.tensor(read.frames).permute(0, 3, 1, 2))
    with pytest.raises(DatasetError, match="cannot be loaded by the library datasets, split 'train'"):
        build(make_config(tmp_path / "talks"), processor)


@needs_datasets
def test_a_run_that_goes_on_in_the_middle_reads_the_same_samples(saved: Path, processor: VideoLlamaProcessor) -> None:
    config = make_config(saved)
    whole = contents(load_batches(make_reader(config, processor), range(20), num_workers=0))
    # From another process's point of view: nothing is left of the reader before.
    assert build(config, processor).examples.digest() == build(config, processor).examples.digest()
    resumed = contents(load_batches(make_reader(config, processor), range(11, 20), num_workers=0))
    assert resumed == whole[11:]
    assert contents(load_batches(make_reader(config, processor), range(5, 20), num_workers=2)) == whole[5:]
    ids = [id_ for batch in whole for id_ in batch[0]]
    # Each pass has every row once, and an order of its own.
    first, second = ids[:NUM_ROWS], ids[NUM_ROWS : 2 * NUM_ROWS]
    assert set(first) == set(second) == {f"hf/{number}" for number in range(NUM_ROWS)}
    assert first != second


@needs_datasets
def test_a_malformed_row_is_a_bad_sample(tmp_path: Path, processor: VideoLlamaProcessor) -> None:
    write_picture(tmp_path / "a.png")
    rows = [{"image": "a.png" if number != 4 else "", "caption": f"number {number}"} for number in range(8)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(tmp_path / "rows", videos_dir=str(tmp_path))
    reader = make_reader(config, processor)
    [failure] = [failure for number in range(3) for failure in reader[number].failures][:1]
    assert "row 4: the column 'image' must name one file" in failure.reason
    [check] = check_datasets(config, processor)
    assert (check.num_decoded, check.media["image"], [bad.outcome for bad in check.bad]) == (8, 7, ["malformed"])


@needs_datasets
def test_rows_can_be_packed_into_shards(saved: Path, processor: VideoLlamaProcessor, tmp_path: Path) -> None:
    dataset = build(make_config(saved), processor)
    named = [
        dataclasses.replace(example, source=dataclasses.replace(example.source, name="a.png"))
        for example in (dataset.examples[index] for index in range(3))
    ]
    assert pack_examples(named, tmp_path / "shards", max_count=10, max_bytes=10**9).num_examples == 3


@needs_datasets
def test_what_the_library_cannot_load_is_one_error(tmp_path: Path, processor: VideoLlamaProcessor) -> None:
    with pytest.raises(DatasetError, match=r"datasets\.hf: .*cannot be loaded by the library datasets"):
        build(make_config(tmp_path / "absent"), processor)


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, processor: VideoLlamaProcessor
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'datasets is not installed: pip install "video_llama\[datasets\]"'):
        build(make_config("owner/name"), processor)
