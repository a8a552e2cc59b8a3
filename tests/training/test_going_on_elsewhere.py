"""Several nodes without a shared folder, and runs that go on with other data or settings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import MakeConfig
from tests.training.test_distributed import launch, succeeded
from tests.training.test_trainer import read_log
from video_llama.errors import CheckpointError, ConfigError
from video_llama.training import resume
from video_llama.training.checkpoints import checkpoint_identity, list_checkpoints
from video_llama.training.resume import agree_on_checkpoint, check_same_run, report_differences
from video_llama.training.trainer import Trainer


class Processes:
    """Stands for accelerate's view of two processes."""

    num_processes = 2
    is_main_process = True


def pretend(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    """Let a second process, on another host, see something else than this one."""
    monkeypatch.setattr(resume, "_gather", lambda own: [("first", own[1]), ("second", other(own[1]))])


def write_checkpoint(folder: Path, content: bytes = b"weights") -> Path:
    path = folder / "step_00000004"
    path.mkdir(parents=True)
    (path / "state.json").write_text('{"iteration": 4}')
    (path / "trainable.safetensors").write_bytes(content)
    return path


def test_a_process_that_does_not_see_the_checkpoint_or_sees_another_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "checkpoints")
    other = write_checkpoint(tmp_path / "other", b"other weights")
    pretend(monkeypatch, lambda identity: identity)
    assert agree_on_checkpoint(Processes(), "auto", tmp_path / "checkpoints") == path  # type: ignore[arg-type]
    for seen, message in {None: "is not there", checkpoint_identity(other): "is another one there"}.items():
        pretend(monkeypatch, lambda identity, seen=seen: seen)
        with pytest.raises(CheckpointError, match=rf"step_00000004: .* for process 1 on second it {message}.*shared"):
            agree_on_checkpoint(Processes(), "auto", tmp_path / "checkpoints")  # type: ignore[arg-type]


def test_an_identity_is_that_of_the_content(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a")
    assert checkpoint_identity(path) == checkpoint_identity(write_checkpoint(tmp_path / "b"))
    (path / "state.json").write_text('{"iteration": 5}')
    assert checkpoint_identity(path) != checkpoint_identity(tmp_path / "b" / path.name)
    (path / "state.json").unlink()
    assert checkpoint_identity(path) is None


def test_processes_with_other_data_or_settings_are_named_and_paths_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"run.seed": 1, "datasets.clips: number of samples": 40, "model.llama_model": "/node0/llama"}
    monkeypatch.setattr("video_llama.training.resume.socket.gethostname", lambda: "here")
    pretend(monkeypatch, lambda own: own)
    check_same_run(Processes(), described)  # type: ignore[arg-type]
    pretend(monkeypatch, lambda own: {**own, "datasets.clips: number of samples": 39})
    with pytest.raises(ConfigError, match="clips: number of samples is 40 on first and 39 for process 1 on second"):
        check_same_run(Processes(), described)  # type: ignore[arg-type]
    pretend(monkeypatch, lambda own: {key: value for key, value in own.items() if key == "run.seed"})
    with pytest.raises(ConfigError, match="clips is only there on first"):
        check_same_run(Processes(), described)  # type: ignore[arg-type]


@pytest.mark.slow
def test_nodes_without_a_shared_output_folder_stop_at_once_with_one_line(config_file: Path, tmp_path: Path) -> None:
    # Each process has a folder of its own, as on two machines without a shared file system.
    apart = f"run.output_dir={tmp_path}/node${{oc.env:RANK}}"
    together = f"run.output_dir={tmp_path}/node0"
    for options in ([apart], [apart, "run.resume_ckpt_path=auto"]):
        done = launch(2, config_file, *options)
        assert done.returncode != 0
        assert "node0 of process 0 on" in done.stderr
        assert "All nodes need one run.output_dir, on a shared file system" in done.stderr
        # The first time there is no run; then there is one, which only one of the two sees.
        if not (tmp_path / "node0" / "log.jsonl").exists():
            succeeded(launch(2, config_file, together, "run.max_epoch=1"))
    assert not (tmp_path / "node1").exists()
    assert [path.name for path in (tmp_path / "node0").iterdir() if path.name.startswith(".shared")] == []
    assert [line["iteration"] for line in read_log(tmp_path / "node0") if line["event"] == "train"] == [2, 4]


