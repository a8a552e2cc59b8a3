"""What trains: the parts that a configuration names, each with its rate, saved, exported and gone on from exactly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import MakeConfig
from tests.training.test_trainer import trained
from video_llama.config import ModelConfig, load_config
from video_llama.errors import ConfigError
from video_llama.inference.load import load_pretrained_model
from video_llama.model.parts import part_of_parameter, trained_parts
from video_llama.schema import FREEZING_KEYS
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.settings import check_settings
from video_llama.training.trainer import Trainer

VIDEO_PARTS = ("frame_encoder", "frame_qformer", "video_qformer", "video_projection", "language_model")
# The configuration of the tests trains these two by the original's keys.
FROZEN = ["model.frozen_video_Qformer=True", "model.frozen_llama_proj=True"]
SHORT = ["run.max_epoch=1", "run.iters_per_epoch=2", "run.warmup_steps=0"]


def values(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture
def published(base: Path) -> list[str]:
    """Options for a run whose branches have files, so that any of their parts may stay frozen."""
    [video], [audio] = base.glob("VL_*.pth"), base.glob("AL_*.pth")
    return [f"model.ckpt={video}", f"model.ckpt_2={audio}", "model.equip_audio_branch=True"]


def only(*parts: str) -> list[str]:
    """Options that train these parts alone."""
    flags = {key: part not in parts for part, key in FREEZING_KEYS.items() if key and part != "audio_projection"}
    return [f"model.{key}={value}" for key, value in flags.items()] + [f"model.unfreeze=[{','.join(parts)}]"]


def test_the_originals_keys_name_the_same_parts() -> None:
    assert trained_parts(ModelConfig()) == set()
    assert trained_parts(ModelConfig(frozen_audio_Qformer=False)) == {"audio_qformer", "audio_projection"}
    assert trained_parts(ModelConfig(freeze_vit=False, frozen_llama_proj=False)) == {
        "frame_encoder",
        "video_projection",
    }
    assert trained_parts(ModelConfig(unfreeze=["audio_projection"])) == {"audio_projection"}
    assert trained_parts(ModelConfig(unfreeze=[])) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.unfreeze=[video_qformer]"], "frozen_llama_proj is False, but model.unfreeze does not name video_proj"),
        (
            ["model.freeze_vit=True", "model.unfreeze=frame_encoder", *FROZEN],
            "freeze_vit is True, but .* names frame_e",
        ),
        (["model.unfreeze=[llm]"], "model.unfreeze must be one of frame_encoder, .*, but is 'llm'"),
    ],
)
def test_two_keys_that_contradict_each_other_are_named(
    options: list[str], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*only("language_model"), "model.load_in_4bit=True"], "4 bit does not train whole.*lora.target"),
        (only("audio_projection"), "unfreeze trains the audio_projection, but equip_audio_branch is False"),
        (["run.part_lr.language_model=1e-5"], "part_lr names language_model, which does not train"),
        (["run.part_lr.llm=1e-5"], "part_lr names 'llm'; known: frame_encoder"),
        (["run.part_lr.video_qformer=-1"], "part_lr.video_qformer must be at least 0"),
        (["run.part_lr.video_qformer=1e-5", "run.init_lr=0"], "init_lr must be more than 0"),
        ([*only("frame_qformer"), "features.dir=cache"], "features.dir keeps .* but the frame_qformer would train"),
    ],
)
def test_a_choice_of_parts_that_makes_no_sense_is_named(
    options: list[str], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(make_config(*options))


def test_the_configuration_that_a_run_writes_agrees_with_itself(make_config: MakeConfig, tmp_path: Path) -> None:
    from video_llama.config import save_config

    config = make_config(*only("video_qformer", "language_model"), "run.part_lr.language_model=2e-5")
    save_config(config, tmp_path / "written.yaml")
    again = load_config(tmp_path / "written.yaml")
    assert again == config
    assert (again.model.frozen_video_Qformer, again.model.frozen_llama_proj) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_the_part_that_is_named_changes_and_nothing_else(
    part: str, make_config: MakeConfig, published: list[str]
) -> None:
    options = [*published, *SHORT, "run.save_freq=1", *only(part)]
    trainer = Trainer(make_config(*options, "model.dtype=bfloat16"))
    before = values(trainer)
    of_part = {name for name in before if part_of_parameter(name) == part}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == of_part != set()
    assert {before[name].dtype for name in of_part} == {torch.float32}
    trainer.train()
    assert {name for name, value in values(trainer).items() if not torch.equal(value, before[name])} == of_part
    # The run folder is a model, with the same weights to the last bit.
    loaded = load_pretrained_model(trainer.folder, device="cpu", dtype="float32").model
    for name in of_part:
        assert torch.equal(loaded.get_parameter(name), trainer.model.get_parameter(name)), name
    # From its first checkpoint the run ends in the same bits.
    whole = trained(trainer.folder)
    resumed = Trainer(
        make_config(*options, "model.dtype=bfloat16", f"run.resume_ckpt_path={list_checkpoints_of(trainer)[0]}")
    )
    assert resumed.state.iteration == 1
    resumed.train()
    assert all(torch.equal(value, whole[name]) for name, value in trained(resumed.folder).items())


def list_checkpoints_of(trainer: Trainer) -> list[Path]:
    return list_checkpoints(trainer.folder / "checkpoints")


@pytest.mark.slow
def test_the_first_loss_is_the_same_whatever_trains(make_config: MakeConfig, published: list[str]) -> None:
    losses = []
    for number, part in enumerate(("video_projection", "language_model", "frame_encoder")):
        options = [*published, *SHORT, *only(part), f"run.output_dir={make_config().run.output_dir}{number}"]
        trainer = Trainer(make_config(*options))
        losses.append(trainer.step([trainer.batches()[0]]).loss)
    # None of these parts has dropout in training that it has not when it is frozen.
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2


@pytest.mark.slow
def test_a_rate_of_its_own_is_that_of_a_run_with_this_rate(make_config: MakeConfig, tmp_path: Path) -> None:
    def first_change(*options: str) -> dict[str, Tensor]:
        trainer = Trainer(make_config("run.warmup_steps=0", "run.weight_decay=0", *options))
        before = values(trainer)
        trainer.step([trainer.batches()[0]])
        return {name: value - before[name] for name, value in values(trainer).items()}

    own = first_change("run.part_lr.video_projection=5e-4")
    slow = first_change("run.init_lr=5e-4", "run.min_lr=5e-5", f"run.output_dir={tmp_path / 'slow'}")
    fast = first_change(f"run.output_dir={tmp_path / 'fast'}")
    for name, change in own.items():
        expected = slow if part_of_parameter(name) == "video_projection" else fast
        torch.testing.assert_close(change, expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("frame_encoder",), ("frame_qformer", "video_qformer")])
def test_recomputed_activations_of_the_encoders_give_the_same_gradient(
    parts: tuple[str, ...], make_config: MakeConfig, published: list[str]
) -> None:
    norms = []
    for checkpointing in (False, True):
        options = [*published, *only(*parts), f"model.use_grad_checkpoint={checkpointing}"]
        trainer = Trainer(make_config(*options, f"run.output_dir={make_config().run.output_dir}{checkpointing}"))
        norms.append(trainer.step([trainer.batches()[0]]).norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) != 0


@pytest.mark.slow
@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("part", ["frame_encoder", "frame_qformer", "language_model"])
def test_a_part_in_float32_trains_beside_frozen_ones_in_half_precision(
    part: str, amp: bool, make_config: MakeConfig, published: list[str]
) -> None:
    trainer = Trainer(make_config(*published, *only(part), "model.dtype=bfloat16", f"run.amp={amp}"))
    output = trainer.step([trainer.batches()[0]])
    assert output.norm > 0
    assert not output.is_skipped


# Branches that no data reach, or that are random


def messages_of(tmp_path: Path, *kinds: str) -> list[str]:
    """Options for a mixture of messages alone with files of these kinds (which need not exist)."""
    import json

    content: list[dict[str, Any]] = [{"type": kind, "path": f"x.{kind}"} for kind in kinds]
    asked = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "This."}]}) + "\n")
    ratios = [f"datasets.{name}.sample_ratio={ratio}" for name, ratio in (("webvid", 0), ("cc_sbu_align", 0))]
    return [*ratios, "datasets.messages.sample_ratio=1", f"datasets.messages.build_info.anno_dir={file}"]


AUDIO = ["model.equip_audio_branch=True", "model.frozen_audio_Qformer=False"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (
            None,
            AUDIO,
            "frozen_llama_proj, model.frozen_video_Qformer: video_projection, .*two runs, or name videos and",
        ),
        (["audio"], AUDIO, "no dataset leads to the video branch.*messages with them"),
        (["video"], AUDIO, "audio_projection, audio_qformer would train, .*data_type: audio, or messages with audio"),
        ([], [], "no dataset leads to the video branch"),
        (None, FROZEN, "everything is frozen"),
        (None, only("language_model"), "video branch has random weights, because there is no model.ckpt.*webvid"),
        (["video", "audio"], ["model.equip_audio_branch=True"], "no model.ckpt_2.*messages.*equip_audio_branch: False"),
    ],
)
def test_a_branch_that_would_learn_nothing_or_is_random_is_named(
    kinds: list[str] | None, options: list[str], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    mixture = [] if kinds is None else messages_of(tmp_path, *kinds)
    with pytest.raises(ConfigError, match=message):
        Trainer(make_config(*mixture, *options))


@pytest.mark.slow
def test_both_branches_may_train_on_messages_with_video_and_audio(make_config: MakeConfig, tmp_path: Path) -> None:
    Trainer(make_config(*messages_of(tmp_path, "video", "audio"), *AUDIO))


@pytest.mark.slow
def test_a_random_part_beside_one_that_trains_is_warned_of(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Trainer(make_config("model.frozen_llama_proj=True"))
    assert "the video_projection has random weights, because there is no model.ckpt" in caplog.text


@pytest.mark.slow
def test_a_run_with_an_audio_branch_that_no_data_reach_loads_without_it(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("model.equip_audio_branch=True", *SHORT))
    trainer.train()
    assert load_pretrained_model(trainer.folder, device="cpu").model.audio_branch is None


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_without_media_changes_no_weight_of_a_branch(
    accumulated: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = Trainer(make_config(*messages_of(tmp_path), "datasets.webvid.sample_ratio=1", "run.weight_decay=0.5"))
    batches = [trainer.batches()[number] for number in range(8)]
    without = next(batch for batch in batches if not batch.media)
    seen = next(batch for batch in batches if batch.media)
    # The optimizer remembers the gradient of a step with media, and would go on in its direction.
    trainer.step([seen])
    before = values(trainer)
    assert trainer.step([without] * accumulated).norm == 0
    assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())
    trainer.step([seen])
    assert any(not torch.equal(value, before[name]) for name, value in values(trainer).items())
