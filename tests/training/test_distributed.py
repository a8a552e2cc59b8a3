"""Two processes on gloo, as torchrun and accelerate launch start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_config
from tests.training.conftest import MakeConfig
from tests.training.test_trainer import read_log, trained
from video_llama.errors import ConfigError
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.processes import check_processes
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RUN = "tests.training.distributed_run"


def launch(
    num_processes: int, config_file: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--standalone"]
    command = command if num_processes > 1 else [sys.executable]
    return subprocess.run(
        [*command, "-m", RUN, str(config_file), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=300,
        text=True,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-9000:]


@pytest.mark.parametrize("more", [(), ("lora.target=language_model", "lora.alpha=64")], ids=["whole", "adapters"])
def test_two_processes_train_what_one_with_twice_the_batch_does(
    more: tuple[str, ...], config_file: Path, tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    # Random prompts, crops and orders are those of the sample's place, whoever reads it.
    options = ["run.init_lr=1e-8", "run.min_lr=1e-8", *more]
    succeeded(launch(2, config_file, *options, "run.batch_size_train=2", f"run.output_dir={two}"))
    succeeded(launch(1, config_file, *options, "run.batch_size_train=4", f"run.output_dir={one}"))
    log_two, log_one = read_log(two), read_log(one)
    assert "2 process(es), MULTI_CPU, gloo" in log_two[0]["processes"]
    losses = [[line["loss"] for line in log if line["event"] == "train"] for log in (log_two, log_one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # AdamW makes whole steps of gradients that are rounding noise; its running means show the gradients themselves.
    for name, moments in optimizer_state(one).items():
        ours = optimizer_state(two)[name]["exp_avg"]
        # No gradient at all but noise; of `lora_A` none, while `lora_B` is next to zero.
        if not name.endswith("key.bias") and ".lora_A." not in name:
            torch.testing.assert_close(
                ours, moments["exp_avg"], rtol=1e-3, atol=1e-6 * float(moments["exp_avg"].norm())
            )
    ours, theirs = trained(two), trained(one)
    assert all(torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in theirs.items())
    assert any(".lora_B." in name for name in optimizer_state(two)) == bool(more)


def optimizer_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return torch.load(newest / "optimizer.pt", weights_only=True)["state"]


def test_sharded_training_on_two_processes_is_continued_by_one(
    config_file: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    sharded, plain = tmp_path / "sharded", tmp_path / "plain"
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    succeeded(launch(2, config_file, f"run.output_dir={sharded}", **fsdp))
    succeeded(launch(2, config_file, f"run.output_dir={plain}"))
    log = read_log(sharded)
    assert "2 process(es), FSDP, gloo" in log[0]["processes"]
    losses = [[line["loss"] for line in read_log(folder) if line["event"] == "train"] for folder in (sharded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    resumed = Trainer(make_config("run.max_epoch=3", f"run.output_dir={sharded}", "run.resume_ckpt_path=auto"))
    saved = trained(sharded)
    assert all(torch.equal(resumed.model.get_parameter(name), tensor) for name, tensor in saved.items())
    assert resumed.train().iteration == 12


def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_found_out(config_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", RUN, str(config_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:  # a later accelerate may well start two
        assert "2 process(es)" in read_log(tmp_path / "run")[0]["processes"]
    else:
        assert "asked for several processes, but this run has 1" in done.stderr


def test_sharding_that_was_asked_for_and_is_not_there_is_found_out(config_file: Path) -> None:
    done = launch(1, config_file, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert done.returncode != 0
    assert "FSDP was asked for, but accelerate set up NO" in done.stderr


def test_accumulation_with_deepspeed_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Trainer(make_config()).accelerator
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="accum_grad_iters must be 1 with DeepSpeed"):
        check_processes(accelerator, make_config("run.accum_grad_iters=2").run)
    with pytest.raises(ConfigError, match="DEEPSPEED was asked for, but accelerate set up NO"):
        check_processes(accelerator, make_config().run)


def test_each_process_notes_its_own_bad_samples(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    storage = tmp_path / "align"
    (storage / "image").mkdir(parents=True)
    source = corpus / "train" / "cc_sbu_align"
    entries: dict[str, Any] = json.loads((source / "filter_cap.json").read_text())
    (storage / "filter_cap.json").write_text(json.dumps(entries))
    images = sorted((source / "image").iterdir())
    for image in images[1:]:
        (storage / "image" / image.name).write_bytes(image.read_bytes())
    done = launch(
        2,
        config_file,
        f"datasets.cc_sbu_align.build_info.storage={storage}",
        "datasets.webvid.sample_ratio=0",
        "run.max_bad_samples=0.6",
        "run.iters_per_epoch=8",
        f"run.output_dir={tmp_path / 'two'}",
    )
    succeeded(done)
    lines = (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()
    state = json.loads((tmp_path / "two" / "checkpoints" / "step_00000016" / "state.json").read_text())
    assert len(lines) == state["samples_bad"] > 0
    assert state["bad_ids"] == [json.loads(lines[0])["id"]]
    assert all("no such file" in json.loads(line)["reason"] for line in lines)


def test_two_processes_make_up_for_a_validation_together(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    folder, split = tmp_path / "run", corpus / "validation"
    options = [
        f"datasets.webvid.valid_build_info.anno_dir={split / 'webvid' / 'annotations'}",
        f"datasets.webvid.valid_build_info.videos_dir={split / 'webvid' / 'videos'}",
        f"datasets.cc_sbu_align.valid_build_info.storage={split / 'cc_sbu_align'}",
        "run.max_epoch=1",
    ]
    succeeded(launch(2, config_file, *options))
    log = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line).get("dataset") for line in log[-3:]] == ["webvid", "cc_sbu_align", None]
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 8
    (folder / "log.jsonl").write_text("".join(log[:-2]))  # as if it had been killed between the two
    succeeded(launch(2, config_file, *options, "run.resume_ckpt_path=auto"))
    assert [line["dataset"] for line in read_log(folder) if line["event"] == "valid"] == ["webvid", "cc_sbu_align"]
    # What two processes measure is what one does.
    one = tmp_path / "one"
    succeeded(
        launch(
            1, config_file, *options, "run.batch_size_train=4", "run.init_lr=0", "run.min_lr=0", f"run.output_dir={one}"
        )
    )
    again = launch(2, config_file, *options, "run.init_lr=0", "run.min_lr=0", f"run.output_dir={tmp_path / 'again'}")
    succeeded(again)
    figures = [[line for line in read_log(path) if line["event"] == "validation"] for path in (one, tmp_path / "again")]
    assert figures[0][0]["loss"] == pytest.approx(figures[1][0]["loss"], rel=1e-5)
    assert figures[0][0]["num_samples"] == figures[1][0]["num_samples"]
    answers = [sorted((path / "answers.jsonl").read_text().splitlines()) for path in (one, tmp_path / "again")]
    assert answers[0] == answers[1]


def test_two_processes_share_a_pass_over_data_that_does_not_divide(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    options = ["run.iters_per_epoch=null", "run.init_lr=1e-8", "run.min_lr=1e-8", "run.max_epoch=1"]
    options += [f"datasets.{name}.sample_ratio=1" for name in ("webvid", "cc_sbu_align")]
    two, one = tmp_path / "two", tmp_path / "one"
    # Batches of one sample: of ten samples three processes would leave two idle in the last batch; two of five, one.
    storage = tmp_path / "align"
    storage.mkdir()
    (storage / "image").symlink_to(corpus / "train" / "cc_sbu_align" / "image")
    entries = json.loads((corpus / "train" / "cc_sbu_align" / "filter_cap.json").read_text())
    entries["annotations"] = entries["annotations"][:5]
    (storage / "filter_cap.json").write_text(json.dumps(entries))
    options.append(f"datasets.cc_sbu_align.build_info.storage={storage}")
    succeeded(launch(2, config_file, *options, "run.batch_size_train=1", f"run.output_dir={two}"))
    succeeded(launch(1, config_file, *options, "run.batch_size_train=2", f"run.output_dir={one}"))
    losses = [[line["loss_by_dataset"] for line in read_log(path) if line["event"] == "train"] for path in (two, one)]
    assert len(losses[0]) == len(losses[1]) > 2
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    seen = [json.loads((list_checkpoints(path / "checkpoints")[-1] / "state.json").read_text()) for path in (two, one)]
    assert seen[0]["samples_seen"] == seen[1]["samples_seen"]


@pytest.mark.parametrize("hears", [False, True])
def test_what_is_sharded_by_itself_is_in_the_model(hears: bool) -> None:
    model = VideoLlamaForConditionalGeneration(make_tiny_config(use_audio=hears))
    there = {type(module).__name__ for module in model.modules()}
    branches = {"VideoBranch", "AudioBranch"} if hears else {"VideoBranch"}
    assert model._no_split_modules == {"EvaBlock", "LlamaDecoderLayer", *branches}
    assert model._no_split_modules <= there


def test_a_process_whose_partner_was_killed_ends_with_one_line(config_file: Path, tmp_path: Path) -> None:
    # By hand: torchrun would end the other one itself.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "train.py", "--cfg-path", str(config_file), "--options", "run.iters_per_epoch=500"]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in ("0", "1"):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    survivor, victim = processes
    try:
        log = tmp_path / "run" / "log.jsonl"
        until = time.monotonic() + 240
        while not (log.exists() and '"event": "train"' in log.read_text()):
            assert survivor.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        victim.kill()
        _, error = survivor.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert survivor.returncode == 1, error[-2000:]
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: another process of this run ended or does not answer")
    assert "--resume continues" in last
