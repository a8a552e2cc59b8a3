"""Scripts that were written for the original research code, with one line more."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import video_llama.compat  # noqa: F401
from tests.helpers.checkpoints import AL, VL

ROOT = Path(__file__).parents[2]
MIGRATE = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")

# The calls of the original's `demo_audiovideo.py`, in its order, without the page.
DEMO = """
import video_llama.compat
import argparse
import random

import numpy as np
import torch

from video_llama.common.config import Config
from video_llama.common.dist_utils import get_rank
from video_llama.common.registry import registry
from video_llama.conversation.conversation_video import Chat, Conversation, default_conversation, SeparatorStyle
from video_llama.conversation.conversation_video import conv_llava_llama_2
from video_llama.datasets.builders import *
from video_llama.models import *
from video_llama.processors import *
from video_llama.runners import *
from video_llama.tasks import *

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-path")
parser.add_argument("--gpu-id", type=int, default=0)
parser.add_argument("--model_type", default="vicuna")
parser.add_argument("--options", nargs="+")
parser.add_argument("--video")
parser.add_argument("--image")
args = parser.parse_args()
cfg = Config(args)
seed = cfg.run_cfg.seed + get_rank()
random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
model_config = cfg.model_cfg
model_config.device_8bit = args.gpu_id
model = registry.get_model_class(model_config.arch).from_config(model_config).to("cpu")
model.eval()
vis_processor_cfg = cfg.datasets_cfg.webvid.vis_processor.train
vis_processor = registry.get_processor_class(vis_processor_cfg.name).from_config(vis_processor_cfg)
chat = Chat(model, vis_processor, device="cpu")

template = default_conversation if args.model_type == "vicuna" else conv_llava_llama_2
for upload, file, question in (
    (chat.upload_video, args.video, "What happens in the video?"),
    (chat.upload_video_without_audio, args.video, "What happens in the video?"),
    (chat.upload_img, args.image, "What is in the image?"),
):
    chat_state, img_list = template.copy(), []
    chat_state.system = " "
    assert upload(file, chat_state, img_list) == "Received."
    for text in (question, question):
        chat.ask(text, chat_state)
        answer, tokens = chat.answer(
            conv=chat_state, img_list=img_list, num_beams=1, temperature=0.01, max_new_tokens=300, max_length=2000
        )
        assert chat_state.messages[-1][1] == answer and len(tokens) > 1
        print("ANSWER", len(img_list), answer)
"""

# The calls of the original's `train.py`, in its order.
TRAIN = """
import video_llama.compat
import argparse

