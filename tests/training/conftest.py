"""A corpus of a few clips and a configuration that trains a tiny random model on it in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama.config import Config, load_config

CONFIG = """
model:
  llama_model: {checkpoint}/language_model
  vit_ckpt: {checkpoint}/eva_vit_g.pth
  q_former_model: {checkpoint}/blip2_pretrained_flant5xxl.pth
  imagebind_ckpt_path: {checkpoint}
  equip_audio_branch: False
  frozen_llama_proj: False
  frozen_video_Qformer: False
  max_txt_len: 64
  dtype: float32
datasets:
  webvid:
    data_type: video
    build_info: {{anno_dir: {data}/train/webvid/annotations, videos_dir: {data}/train/webvid/videos}}
    vis_processor: {{train: {{n_frms: 2}}}}
    sample_ratio: 2
  cc_sbu_align:
    data_type: images
    build_info: {{storage: {data}/train/cc_sbu_align}}
    sample_ratio: 1
run:
  init_lr: 1e-3
  min_lr: 1e-4
  warmup_steps: 3
  max_epoch: 2
  iters_per_epoch: 4
  batch_size_train: 2
  batch_size_eval: 2
  num_workers: 0
  log_freq: 2
  output_dir: {output}
  amp: False
  device: cpu
"""

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "clipworld"
    make_corpus(folder, WorldSettings(15, 1, 64, (10, 5, 0)))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of all parts in the original layout, with what trains the audio branch on images."""
    from examples.random_checkpoint import make_checkpoint  # it imports the whole model

    folder = tmp_path_factory.mktemp("base") / "original"
    make_checkpoint("tiny", "original", folder, imagebind_vision=True)
    return folder


@pytest.fixture
def config_file(base: Path, corpus: Path, tmp_path: Path) -> Path:
    """A YAML that trains the vision branch; its output goes to `run` beside it."""
    path = tmp_path / "train.yaml"
    settings = {"checkpoint": base, "data": corpus, "output": tmp_path / "run"}
    path.write_text(CONFIG.format(**settings))
    return path


@pytest.fixture
def make_config(config_file: Path) -> MakeConfig:
    """The same, read, with overrides: `make_config("run.seed=1")`."""
    return lambda *options: load_config(config_file, options)


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Let a test choose the precision of autocast, which accelerate allows once in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
