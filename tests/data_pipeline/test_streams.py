"""Streamed Hugging Face datasets: which rows make which batch, after a stop and for several processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import write_picture
from tests.data_pipeline.test_hf_rows import contents, make_config
from video_llama.config import BuildInfo, Config, DatasetConfig
from video_llama.data.batches import BatchReader, load_batches
from video_llama.data.build import build_batch_reader, build_datasets
from video_llama.data.checking import check_datasets
from video_llama.data.streams import RowStream
from video_llama.errors import ConfigError, DatasetError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.training.settings import check_settings

datasets = pytest.importorskip("datasets")

NUM_FILES, NUM_ROWS = 6, 31


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Captions of images, in files of unequal lengths; the bytes of the images are in the rows."""
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"), id=datasets.Value("string"))
    (tmp_path / "rows").mkdir()
    for file in range(NUM_FILES):
        numbers = range(file, NUM_ROWS, NUM_FILES)
        pictures = [write_picture(tmp_path / f"{number}.png", (8 * number, 0, 90)) for number in numbers]
        made = [
            {"image": {"bytes": path.read_bytes(), "path": None}, "caption": f"number {path.stem}", "id": path.stem}
            for path in pictures
        ]
        datasets.Dataset.from_list(made, features=features).to_parquet(tmp_path / f"rows/train-{file}.parquet")
    return tmp_path / "rows"


def streamed(storage: Path, **settings: Any) -> Config:
    return make_config(storage, streaming=True, shuffle_buffer=4, **settings)


def make_reader(config: Config, processor: VideoLlamaProcessor, rank: int = 0, world_size: int = 1) -> BatchReader:
    built = build_datasets(config, processor, training=True)
    return build_batch_reader(config, built, processor, rank=rank, world_size=world_size)


def ids_of(batches: Iterator[Any]) -> list[str]:
    return [id_ for batch in batches for id_ in batch.ids]


def test_each_pass_has_every_row_once_in_an_order_of_its_own(rows: Path, processor: VideoLlamaProcessor) -> None:
    ids = ids_of(load_batches(make_reader(streamed(rows), processor), range(20), num_workers=0))
    first, second = ids[:NUM_ROWS], ids[NUM_ROWS:60]
    everything = {f"hf/{number}" for number in range(NUM_ROWS)}
    assert set(first) == everything
    assert len(set(second)) == len(second)
    assert first[: len(second)] != second
    # Files are in another order in each pass, and rows of a file within their block.
    in_files = [f"hf/{number}" for file in range(NUM_FILES) for number in range(file, NUM_ROWS, NUM_FILES)]
    assert first != in_files
    config = streamed(rows)
    config.run.seed = 7
    assert ids_of(load_batches(make_reader(config, processor), range(20), num_workers=0)) != ids


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 2), (4, 0), (12, 2)])
def test_a_run_that_goes_on_reads_the_same_samples(
    stop: int, num_workers: int, rows: Path, processor: VideoLlamaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = streamed(rows)
    whole = contents(load_batches(make_reader(config, processor), range(20), num_workers=0))
    reader = make_reader(config, processor)
    batches = load_batches(reader, range(20), num_workers)
    before = [next(batches) for _ in range(stop)]
    assert contents(iter(before)) == whole[:stop]
    assert reader.feed is not None
    # As a checkpoint holds it; workers have been asked for later batches by then.
    places = json.loads(json.dumps(reader.feed.places(stop)))
    # The state of the library is used, and no row before the block is read.
    loaded: list[Any] = []
    load = datasets.IterableDataset.load_state_dict
    monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", lambda s, d: (loaded.append(d), load(s, d))[1])
    going_on = make_reader(config, processor)
    rest = contents(load_batches(going_on, range(stop, 20), num_workers, places=places))
    assert rest == whole[stop:]
    assert loaded[0] == places["0"][4]
    # Without the state, or with that of other rows, the rows before are read and left out.
    assert contents(load_batches(make_reader(config, processor), range(stop, 20), num_workers)) == whole[stop:]
    other = {"0": [["another order"], *places["0"][1:]]}
    assert contents(load_batches(make_reader(config, processor), range(stop, 20), 0, places=other)) == whole[stop:]


@pytest.mark.parametrize("world_size", [2, 3, 4])  # Files are divided among 2 and 3 processes, rows among 4.
def test_processes_share_the_rows_and_none_is_read_twice(
    world_size: int, rows: Path, processor: VideoLlamaProcessor
) -> None:
    config = streamed(rows)
    config.run.batch_size_train = 1
    readers = [make_reader(config, processor, rank, world_size) for rank in range(world_size)]
    ids = [ids_of(load_batches(reader, range(20), num_workers=2)) for reader in readers]
    # No process has more rows in a pass than these.
    per_process = NUM_ROWS // world_size - 2
    counted = Counter(id_ for of_one in ids for id_ in of_one[:per_process])
    assert set(counted.values()) == {1}
    assert len(counted) == per_process * world_size
    # And all of them together have every row of a pass.
    table = build_datasets(config, processor, training=True)[0].examples
    first_pass = []
    for rank in range(world_size):
        share = table.stream([1, 0], rank, world_size).read()
        first_pass += [row.cells["id"] for row, _ in takewhile(lambda item: item[1].number_of_pass == 0, share)]
    assert sorted(first_pass, key=int) == [str(number) for number in range(NUM_ROWS)]


def test_a_stream_is_mixed_with_other_datasets_and_both_go_on(
    rows: Path, processor: VideoLlamaProcessor, tmp_path: Path
) -> None:
    write_picture(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "caption": f"line {number}"}) for number in range(5)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    config = streamed(rows)
    config.datasets["hf"].sample_ratio = 1
    info = BuildInfo(anno_dir=str(tmp_path / "lines.jsonl"))
    config.datasets["table"] = DatasetConfig(data_type="images", build_info=info, sample_ratio=2)
    reader = make_reader(config, processor)
    whole = list(load_batches(reader, range(20), num_workers=0))
    kinds = [batch.ids[0].partition("/")[0] for batch in whole]
    assert Counter(kinds).keys() == {"hf", "table"}
    stop = kinds.index("hf") + 1
    batches = load_batches(reader, range(20), num_workers=2)
    for _ in range(stop):
        next(batches)
    assert reader.feed is not None
    places = reader.feed.places(stop)
    going_on = make_reader(config, processor)
    batches = load_batches(going_on, range(stop, 20), num_workers=2, places=places)
    # A second stop, before the stream was read again, loses nothing either.
    if kinds[stop] == "table":
        next(batches)
        stop += 1
    assert going_on.feed is not None
    assert going_on.feed.places(stop) == places
    rest = load_batches(make_reader(config, processor), range(stop, 20), 0, places=places)
    assert contents(rest) == contents(iter(whole[stop:]))