@pytest.mark.slow
def test_a_checkpoint_error_of_the_main_process_ends_the_others_too(config_file: Path, tmp_path: Path) -> None:
    done = launch(2, config_file, f"run.output_dir={tmp_path / 'run'}", "run.resume_ckpt_path=/nowhere")
    assert done.returncode != 0
    assert done.stderr.count("CheckpointError: run.resume_ckpt_path: /nowhere is no training checkpoint") >= 2
    done = launch(2, config_file, f"run.output_dir={tmp_path / 'run'}", "run.seed=${oc.env:RANK}")
    assert done.returncode != 0
    assert "the processes of this run differ: run.seed is 0 on" in done.stderr


def test_one_warning_lists_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    before = {
        "run.init_lr": 1e-3,
        "run.iters_per_epoch": 10,
        "processes": 2,
        "datasets.a: number of samples": 40,
        "datasets.b: number of samples": 3,
    }
    now = {**before, "run.init_lr": 1e-4, "datasets.a: number of samples": 10, "datasets.c: number of samples": 1}
    del now["datasets.b: number of samples"]
    report_differences(Path("run/step_00000004"), before, now)
    (record,) = caplog.records
    assert record.getMessage() == (
        "going on from run/step_00000004 with other settings or data, so the run ends differently: "
        "run.init_lr is 0.001 before and 0.0001 now; datasets.a: number of samples is 40 before and 10 now; "
        "datasets.b is only there before; datasets.c is only there now"
    )
    caplog.clear()
    report_differences(Path("run/step_00000004"), now, now)
    report_differences(Path("run/step_00000004"), {"run.init_lr": 1e-4}, {**now, "run.new_key": 1})
    assert caplog.records == []
    with pytest.raises(ConfigError, match="its run had epochs of 10 iterations, and this configuration makes them 4"):
        report_differences(Path("run/step_00000004"), before, {**now, "run.iters_per_epoch": 4})


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_data_and_rates_says_so(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(make_config("run.max_epoch=1")).train()
    caplog.clear()
    caplog.set_level(logging.WARNING)
    again = "run.resume_ckpt_path=auto"
    # Where things go, and how often they are noted, changes nothing.
    Trainer(make_config("run.max_epoch=1", again, "run.log_freq=1", "run.save_freq=2", "run.num_workers=1"))
    assert [record.getMessage() for record in caplog.records if "going on" in record.getMessage()] == []
    # The same number of samples, of which one has another text.
    copy = tmp_path / "align"
    shutil.copytree(corpus / "train" / "cc_sbu_align", copy)
    captions = json.loads((copy / "filter_cap.json").read_text())
    captions["annotations"][0]["caption"] += " Or not."
    (copy / "filter_cap.json").write_text(json.dumps(captions))
    Trainer(make_config(again, "run.init_lr=1e-4", f"datasets.cc_sbu_align.build_info.storage={copy}"))
    (warning,) = [record.getMessage() for record in caplog.records if "going on" in record.getMessage()]
    for part in ("run.init_lr is 0.001 before and 0.0001 now", "run.max_epoch is 1 before and 2 now"):
        assert part in warning
    assert "datasets.cc_sbu_align: digest of annotations and paths is" in warning
    assert "webvid" not in warning
    with pytest.raises(ConfigError, match="its run had epochs of 4 iterations, and this configuration makes them 2"):
        Trainer(make_config(again, "run.iters_per_epoch=2"))


@pytest.mark.slow
def test_with_another_accumulation_the_ends_of_epochs_are_not_jumped_over(make_config: MakeConfig) -> None:
    options = ["run.iters_per_epoch=6", "run.save_freq=1", "run.keep_checkpoints=20"]
    first = Trainer(make_config(*options))
    first.train()
    path = list_checkpoints(first.folder / "checkpoints")[2]
    for old in [*first.folder.glob("checkpoint_*.pth"), first.folder / "log.jsonl"]:
        old.unlink()
    shutil.copytree(path, first.folder.parent / "from" / path.name)
    options = ["run.iters_per_epoch=6", "run.accum_grad_iters=2", "run.save_freq=4", "run.log_freq=4"]
    there = first.folder.parent / "there"
    again = Trainer(
        make_config(*options, f"run.output_dir={there}", f"run.resume_ckpt_path={first.folder.parent / 'from'}")
    )
    assert again.state.iteration == 3
    again.train()
    log = read_log(there)
    assert [line["iteration"] for line in log if line["event"] == "train"] == [4, 6, 8, 12]
    assert [line["iteration"] for line in log if line["event"] == "save"] == [4, 6, 8, 12]
    assert sorted(file.name for file in there.glob("checkpoint_*.pth")) == ["checkpoint_0.pth", "checkpoint_1.pth"]
