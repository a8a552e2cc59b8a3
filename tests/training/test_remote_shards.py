"""Training on shards of a server that fails now and then: killed and resumed, and with a shard that gets lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason='aiohttp is not installed: pip install "video_llama[remote]"')

from tests.helpers.faulty_server import FaultyServer, serve
from tests.training.conftest import MakeConfig
from tests.training.test_resume import ROOT
from tests.training.test_trainer import assert_same, trained
from video_llama.config import save_config
from video_llama.data import remote
from video_llama.data.datasets import build_examples
from video_llama.data.packing import pack_examples
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Three shards of the corpus's clips behind a server."""
    folder = tmp_path / "store"
    clips = build_examples("webvid", make_config().datasets["webvid"])
    pack_examples(clips, folder, max_count=-(-len(clips) // 3), max_bytes=1 << 30)
    monkeypatch.setenv("VIDEO_LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDEO_LLAMA_TIMEOUT", "1")
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_FAILED", {})
    with serve(folder) as started:
        yield started


def options(storage: object, output: Path) -> list[str]:
    keys = {"data_type": "video", "build_info.storage": storage, "vis_processor.train.n_frms": 2, "sample_ratio": 2}
    run = ["run.save_freq=1", "run.iters_per_epoch=15", f"run.output_dir={output}"]
    return [f"datasets.shards:clips.{key}={value}" for key, value in keys.items()] + run


def test_a_run_over_a_store_that_is_killed_and_resumed_ends_as_the_local_one(
    make_config: MakeConfig, server: FaultyServer, tmp_path: Path
) -> None:
    local = Trainer(make_config(*options(server.folder, tmp_path / "local")))
    local.train()
    names = sorted(path.name for path in server.folder.glob("*.tar"))
    assert len(names) == 3
    for name, fault in zip(names, ("500", "hang", "cut"), strict=True):
        server.faults[name] = [fault]
    storage = f"'{server.address}/{{{names[0][:-4]}..{names[-1][:-4]}}}.tar'"
    save_config(make_config(*options(storage, tmp_path / "killed"), "run.num_workers=1"), tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "tests.training.kill_loop", str(tmp_path / "killed.yaml"), "2", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(trained(tmp_path / "killed"), trained(local.folder))
    assert all(server.requests[name] == 2 for name in names), "fetched once each, after one fault"
    assert not (tmp_path / "killed/quarantine.jsonl").exists()


def test_a_shard_that_gets_lost_costs_one_line(make_config: MakeConfig, server: FaultyServer, tmp_path: Path) -> None:
    names = sorted(path.name for path in server.folder.glob("*.tar"))
    storage = f"'{server.address}/{{{names[0][:-4]}..{names[-1][:-4]}}}.tar'"
    trainer = Trainer(make_config(*options(storage, tmp_path / "run"), "run.max_bad_samples=0.5"))
    # It was indexed; then its copy is removed, and the server fails.
    for copy in (tmp_path / "cache/files").glob("*.tar"):
        copy.unlink()
    server.always[names[1]] = "500"
    before = server.requests[names[1]]
    trainer.train()
    assert server.requests[names[1]] == before + 4
    [line] = map(json.loads, (tmp_path / "run/quarantine.jsonl").read_text().splitlines())
    assert line["id"] == f"shards:clips/{server.address}/{names[1]}"
    assert "cannot be fetched, in 4 attempts" in line["reason"]