def test_a_bad_row_is_replaced_and_says_where_it_is(processor: VideoLlamaProcessor, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    (tmp_path / "rows").mkdir()
    made = [{"image": "a.png" if number != 4 else "", "caption": f"number {number}"} for number in range(8)]
    (tmp_path / "rows/train.jsonl").write_text("\n".join(map(json.dumps, made)))
    config = streamed(tmp_path / "rows", videos_dir=str(tmp_path))
    config.run.batch_size_train = 2
    batches = list(load_batches(make_reader(config, processor), range(4), num_workers=1))
    [failure] = [failure for batch in batches for failure in batch.failures]
    assert "row 4 of pass 0 in process 0: the column 'image' must name one file" in failure.reason
    assert all(len(batch.ids) == 2 and not batch.gave_up for batch in batches)
    [check] = check_datasets(config, processor)
    assert (check.is_stream, check.num_decoded, [bad.outcome for bad in check.bad]) == (True, 8, ["malformed"])


def test_errors_of_the_library_while_it_reads_are_errors_of_the_dataset(
    rows: Path, processor: VideoLlamaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = streamed(rows)
    reader = make_reader(config, processor)
    (rows / "train-2.parquet").write_bytes(b"PAR1 damaged")
    (rows / "train-5.parquet").unlink()
    with pytest.raises(DatasetError, match=r"rows \(train\): the stream cannot be read on \("):
        list(load_batches(reader, range(20), num_workers=0))


def test_a_process_without_rows_is_an_error_and_does_not_wait_for_ever(
    rows: Path, processor: VideoLlamaProcessor
) -> None:
    table = build_datasets(streamed(rows), processor, training=True)[0].examples
    with pytest.raises(DatasetError, match="the stream has no rows for process 31"):
        next(RowStream(table.rows.take(3), "rows", block_size=4, seed=[1], rank=31, world_size=32).read())


def test_what_a_stream_cannot_do_is_refused_at_once(rows: Path) -> None:
    config = streamed(rows)
    check_settings(config)
    config.run.iters_per_epoch = None
    config.features.dir = "cache"
    config.datasets["webvid"] = DatasetConfig(build_info=BuildInfo(streaming=True), sample_ratio=1)
    config.datasets["hf"].valid_build_info = BuildInfo(storage="rows", streaming=True)
    with pytest.raises(ConfigError) as raised:
        check_settings(config)
    for part in (
        "hf.build_info.streaming: run.iters_per_epoch must be set",
        "hf.build_info.streaming: sample_ratio must be set",
        "hf.build_info.streaming: features.dir",
        "webvid.build_info.streaming: only the dataset hf can be streamed",
        "hf.valid_build_info.streaming: samples of a validation split are drawn",
    ):
        assert part in str(raised.value)


def test_a_folder_of_save_to_disk_is_not_streamed(processor: VideoLlamaProcessor, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"image": "a.png", "caption": "a"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DatasetError, match=r"read at random places: leave build_info\.streaming out"):
        build_datasets(streamed(tmp_path / "saved"), processor, training=True)