import video_llama.tasks as tasks
from video_llama.common.config import Config
from video_llama.common.dist_utils import get_rank, init_distributed_mode
from video_llama.common.logger import setup_logger
from video_llama.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from video_llama.common.registry import registry
from video_llama.common.utils import now
from video_llama.datasets.builders import *
from video_llama.models import *
from video_llama.processors import *
from video_llama.runners import *
from video_llama.tasks import *

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-path", required=True)
parser.add_argument("--options", nargs="+")
job_id = now()
cfg = Config(parser.parse_args())
init_distributed_mode(cfg.run_cfg)
setup_logger()
cfg.pretty_print()
task = tasks.setup_task(cfg)
datasets = task.build_datasets(cfg)
print("DATASETS", sorted(datasets), sorted(datasets["webvid"]))
model = task.build_model(cfg)
print("TRAINS", sum(parameter.requires_grad for parameter in model.parameters()))
runner_cls = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base"))
runner = runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
runner.train()
"""


def run(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints that runs as a file in a folder."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of_the_document() -> list[tuple[str, str]]:
    """(module, name) of the table of modules."""
    lines = MIGRATE[MIGRATE.index("| module | names |") :].split("\n\n")[0].splitlines()[2:]
    pairs = []
    for line in lines:
        modules, names = line.strip("|").split(" | ")
        # What stands behind a colon are methods.
        found = re.findall(r"`(\w+)`", names.partition(":")[0])
        pairs += [(module, name) for module in re.findall(r"`(video_llama[\w.]+)`", modules) for name in found or [""]]
    return pairs


@pytest.mark.parametrize(("module", "name"), names_of_the_document())
def test_every_name_of_the_document_is_there(module: str, name: str) -> None:
    imported = importlib.import_module(module)
    if name:
        assert getattr(imported, name) is not None
        assert name in imported.__all__


def test_a_name_that_is_not_there_is_an_error_that_says_where_to_look() -> None:
    module = importlib.import_module("video_llama.common.registry")
    with pytest.raises(AttributeError, match=r"video_llama\.common\.registry has no 'Registry' .* docs/migrate\.md"):
        _ = module.Registry
    with pytest.raises(ImportError, match="Registry"):
        exec("from video_llama.common.registry import Registry", {})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama_v2", "vicuna"])
def test_the_flow_of_the_demo_answers_as_chat_does(model_type: str, tmp_path: Path) -> None:
    from video_llama import Chat, load_pretrained_model

    video, image = (ROOT / "video_llama/demo/samples" / name for name in ("stars.mp4", "cross.jpg"))
    config = str(ROOT / "eval_configs/tiny.yaml")
    files = ("--video", str(video), "--image", str(image))
    printed = run(DEMO, "--cfg-path", config, "--model_type", model_type, *files, folder=tmp_path)
    answers = re.findall(r"ANSWER (\d) (.*)", printed)

    model = load_pretrained_model("video-llama-tiny", device="cpu")
    expected = []
    for name, file in (("upload_video", video), ("upload_video_without_audio", video), ("upload_img", image)):
        chat = Chat(model)
        getattr(chat, name)(file)
        for _ in range(2):
            chat.ask("What is in the image?" if file == image else "What happens in the video?")
            expected.append((str(1 + (name == "upload_video")), chat.answer()))
    # A temperature this low leaves the most likely token alone.
    assert answers == expected


@pytest.mark.slow
def test_the_example_of_the_document_runs_as_it_stands(
    original_folder: Path, tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    script = next(block for block in re.findall(r"```python\n(.*?)```", MIGRATE, re.DOTALL) if "chat_state" in block)
    # The files under the names that the configuration of the repository gives them.
    published = tmp_path / "checkpoints" / "Video-LLaMA-2-7B-Finetuned"
    shutil.copytree(original_folder, published)
    (published / VL).rename(published / "VL_LLaMA_2_7B_Finetuned.pth")
    (published / AL).rename(published / "AL_LLaMA_2_7B_Finetuned.pth")
    (published / "language_model").rename(published / "llama-2-7b-chat-hf")
    shutil.copytree(ROOT / "eval_configs", tmp_path / "eval_configs")
    make_video("clip.mp4", audio=True)
    assert len(run(script, folder=tmp_path)) > 1


@pytest.mark.slow
def test_the_flow_of_the_training_trains(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from examples.tiny_world.world.corpus import WorldSettings, make_corpus

    make_corpus(tmp_path / "world", WorldSettings(6, 1, 64, (6, 0, 0)))
    (tmp_path / "train.yaml").write_text(
        f"""
model:
  arch: video_llama
  model_type: pretrain_vicuna or pretrain_llama_v2
  llama_model: "{checkpoints["original"]}/language_model" or "ckpt/vicuna-13b/"
  vit_ckpt: {checkpoints["original"]}/eva_vit_g.pth
  q_former_model: {checkpoints["original"]}/blip2_pretrained_flant5xxl.pth
  frozen_llama_proj: False
  frozen_video_Qformer: False
  equip_audio_branch: False
datasets:
  webvid:
    data_type: video
      build_info:
        anno_dir: world/train/webvid/annotations
        videos_dir: world/train/webvid/videos
      vis_processor:
        train: {{name: alpro_video_train, n_frms: 2, image_size: 56}}
run:
  task: video_text_pretrain
  max_epoch: 1
  iters_per_epoch: 2
  batch_size_train: 2
  num_workers: 0
  output_dir: run
  amp: False
  device: cpu
"""
    )
    printed = run(TRAIN, "--cfg-path", "train.yaml", folder=tmp_path)
    assert "DATASETS ['webvid'] ['train']" in printed
    assert re.search(r"TRAINS [1-9]", printed)
    assert (tmp_path / "run" / "checkpoint_0.pth").is_file()
