"""Compiled layers: what eager ones compute, one compilation for all of a kind, and what keeps them from running."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch._dynamo.utils import counters

from tests.helpers.tiny_model import make_tiny_config, prompt_ids
from tests.training.conftest import MakeConfig
from tests.training.distributed_run import drop_nothing
from tests.training.test_distributed import ROOT, succeeded
from tests.training.test_trainer import assert_same, events, read_log, trained
from video_llama.errors import ConfigError
from video_llama.model.parts import freeze_for_training
from video_llama.model.video_llama import VideoLlamaForConditionalGeneration
from video_llama.training import trainer as trainer_module
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.torch_settings import CompiledLayers, check_compiler
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow

KINDS = 2  # of layers: the language model's and the video Q-Former's


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as always, but leave out Inductor, which takes a minute."""
    monkeypatch.setattr(trainer_module, "CompiledLayers", functools.partial(CompiledLayers, backend="aot_eager"))
    monkeypatch.setattr(trainer_module, "check_compiler", lambda accelerator: None)


def model_that_trains() -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(0)
    config = make_tiny_config(use_audio=False)
    config.text_config.num_hidden_layers = 5
    model = VideoLlamaForConditionalGeneration(config)
    freeze_for_training(model, ("video_qformer", "video_projection"))
    drop_nothing(model)
    return model.train()


def gradients(model: VideoLlamaForConditionalGeneration, size: int, length: int) -> dict[str, torch.Tensor]:
    """Of a batch of samples of that many tokens, after the placeholders."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.tensor([prompt_ids(model.config, 1, "video", *range(3, 3 + length))] * size)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 4, -100)
    tokens = torch.randn(size, 2, 6, 32, generator=generator)
    model.zero_grad()
    model(input_ids=ids, frame_tokens=tokens, labels=labels, answers_only=True, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_compilation_serves_all_layers_and_a_second_one_all_lengths(checkpointing: bool) -> None:
    model, lengths = model_that_trains(), (11, 20, 33, 15)
    names = list(model.state_dict())
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.eval().train()
    expected = [gradients(model, 3, length) for length in lengths]
    compiled = CompiledLayers(model, backend="aot_eager")
    graphs = []
    for length, gradient in zip(lengths, expected, strict=True):
        with compiled.in_use():
            found = gradients(model, 3, length)
        assert found.keys() == gradient.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [KINDS, KINDS + 1, KINDS + 1, KINDS + 1]  # the queries are as many for every text
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


def test_nothing_is_compiled_outside_of_a_step() -> None:
    model = model_that_trains()
    compiled = CompiledLayers(model, backend="aot_eager")
    gradients(model, 2, 12)
    with pytest.raises(KeyError), compiled.in_use():
        raise KeyError
    model.eval()
    model.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=4)
    assert counters["stats"]["unique_graphs"] == 0


def run_both_ways(make_config: MakeConfig, *options: str) -> list[Trainer]:
    trainers = []
    for compiled in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(make_config(*options, f"run.compile={compiled}", f"run.output_dir=run_{compiled}"))
        drop_nothing(trainer.model)
        trainer.train()
        trainers.append(trainer)
    assert counters["stats"]["unique_graphs"] > 0
    return trainers


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if line["event"] == "train"]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ((), 1e-5),
        (("run.accum_grad_iters=2",), 1e-5),
        (("model.use_grad_checkpoint=True",), 1e-5),
        (("run.amp=True", "model.dtype=bfloat16"), 1e-2),
        (("lora.target=language_model", "run.part_lr.lora=0.05"), 1e-5),
    ],
)
def test_a_compiled_run_learns_what_an_eager_one_does(
    options: tuple[str, ...],
    tolerance: float,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    eager, compiled = run_both_ways(make_config, *options)
    assert losses(compiled.folder) == pytest.approx(losses(eager.folder), rel=tolerance)
    ours, theirs = trained(compiled.folder), trained(eager.folder)
    assert ours.keys() == theirs.keys()
    assert any(".lora_" in name for name in ours) == any("lora" in option for option in options)


@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_run_goes_on_after_a_stop_and_validates_in_between(make_config: MakeConfig) -> None:
    valid = "datasets.webvid.valid_build_info"
    build = make_config().datasets["webvid"].build_info
    options = [
        "run.compile=True",
        f"{valid}.anno_dir={build.anno_dir}",
        f"{valid}.videos_dir={build.videos_dir}",
        "run.max_valid_batches=1",
        "run.num_generations=1",
    ]
    trainer = Trainer(make_config(*options))
    trainer.train()
    assert "valid" in events(trainer.folder)
    unbroken = trained(trainer.folder)
    shutil.rmtree(list_checkpoints(trainer.folder / "checkpoints")[-1])
    resumed = Trainer(make_config(*options, "run.resume_ckpt_path=auto"))
    assert resumed.state.iteration == 4
    resumed.train()
    assert_same(trained(resumed.folder), unbroken)


TWO_PROCESSES = """
import functools, sys
from tests.training.distributed_run import drop_nothing
from video_llama.config import load_config
from video_llama.training import trainer as module
if sys.argv[2] == "run.compile=True":
    module.check_compiler = lambda accelerator: None
    module.CompiledLayers = functools.partial(module.CompiledLayers, backend="aot_eager")
trainer = module.Trainer(load_config(sys.argv[1], sys.argv[2:]))
drop_nothing(trainer.model)
trainer.train()
"""


def test_two_processes_compile_as_two_eager_ones_learn(config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    folders = []
    for compiled in (False, True):
        folders.append(tmp_path / f"compiled_{compiled}")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
        options = [f"run.compile={compiled}", "run.max_epoch=1", f"run.output_dir={folders[-1]}"]
        done = subprocess.run(
            [*command, str(config_file), *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=300,
            text=True,
        )
        succeeded(done)
    eager, compiled = folders
    assert "2 process(es), MULTI_CPU" in read_log(compiled)[0]["processes"]
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


def test_a_compiler_that_is_missing_is_found_out_before_a_model_is_loaded(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(ConfigError) as caught:
        check_compiler(SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cpu")))
    message = str(caught.value)
    assert message.startswith("run.compile: torch.compile does not work here (")
    assert message.count("\n") == 0


def test_sharded_weights_are_not_compiled(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    monkeypatch.setattr(trainer_module, "build_accelerator", lambda run, dtype: accelerator)
    with pytest.raises(ConfigError, match=r"run\.compile: with FSDP nothing is compiled; set run\.compile: False"):
        Trainer(make_config("run.compile=True"))
