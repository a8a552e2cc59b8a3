"""The training loop on real files: what is written, what is logged, what stops it."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import MakeConfig
from tests.training.distributed_run import drop_nothing
from video_llama.config import load_config
from video_llama.data.batches import Batch
from video_llama.errors import CheckpointError, ConfigError, DatasetError
from video_llama.inference.load import build_model, load_pretrained_model
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.flops import batch_flops
from video_llama.training.learner import StepOutput, TrainingStopped
from video_llama.training.trainer import Trainer

pytestmark = pytest.mark.slow


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[str]:
    return [line["event"] for line in read_log(folder)]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder / "checkpoints")[-1] / "trainable.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_run_changes_what_trains_and_nothing_else_and_logs_its_course(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    state = trainer.train()
    assert (state.iteration, state.samples_seen, state.samples_bad) == (8, 16, 0)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    log = read_log(trainer.folder)
    assert [line["event"] for line in log] == ["start", "train", "train", "save", "train", "train", "save"]
    assert "1 process" in log[0]["processes"]
    assert all(
        math.isfinite(line["loss"]) and line["samples_per_second"] > 0 for line in log if line["event"] == "train"
    )
    assert load_config(trainer.folder / "config.yaml") == trainer.config


def test_the_iterations_left_at_the_end_of_an_epoch_and_before_a_stop_are_logged_too(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    options = ["run.iters_per_epoch=5", "run.log_freq=3"]
    whole = Trainer(make_config(*options))
    whole.train()
    logged = [line["iteration"] for line in read_log(whole.folder) if line["event"] == "train"]
    assert logged == [3, 5, 6, 9, 10]
    stopped = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'stopped'}"))
    stopped._stop_signal = signal.SIGTERM
    assert stopped.train().iteration == 1
    assert events(stopped.folder) == ["start", "train", "save", "stop"]


def test_frozen_parts_stay_in_evaluation_mode_while_training(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.max_epoch=1", "run.iters_per_epoch=1"))
    trainer.train()
    branch = trainer.model.video_branch
    assert branch.video_qformer.training
    assert not any(module.training for module in (branch.vision_encoder, branch.qformer, trainer.model.language_model))


def test_the_modes_of_the_modules_are_set_again_after_a_validation_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config("run.iters_per_epoch=30"))
    batch, calls = trainer.batches()[0], []
    train = type(trainer.model).train
    monkeypatch.setattr(type(trainer.model), "train", lambda self, mode=True: calls.append(mode) or train(self, mode))
    for _ in range(3):
        trainer.step([batch])
    assert calls == []
    trainer.model.eval()
    trainer.step([batch])
    assert calls == [False, True]
    assert trainer.model.video_branch.video_qformer.training
    assert not trainer.model.video_branch.qformer.training


def test_the_log_has_speeds_padding_and_the_share_of_waiting(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.max_epoch=1"))
    trainer.train()
    lines = [line for line in read_log(trainer.folder) if line["event"] == "train"]
    batches = [trainer.batches()[number] for number in range(4)]
    masks = [batch.text["attention_mask"] for batch in batches]
    for line, pair in zip(lines, (masks[:2], masks[2:]), strict=True):
        real, padded = (sum(int(getattr(mask, name)()) for mask in pair) for name in ("sum", "numel"))
        assert line["padding_share"] == pytest.approx(1 - real / padded, abs=1e-4)
        assert line["tokens_per_second"] == pytest.approx(real / line["seconds"], rel=0.02)
        assert line["data_share"] == pytest.approx(line["data_seconds"] / line["seconds"], abs=0.01)
        assert not {"mfu", "memory_gib"} & line.keys()  # of GPUs


def test_the_share_of_a_gpu_that_is_used_follows_from_what_was_learnt(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_llama.training.trainer.device_peak_flops", lambda accelerator: 1e12)
    trainer = Trainer(make_config("run.max_epoch=1"))
    trainer.train()
    flops = [batch_flops(trainer.model.config, trainer.batches()[number]) for number in range(4)]
    lines = [line for line in read_log(trainer.folder) if line["event"] == "train"]
    for line, expected in zip(lines, (sum(flops[:2]), sum(flops[2:])), strict=True):
        assert line["mfu"] == pytest.approx(expected / 1e12 / line["seconds"], abs=1e-3)
        assert line["mfu"] > 0


def test_the_loss_falls_on_a_batch_seen_again_and_again(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.warmup_steps=0", "run.init_lr=1e-2", "run.iters_per_epoch=30"))
    batch = trainer.batches()[0]
    losses = [trainer.step([batch]).loss for _ in range(12)]
    assert losses[-1] < min(losses[:4])


def test_accumulated_batches_give_the_step_of_one_large_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "accumulated", tmp_path / "large"]
    settings = [
        "model.drop_path_rate=0",
        "run.iters_per_epoch=4",
        "run.max_epoch=1",
        "run.lr_sched=linear_warmup_step_lr",
    ]
    settings += ["run.warmup_steps=0"]
    small = Trainer(make_config(*settings, f"run.output_dir={folders[0]}", "run.accum_grad_iters=2"))
    large = Trainer(make_config(*settings, f"run.output_dir={folders[1]}"))
    drop_nothing(small.model)
    drop_nothing(large.model)
    batches = [small.batches()[number] for number in range(2)]
    accumulated = small.step(batches)
    at_once = large.step([join(batches)])
    assert at_once.loss == pytest.approx(accumulated.loss, rel=1e-5)
    assert at_once.norm == pytest.approx(accumulated.norm, rel=1e-4)
    assert at_once.lr == accumulated.lr
    assert (small.state.iteration, large.state.iteration) == (2, 1)


def join(batches: list[Batch]) -> Batch:
    """Batches of texts and media of any length as one."""
    length = max(batch.text["input_ids"].shape[1] for batch in batches)
    fill = {"labels": -100}
    text = {
        name: torch.cat(
            [
                torch.nn.functional.pad(
                    batch.text[name], (0, length - batch.text[name].shape[1]), value=fill.get(name, 0)
                )
                for batch in batches
            ]
        )
        for name in batches[0].text
    }
    return Batch(0, text, [item for batch in batches for item in batch.media], [i for b in batches for i in b.ids])


def test_resuming_ends_with_the_bits_of_an_unbroken_run(make_config: MakeConfig, tmp_path: Path) -> None:
    unbroken = Trainer(make_config(f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    folder = tmp_path / "broken"
    first = Trainer(make_config(f"run.output_dir={folder}", "run.save_freq=1"))
    for number in range(3):
        first.step([first.batches()[number]])
    first.save()
    resumed = Trainer(make_config(f"run.output_dir={folder}", "run.resume_ckpt_path=auto"))
    assert resumed.state.iteration == 3
    resumed.train()
    assert_same(trained(unbroken.folder), trained(folder))
    assert "resume" in events(folder)


def test_an_epoch_without_a_number_of_iterations_is_one_pass_over_the_data(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    options = ["run.iters_per_epoch=null", "run.batch_size_train=3", "run.accum_grad_iters=2", "run.save_freq=2"]
    options += [f"datasets.{name}.sample_ratio=1" for name in ("webvid", "cc_sbu_align")]
    unbroken = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'unbroken'}"))
    sizes = [len(dataset.examples) for dataset in unbroken.datasets]
    per_epoch = sum(-(-size // 3) for size in sizes)
    assert unbroken.num_iterations == 2 * per_epoch
    seen: list[str] = []
    learn = unbroken.learner.step

    def note(group: list[Batch], *args: Any) -> StepOutput:
        seen.extend(id_ for batch in group for id_ in batch.ids)
        return learn(group, *args)

    unbroken.learner.step = note  # type: ignore[method-assign]
    unbroken.train()
    every = sorted(example.id for dataset in unbroken.datasets for example in dataset.examples)
    assert sorted(seen[: len(every)]) == sorted(seen[len(every) :]) == every
    exported = sorted(path.name for path in unbroken.folder.glob("checkpoint_*.pth"))
    assert exported == ["checkpoint_0.pth", "checkpoint_1.pth"]
    first = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'broken'}"))
    first._stop_signal = signal.SIGTERM
    assert first.train().iteration == 2
    resumed = Trainer(make_config(*options, f"run.output_dir={tmp_path / 'broken'}", "run.resume_ckpt_path=auto"))
    resumed.train()
    assert_same(trained(unbroken.folder), trained(resumed.folder))
    with pytest.raises(ConfigError, match="this configuration makes them"):
        Trainer(make_config(*options[:1], *options[2:], "run.resume_ckpt_path=auto", f"run.output_dir={first.folder}"))


def test_a_finished_run_resumes_to_nothing(make_config: MakeConfig) -> None:
    Trainer(make_config()).train()
    again = Trainer(make_config("run.resume_ckpt_path=auto"))
    assert again.train().iteration == 8


def test_a_run_is_never_written_over(make_config: MakeConfig) -> None:
    Trainer(make_config()).train()
    with pytest.raises(CheckpointError, match=r"already contains a run \(latest: step_00000008.*resume_ckpt_path=auto"):
        Trainer(make_config())


def test_only_the_newest_checkpoints_are_kept(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.save_freq=1", "run.keep_checkpoints=2"))
    trainer.train()
    names = [path.name for path in list_checkpoints(trainer.folder / "checkpoints")]
    assert names == ["step_00000007", "step_00000008"]


def test_a_sigterm_saves_and_ends_the_run_in_good_order(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config())
    learn = trainer.learner.step

    def learn_and_be_told_to_stop(*args: Any) -> StepOutput:
        if trainer.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args)

    trainer.learner.step = learn_and_be_told_to_stop  # type: ignore[method-assign]
    state = trainer.train()
    assert 2 < state.iteration < 8
    assert events(trainer.folder)[-1] == "stop"
    resumed = Trainer(make_config("run.resume_ckpt_path=auto"))
    assert resumed.state.iteration == state.iteration
    resumed.train()
    unbroken = Trainer(make_config(f"run.output_dir={tmp_path / 'unbroken'}"))
    unbroken.train()
    assert_same(trained(resumed.folder), trained(unbroken.folder))


def test_a_sigterm_in_the_last_iteration_of_an_epoch_does_not_lose_the_checkpoint_of_that_epoch(
    make_config: MakeConfig,
) -> None:
    trainer = Trainer(make_config("run.max_epoch=1"))
    learn = trainer.learner.step

    def learn_and_be_told_to_stop(*args: Any) -> StepOutput:
        if trainer.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args)

    trainer.learner.step = learn_and_be_told_to_stop  # type: ignore[method-assign]
    assert trainer.train().iteration == 4
    assert events(trainer.folder)[-1] == "stop"
    assert (trainer.folder / "checkpoint_0.pth").exists()


def test_a_loss_that_is_no_number_stops_the_run(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    with torch.no_grad():
        trainer.model.video_branch.projection.bias.fill_(math.nan)
    with pytest.raises(TrainingStopped, match=r"iteration 0: loss nan.*samples .*/.*run\.on_nan=skip"):
        trainer.train()


def test_a_loss_that_is_no_number_can_be_skipped(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.on_nan=skip"))
    batch = trainer.batches()[0]
    poisoned = trainer.batches()[0]
    for item in poisoned.media:
        item.values = torch.full(item.values.shape, math.nan)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step([poisoned])
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert events(trainer.folder) == ["skip"]
    assert math.isfinite(trainer.step([batch]).loss)


def test_skipping_without_end_stops_the_run_and_is_never_logged_as_a_loss_of_zero(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.on_nan=skip", "run.iters_per_epoch=40", "run.log_freq=10"))
    with torch.no_grad():
        trainer.model.video_branch.projection.bias.fill_(math.nan)
    with pytest.raises(TrainingStopped, match="20 steps in a row were skipped"):
        trainer.train()
    lines = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    (logged,) = (line for line in lines if line["event"] == "train")
    assert logged["loss"] is None
    assert logged["grad_norm"] is None


@pytest.mark.parametrize(("limit", "message"), [(0.01, "than run.max_bad_samples"), (1, "20 samples in a row")])
def test_too_many_unreadable_samples_stop_the_run_with_their_list(
    limit: float, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(f"run.max_bad_samples={limit}", "run.num_workers=1", "datasets.cc_sbu_align.sample_ratio=0")
    config.datasets["webvid"].build_info.videos_dir = str(tmp_path)  # all videos are absent
    with pytest.raises(DatasetError, match=message) as stop:
        Trainer(config).train()
    assert "no such file" in str(stop.value)
    assert "Traceback" not in str(stop.value)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) >= 20


def test_a_few_unreadable_samples_are_replaced_counted_and_noted(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    config = make_config("datasets.webvid.sample_ratio=0", "run.max_bad_samples=0.5")
    copy = tmp_path / "align"
    copy.mkdir()
    source = corpus / "train" / "cc_sbu_align"
    (copy / "image").mkdir()
    (copy / "filter_cap.json").write_bytes((source / "filter_cap.json").read_bytes())
    images = sorted((source / "image").iterdir())
    for number, image in enumerate(images):
        content = image.read_bytes()
        (copy / "image" / image.name).write_bytes(content[: len(content) // 2] if number == 0 else content)
    config.datasets["cc_sbu_align"].build_info.storage = str(copy)
    trainer = Trainer(config)
    state = trainer.train()
    assert 0 < state.samples_bad <= 0.5 * state.samples_seen
    noted = [json.loads(line) for line in (trainer.folder / "quarantine.jsonl").read_text().splitlines()]
    assert len(noted) == state.samples_bad
    assert all(images[0].stem in line["id"] and "truncated" in line["reason"] for line in noted)
    assert state.bad_ids == [noted[0]["id"]]
    strict = make_config("datasets.webvid.sample_ratio=0", f"run.output_dir={tmp_path / 'strict'}")
    strict.datasets["cc_sbu_align"].build_info.storage = str(copy)
    with pytest.raises(DatasetError, match=r"samples cannot be used, more than run\.max_bad_samples \(1\.00%\)"):
        Trainer(strict).train()


def test_figures_reach_the_trackers(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.trackers=[tensorboard]"))
    trainer.train()
    (file,) = (path for path in trainer.folder.rglob("events.out.tfevents.*") if path.parent.name == "video_llama")
    content = file.read_bytes()
    assert all(name in content for name in (b"train/loss", b"train/lr", b"train/samples_per_second"))


def test_recomputed_activations_give_the_same_step(make_config: MakeConfig, tmp_path: Path) -> None:
    steps, calls = [], {}
    for name in ("kept", "recomputed"):
        options = [f"model.use_grad_checkpoint={name == 'recomputed'}", f"run.output_dir={tmp_path / name}"]
        trainer = Trainer(make_config(*options))
        seen: list[object] = []
        trainer.model.language_model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *args, to=seen: to.append(args)
        )
        steps.append(trainer.step([trainer.batches()[0]]))
        calls[name] = len(seen)
    assert calls == {"kept": 1, "recomputed": 2}
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-6)
    assert steps[0].norm == pytest.approx(steps[1].norm, rel=1e-5)


def test_gradients_are_clipped_to_the_norm(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("run.max_grad_norm=1e-3"))
    norms = []
    step = trainer.learner.optimizer.step

    def measure(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))
        return step(*args, **kwargs)

    trainer.learner.optimizer.step = measure  # type: ignore[method-assign]
    assert trainer.step([trainer.batches()[0]]).norm > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_the_audio_branch_trains_on_sound_on_pictures_and_on_both(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    audio = [
        "model.equip_audio_branch=True",
        "model.frozen_audio_Qformer=False",
        "model.frozen_video_Qformer=True",
        "model.frozen_llama_proj=True",
        "run.iters_per_epoch=1",
        "run.max_epoch=1",
    ]
    folder = corpus / "train" / "audio_caption"
    sound = [
        "datasets.audio_caption.data_type=audio",
        f"datasets.audio_caption.build_info.anno_dir={folder / 'captions.csv'}",
        f"datasets.audio_caption.build_info.videos_dir={folder / 'audio'}",
    ]
    pictures = Trainer(make_config(*audio, f"run.output_dir={tmp_path / 'pictures'}"))
    both = Trainer(
        make_config(*audio, *sound, "datasets.audio_caption.sample_ratio=3", f"run.output_dir={tmp_path / 'both'}")
    )
    assert set(inputs_of(pictures)) == {"audio_pixel_values"}
    assert set(inputs_of(both, 12)) == {"audio_pixel_values", "audio_values"}
    for trainer in (pictures, both):
        before = trainer.model.audio_branch.audio_query_tokens.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.audio_branch.audio_query_tokens, before)
        exported = torch.load(trainer.folder / "checkpoint_0.pth", weights_only=True)["model"]
        assert {name.partition(".")[0] for name in exported} == {
            "audio_query_tokens",
            "audio_position_embedding",
            "audio_llama_proj",
            "audio_Qformer",
        }


def inputs_of(trainer: Trainer, count: int = 1) -> list[str]:
    """Which inputs the media of the first batches are meant for."""
    trainer.config.run.iters_per_epoch = count
    return [item.name for number in range(count) for item in trainer.batches()[number].media]


def test_the_original_layout_of_the_result_builds_the_trained_model(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    trainer.train()
    settings = trainer.config.model
    settings.equip_audio_branch = False
    for checkpoint in (trainer.folder / "checkpoint_1.pth", trainer.folder):
        settings.ckpt = str(checkpoint)
        loaded = build_model(settings, device="cpu").model
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(loaded.get_parameter(name), parameter), name


def test_the_output_folder_of_a_run_is_a_model(make_config: MakeConfig, corpus: Path) -> None:
    trainer = Trainer(make_config())
    trainer.train()
    video = next((corpus / "train" / "webvid" / "videos").rglob("*.mp4"))
    for path in (trainer.folder, trainer.folder / "checkpoint_1.pth"):
        loaded = load_pretrained_model(path, device="cpu", half=False)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(loaded.model.get_parameter(name), parameter), name
        frames, _ = loaded.processor.media_processor.process_video(video, audio=False)
        assert isinstance(loaded.generate(frames, max_new_tokens=4), str)
    earlier = load_pretrained_model(trainer.folder / "checkpoint_0.pth", device="cpu", half=False)
    weight = "video_branch.projection.weight"
    assert not torch.equal(earlier.model.get_parameter(weight), trainer.model.get_parameter(weight))


def test_the_output_folder_of_a_run_without_an_epoch_is_no_model_yet(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    trainer.metric_logger.open(trainer.config)
    trainer.metric_logger.log("start", 0)
    with pytest.raises(CheckpointError, match="has not finished an epoch"):
        load_pretrained_model(trainer.folder)


def test_parts_and_processes_that_do_not_fit_are_refused(make_config: MakeConfig) -> None:
    for option, message in {
        "model.frozen_audio_Qformer=False": "equip_audio_branch is False",
        "run.world_size=3": "3 processes were asked for, but this run has 1",
        "run.resume_ckpt_path=/nowhere": "is no training checkpoint",
    }.items():
        with pytest.raises((ConfigError, CheckpointError), match=message):
            Trainer(make_config(option))


@pytest.mark.parametrize("is_sharded", [True, False])
def test_encoders_whose_weights_are_shared_out_take_all_frames_at_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_sharded: bool
) -> None:
    monkeypatch.setattr(Trainer, "_is_sharded", is_sharded)
    model = Trainer(make_config()).model
    assert (model.video_branch.chunk_size is None) is is_sharded
