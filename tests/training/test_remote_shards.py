"""Training on shards of a server that fails now and then: killed and resumed, and with a shard that gets lost.

The server is one of the web, and an object store that s3fs reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason='aiohttp is not installed: pip install "video_llama[remote]"')

from tests.helpers.faulty_server import Fault, FaultyServer, serve
from tests.training.conftest import MakeConfig
from tests.training.test_resume import ROOT
from tests.training.test_trainer import assert_same, trained
from video_llama.config import save_config
from video_llama.data import remote
from video_llama.data.datasets import build_examples
from video_llama.data.packing import pack_examples
from video_llama.data.remote import list_shards
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow
FAULTS: tuple[Fault, ...] = ("500", "hang", "cut")


@dataclass
class Store:
    """Three shards of the corpus's clips behind a server.

    Args:
        server: whose faults the tests set.
        folder: of the shards, on this machine.
        address: of that folder.
    """

    server: FaultyServer
    folder: Path
    address: str

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.tar"))

    @property
    def shards(self) -> str:
        first, *_, last = (name.removesuffix(".tar") for name in self.names)
        return f"'{self.address}/{{{first}..{last}}}.tar'"


@pytest.fixture(params=["http", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    if request.param == "s3":
        pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "video_llama[remote]"')
    folder = tmp_path / "buckets" / "store"
    clips = build_examples("webvid", make_config().datasets["webvid"])
    pack_examples(clips, folder, max_count=-(-len(clips) // 3), max_bytes=1 << 30)
    monkeypatch.setenv("VIDEO_LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDEO_LLAMA_TIMEOUT", "1")
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_FAILED", {})
    remote._find.cache_clear()
    with serve(folder.parent) as server:
        address = f"{server.address}/store"
        if request.param == "s3":
            address = "s3://store"
            keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": server.address}
            for name, value in keys.items():
                monkeypatch.setenv(name, value)
            # Each test has a server of its own, so what clients keep of the last one is dropped.
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()
        yield Store(server, folder, address)


def options(storage: object, output: Path) -> list[str]:
    keys = {"data_type": "video", "build_info.storage": storage, "vis_processor.train.n_frms": 2, "sample_ratio": 2}
    run = ["run.save_freq=1", "run.iters_per_epoch=15", f"run.output_dir={output}"]
    return [f"datasets.shards:clips.{key}={value}" for key, value in keys.items()] + run


def test_a_run_over_a_store_that_is_killed_and_resumed_ends_as_the_local_one(
    make_config: MakeConfig, store: Store, tmp_path: Path
) -> None:
    local = Trainer(make_config(*options(store.folder, tmp_path / "local")))
    local.train()
    assert len(store.names) == 3
    for name, fault in zip(store.names, FAULTS, strict=True):
        store.server.faults[name] = [fault]
    config = make_config(*options(store.shards, tmp_path / "killed"), "run.num_workers=1")
    save_config(config, tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path / "killed.yaml"), "2", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(trained(tmp_path / "killed"), trained(local.folder))
    assert all(store.server.requests[name] == 2 for name in store.names), "fetched once each, after one fault"
    assert not (tmp_path / "killed/quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("store", "fault"), [("http", "500"), *(("s3", fault) for fault in FAULTS)], indirect=["store"]
)
def test_a_shard_that_gets_lost_costs_one_line(
    make_config: MakeConfig, store: Store, tmp_path: Path, fault: Fault
) -> None:
    trainer = Trainer(make_config(*options(store.shards, tmp_path / "run"), "run.max_bad_samples=0.5"))
    # It was indexed; then its copy is removed, and the server fails.
    for copy in (tmp_path / "cache/files").glob("*.tar"):
        copy.unlink()
    lost = store.names[1]
    store.server.always[lost] = fault
    before = store.server.requests[lost]
    trainer.train()
    attempts = store.server.requests[lost] - before
    # The client for S3 tries again by itself within each of our attempts.
    assert attempts == 4 or (store.address == "s3://store" and attempts > 4)
    [line] = map(json.loads, (tmp_path / "run/quarantine.jsonl").read_text().splitlines())
    assert line["id"] == f"shards:clips/{store.address}/{lost}"
    assert "cannot be fetched, in 4 attempts" in line["reason"]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_folder_of_an_object_store_means_its_shards(store: Store) -> None:
    assert list_shards(f"{store.address}/") == [f"s3://store/{name}" for name in store.names]
