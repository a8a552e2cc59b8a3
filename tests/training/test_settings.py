"""Settings that make no sense."""

from __future__ import annotations

import pytest

from tests.training.conftest import MakeConfig
from video_llama.errors import ConfigError
from video_llama.training.settings import check_settings
from video_llama.training.trainer import Trainer


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.batch_size_train=0", "run.batch_size_train must be at least 1, but is 0"),
        ("run.batch_size_eval=0", "run.batch_size_eval must be at least 1"),
        ("run.keep_checkpoints=0", "run.keep_checkpoints must be at least 1"),
        ("model.max_txt_len=-5", "model.max_txt_len must be at least 1"),
        ("run.num_workers=-1", "run.num_workers must be at least 0"),
        ("run.seed=-1", "run.seed must be at least 0"),
        ("run.init_lr=-1", "run.init_lr must be at least 0"),
        ("run.init_lr=.nan", "run.init_lr must be at least 0"),
        ("run.save_freq=-1", "run.save_freq must be at least 0"),
        ("run.accum_grad_iters=3", "multiples of run.accum_grad_iters"),
        ("run.max_bad_samples=2", "run.max_bad_samples must be at least 0 and at most 1, but is 2"),
        ("run.beta2=1", "run.beta2 must be at least 0 and less than 1"),
        ("run.max_grad_norm=-1", "run.max_grad_norm must be more than 0"),
        ("run.lr_sched=linear", "unknown learning-rate schedule"),
        ("run.device=gpu", "run.device: unknown device 'gpu'"),
        ("run.device=cuda:1", "run.device is a kind of device .* CUDA_VISIBLE_DEVICES"),
        ("model.model_type=pretrain_lama", "model.model_type must be one of pretrain_llama_v2, pretrain_vicuna"),
        ("datasets.webvid.vis_processor.train.n_frms=0", r"webvid\.vis_processor\.train\.n_frms must be at least 1"),
        ("datasets.webvid.vis_processor.eval.image_size=-1", r"eval\.image_size must be at least 1, but is -1"),
        (["run.compile=True", "model.load_in_4bit=True"], "run.compile takes no language model in 8 or 4 bit"),
        (["run.compile=True", "run.deterministic=True"], "choose one of run.compile and run.deterministic"),
        ("run.trackers=[blackboard]", "known: .*tensorboard"),
        ("run.trackers=[clearml]", "names 'clearml', which is not installed: pip install clearml"),
        ("datasets.webvid.vis_processor.train.video_reader=pyaw", r"train\.video_reader: .*did you mean 'pyav'"),
        ("run.evaluate=True", "no dataset has a valid_build_info"),
        (
            "run.iters_per_epoch=null",
            r"webvid\.sample_ratio is 2.0, but with run\.iters_per_epoch: null every epoch takes",
        ),
        ("datasets.webvid.sample_ratio=-1", "must be 0 or more"),
        ("datasets.webvod.sample_ratio=1", "did you mean 'webvid'.*Known: audio_caption"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(option: str | list[str], message: str, make_config: MakeConfig) -> None:
    options = [option] if isinstance(option, str) else option
    with pytest.raises(ConfigError, match=message):
        check_settings(make_config(*options))


def test_a_device_that_is_not_there_is_named_and_never_replaced_by_another(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"run\.device: device cuda is not .* 0 GPU\(s\); .*; without this"):
        check_settings(make_config("run.device=cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_settings(make_config("run.device=cuda"))


def test_settings_that_make_sense_pass(make_config: MakeConfig) -> None:
    check_settings(make_config())
    check_settings(
        make_config("run.trackers=[tensorboard]", "run.max_grad_norm=1", "datasets.webvid:two.sample_ratio=0")
    )


def test_all_mistakes_are_told_at_once_and_before_anything_loads(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_llama.training.trainer.build_accelerator", pytest.fail)
    with pytest.raises(ConfigError, match=r"run\.seed .*run\.max_grad_norm .*unknown dataset 'sounds'"):
        Trainer(make_config("run.seed=-1", "run.max_grad_norm=0", "datasets.sounds.sample_ratio=1"))
