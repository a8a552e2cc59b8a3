"""Adapters by the section `lora`: what trains, what is written, and that every way to load it answers alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import MakeConfig
from tests.training.test_parts import SHORT, only, published, values
from tests.training.test_trainer import trained
from video_llama.cli import caption, convert, demo_video, evaluate
from video_llama.data.batches import Batch
from video_llama.errors import CheckpointError, ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.load import build_model, load_pretrained_model
from video_llama.model.parts import part_of_parameter
from video_llama.training.checkpoints import list_checkpoints
from video_llama.training.learner import teaching_inputs
from video_llama.training.settings import check_settings
from video_llama.training.trainer import Trainer

peft = pytest.importorskip("peft")

__all__ = ["published"]

ON_LANGUAGE_MODEL = [*only("video_projection"), "lora.target=language_model", "lora.r=4", "lora.alpha=64"]
FAST = [*SHORT, "run.part_lr.lora=0.05"]


@torch.no_grad()
def loss_of(model: VideoLlama, batch: Batch) -> float:
    inner = model.model.eval()
    return float(inner(**teaching_inputs(batch, inner.config, torch.device("cpu"))).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.target=video_qformer"], "video_qformer would train whole and by adapters"),
        (["lora.target=audio_qformer"], "names audio_qformer, but model.equip_audio_branch is False"),
        (["lora.target=language_model", "model.adapter=x"], "choose one of lora.target.*and model.adapter"),
        (["lora.target=language_model", "lora.r=0"], "lora.r must be at least 1"),
        (["lora.target=language_model", "lora.dropout=1"], "lora.dropout must be at least 0 and less than 1"),
        (["run.part_lr.lora=1e-4"], "part_lr names lora, which does not train"),
        (["lora.target=frame_encoder", "features.dir=x"], "features.dir keeps .* but the frame_encoder would train"),
    ],
)
def test_adapters_that_make_no_sense_are_named(options: list[str], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(make_config(*options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "modules", "expected"),
    [
        ("language_model", None, {"language_model"}),
        ("language_model", "[q_proj, v_proj]", {"language_model"}),
        ("frame_encoder", None, {"frame_encoder"}),
        ("[frame_encoder, qformers]", None, {"frame_encoder", "frame_qformer", "video_qformer"}),
    ],
)
def test_only_the_adapters_and_what_is_named_change_and_a_run_goes_on_exactly(
    target: str, modules: str | None, expected: set[str], make_config: MakeConfig, published: list[str]
) -> None:
    options = [*published, *only("video_projection"), *FAST, f"lora.target={target}", "run.save_freq=1"]
    options += ["model.equip_audio_branch=False", "lora.dropout=0.1"]
    if modules is not None:
        options.append(f"lora.modules={modules}")
    trainer = Trainer(make_config(*options))
    before = values(trainer)
    lora = {name for name in before if ".lora_" in name}
    assert {part_of_parameter(name) for name in lora} == expected
    if modules is not None:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora} == {"q_proj", "v_proj"}
    else:
        assert not any("lm_head" in name for name in lora)
    learning = lora | {name for name in before if part_of_parameter(name) == "video_projection"}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == learning
    assert {before[name].dtype for name in learning} == {torch.float32}
    dropout = [module.training for name, module in trainer.model.train().named_modules() if "lora_dropout." in name]
    assert dropout
    assert all(dropout)
    trainer.train()
    assert {name for name, value in values(trainer).items() if not torch.equal(value, before[name])} == learning
    whole = trained(trainer.folder)
    first = list_checkpoints(trainer.folder / "checkpoints")[0]
    resumed = Trainer(make_config(*options, f"run.resume_ckpt_path={first}"))
    assert resumed.state.iteration == 1
    resumed.train()
    assert all(torch.equal(value, whole[name]) for name, value in trained(resumed.folder).items())


@pytest.mark.slow
def test_adapters_of_all_qformers_learn_from_video_and_audio(
    make_config: MakeConfig, published: list[str], corpus: Path
) -> None:
    sources = ["datasets.webvid.sample_ratio=0", "datasets.cc_sbu_align.sample_ratio=0"]
    sources += ["datasets.messages.sample_ratio=1"]
    sources += [f"datasets.messages.build_info.anno_dir={corpus / 'train' / 'messages'}"]
    options = [*published, *only(), *FAST, *sources, "lora.target=qformers", "run.batch_size_train=8"]
    options += ["model.max_txt_len=400"]
    trainer = Trainer(make_config(*options))
    before = values(trainer)
    lora = {name for name in before if ".lora_" in name}
    assert {part_of_parameter(name) for name in lora} == {"frame_qformer", "video_qformer", "audio_qformer"}
    batch = trainer.batches()[0]
    assert {item.name for item in batch.media} == {"pixel_values", "audio_values"}
    trainer.train()
    assert {name for name, value in values(trainer).items() if not torch.equal(value, before[name])} == lora
    expected = loss_of(VideoLlama(trainer.model, trainer.processor), batch)
    assert loss_of(load_pretrained_model(trainer.folder, device="cpu", dtype="float32"), batch) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([], 1e-6),
        (["model.load_in_4bit=True"], 1e-6),
        (["model.dtype=bfloat16", "run.amp=True"], 1e-2),
        (["model.dtype=bfloat16", "run.amp=True", "model.load_in_4bit=True", "model.use_grad_checkpoint=True"], 1e-2),
    ],
)
def test_the_first_loss_is_that_of_the_model_without_adapters(
    options: list[str], tolerance: float, make_config: MakeConfig, published: list[str], tmp_path: Path
) -> None:
    if "model.load_in_4bit=True" in options:
        pytest.importorskip("bitsandbytes")

    def first_loss(*more: str) -> float:
        trainer = Trainer(make_config(*published, *SHORT, *only("video_projection"), *options, *more))
        output = trainer.step([trainer.batches()[0]])
        assert output.norm > 0
        assert not output.is_skipped
        return output.loss

    plain = first_loss(f"run.output_dir={tmp_path / 'plain'}")
    assert first_loss("lora.target=[language_model, frame_encoder]") == pytest.approx(plain, rel=tolerance)


def test_without_peft_one_line_says_what_to_install(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("training.settings", "utils.extras"):
        monkeypatch.setattr(f"video_llama.{module}.is_installed", lambda package: package != "peft")
    with pytest.raises(ConfigError, match=r'^lora: peft is not installed: pip install "video_llama\[lora\]"$'):
        check_settings(make_config("lora.target=language_model"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^adapters: peft is not installed"):
        load_pretrained_model(tmp_path, model_base="video-llama-tiny", device="cpu")


@pytest.mark.slow
def test_a_run_its_adapter_peft_and_the_merged_model_answer_alike(
    make_config: MakeConfig, published: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Adapters alone: nothing else of the model that they belong to changes.
    config = make_config(*published, *only(), *FAST, "lora.target=language_model", "lora.alpha=64")
    trainer = Trainer(config)
    batch = trainer.batches()[0]
    untrained = loss_of(build_model(config.model, device="cpu"), batch)
    trainer.train()
    expected = loss_of(VideoLlama(trainer.model, trainer.processor), batch)
    assert abs(expected - untrained) > 1e-3
    run, folder = trainer.folder, trainer.folder / "adapter_0"
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}

    loading: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    assert loss_of(load_pretrained_model(run, **loading), batch) == expected
    assert loss_of(load_pretrained_model(folder, **loading), batch) == expected
    assert loss_of(load_pretrained_model(run, merge_adapter=True, **loading), batch) == pytest.approx(
        expected, rel=1e-5
    )
    base = next(option for option in published if "ckpt=" in option).partition("=")[2]
    options = {**loading, "model_base": Path(base).parent}
    assert loss_of(load_pretrained_model(folder, **options), batch) == expected

    # PEFT itself reads the folder.
    by_peft = load_pretrained_model(base, **loading)
    peft.PeftModel.from_pretrained(by_peft.model, str(folder))
    assert loss_of(by_peft, batch) == expected

    assert convert.main(["--merge", str(run), str(tmp_path / "merged")]) == 0
    merged = load_pretrained_model(tmp_path / "merged", **loading)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert loss_of(merged, batch) == pytest.approx(expected, rel=1e-5)
    command = ["--merge", str(folder), "--model-base", str(Path(base).parent), str(tmp_path / "merged2")]
    assert convert.main(command) == 0
    assert loss_of(load_pretrained_model(tmp_path / "merged2", **loading), batch) == pytest.approx(expected, rel=1e-5)
    assert "adapters of the language model" in (tmp_path / "merged" / "README.md").read_text()

    # The same text from the commands.
    clip = next((corpus / "train" / "webvid" / "videos").rglob("*.mp4"))
    ways = [
        ["--model", str(run)],
        ["--model", str(folder), "--model-base", base],
        ["--model", str(tmp_path / "merged")],
    ]
    assert len({answer_of(way, clip, capsys) for way in ways}) == 1
    assert len({caption_of(way, clip, tmp_path / f"{number}.jsonl") for number, way in enumerate(ways)}) == 1
    assert len({evaluated(way, clip, tmp_path) for way in ways}) == 1


def answer_of(way: list[str], clip: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    command = [*way, "--device", "cpu", "--dtype", "float32", "--input", str(clip), "--question", "What is there?"]
    assert demo_video.main([*command, "--max-new-tokens", "8"]) == 0
    return capsys.readouterr().out


def caption_of(way: list[str], clip: Path, output: Path) -> str:
    command = [*way, "--dtype", "float32", "--max-new-tokens", "8", "--workers", "0", "--output", str(output)]
    assert caption.main([*command, str(clip)]) == 0
    return str(json.loads(output.read_text())["caption"])


def evaluated(way: list[str], clip: Path, folder: Path) -> str:
    turns = [{"role": "user", "content": "<video>What is there?"}, {"role": "assistant", "content": "A star."}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns, "videos": [str(clip)]}))
    command = ["--dataset", "messages", "--data", str(folder / "rows.jsonl"), "--json", str(folder / "figures.json")]
    assert evaluate.main([*way, *command, "--device", "cpu", "--max-new-tokens", "8", "--workers", "0"]) == 0
    report = json.loads((folder / "figures.json").read_text())
    assert report.get("model_base") == (way[3] if "--model-base" in way else None)
    return str(report["answers"])


def test_options_without_effect_on_a_merge_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--merge", "--llama-model", "x"], "--llama-model has no effect with --merge"),
        (["--merge", "--imagebind-vision"], "--imagebind-vision has no effect with --merge"),
        (["--merge", "--to", "original"], "--merge writes a folder for transformers"),
        (["--model-base", "x"], "--model-base belongs to --merge"),
    ):
        assert convert.main([*options, "source", "output"]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "folder"])
def test_a_run_of_adapters_beside_small_parts_loads_with_both(
    layout: str, make_config: MakeConfig, published: list[str], tmp_path: Path
) -> None:
    options = [*published, *ON_LANGUAGE_MODEL, *FAST]
    if layout == "folder":
        ckpt = next(option for option in published if "ckpt=" in option).partition("=")[2]
        assert convert.main([str(Path(ckpt).parent), str(tmp_path / "whole")]) == 0
        options += [f"model.ckpt={tmp_path / 'whole'}", "model.ckpt_2=null", "model.llama_model=null"]
    trainer = Trainer(make_config(*options))
    batch = trainer.batches()[0]
    trainer.train()
    expected = loss_of(VideoLlama(trainer.model, trainer.processor), batch)
    assert loss_of(load_pretrained_model(trainer.folder, device="cpu", dtype="float32"), batch) == expected

    # A later run goes on from the adapter.
    later = make_config(
        *options,
        "lora.target=null",
        f"model.adapter={trainer.folder}",
        f"model.ckpt={trainer.folder}" if layout == "original" else "run.seed=1",
        f"run.output_dir={tmp_path / 'later'}",
    )
    again = Trainer(later)
    own = {name: value for name, value in values(trainer).items() if ".lora_" in name}
    assert all(torch.equal(again.model.get_parameter(name), value) for name, value in own.items())
    assert all(again.model.get_parameter(name).requires_grad for name in own)
    again.step([batch])
    assert any(not torch.equal(again.model.get_parameter(name), value) for name, value in own.items())


@pytest.mark.slow
def test_an_adapter_of_another_model_or_damaged_is_refused(
    make_config: MakeConfig, published: list[str], tmp_path: Path
) -> None:
    trainer = Trainer(make_config(*published, *ON_LANGUAGE_MODEL, *FAST))
    trainer.train()
    section = make_config(*published).model
    file = trainer.folder / "adapter_0" / "adapter_model.safetensors"
    content = file.read_bytes()
    section.adapter = str(file.parent)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a PEFT adapter of this model"):
        build_model(section, device="cpu")
    section.adapter = str(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder of a PEFT adapter"):
        build_model(section, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("on", ["language_model", "layers", "whole", "wrapped", "beside a whole projection"])
def test_adapters_that_the_caller_made_train_and_are_saved(
    on: str, make_config: MakeConfig, published: list[str]
) -> None:
    flags = [option for option in only() if "unfreeze" not in option]
    config = make_config(*published, *flags, *SHORT, "run.init_lr=0.05", "run.save_freq=1")

    def with_adapter() -> VideoLlama:
        torch.manual_seed(0)
        model = build_model(config.model, device="cpu")
        targets = {"language_model": model.model.language_model, "layers": model.model.model.language_model}
        kept = ["video_branch.projection"] if on == "beside a whole projection" else None
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=kept)
        adapted = peft.get_peft_model(targets.get(on, model.model), lora)
        if on == "wrapped":
            return VideoLlama(adapted, model.processor)
        return model

    trainer = Trainer(config, model=with_adapter())
    before = values(trainer)
    lora = {name for name in before if ".lora_" in name or ".modules_to_save." in name}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == lora != set()
    batch = trainer.batches()[0]
    trainer.train()
    assert {name for name, value in values(trainer).items() if not torch.equal(value, before[name])} == lora
    expected = loss_of(VideoLlama(trainer.model, trainer.processor), batch)
    assert loss_of(load_pretrained_model(trainer.folder, device="cpu", dtype="float32"), batch) == expected
    whole = trained(trainer.folder)
    config.run.resume_ckpt_path = str(list_checkpoints(trainer.folder / "checkpoints")[0])
    resumed = Trainer(config, model=with_adapter())
    resumed.train()
    assert all(torch.equal(value, whole[name]) for name, value in trained(resumed.folder).items())


@pytest.mark.slow
def test_several_adapters_are_refused(make_config: MakeConfig, published: list[str]) -> None:
    config = make_config(*published)
    model = build_model(config.model, device="cpu")
    adapted = peft.get_peft_model(model.model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"several adapters \(default, other\)"):
        Trainer(config, model=model)


@pytest.mark.slow
def test_adapters_of_several_calls_and_what_is_no_adapter_are_refused(
    make_config: MakeConfig, published: list[str]
) -> None:
    config = make_config(*published)
    model = build_model(config.model, device="cpu")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=1, num_attention_heads=1)
    wrapped = peft.get_peft_model(model.model, prompts)
    with pytest.raises(ConfigError, match="such as prompt tuning"):
        Trainer(config, model=VideoLlama(wrapped, model.processor))
    model = build_model(config.model, device="cpu")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "query"])
    peft.get_peft_model(model.model.language_model, lora)
    peft.get_peft_model(model.model.video_branch.video_qformer, lora)
    with pytest.raises(ConfigError, match=r"several parts of the model \(language_model, model\.video_branch"):
        Trainer(config, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_a_quantized_language_model_on_the_cpu(
    bits: int, make_config: MakeConfig, published: list[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    options = [*published, *ON_LANGUAGE_MODEL, *FAST, f"model.load_in_{bits}bit=True", "run.save_freq=1"]
    trainer = Trainer(make_config(*options))
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    before = values(trainer)
    lora = {name for name in before if ".lora_" in name}
    assert {part_of_parameter(name) for name in lora} == {"language_model"}
    trainer.train()
    changed = {name for name, value in values(trainer).items() if not torch.equal(value, before[name])}
    assert lora <= changed
    assert {part_of_parameter(name) for name in changed - lora} == {"video_projection"}
    whole = trained(trainer.folder)
    first = list_checkpoints(trainer.folder / "checkpoints")[0]
    resumed = Trainer(make_config(*options, f"run.resume_ckpt_path={first}"))
    resumed.train()
    assert all(torch.equal(value, whole[name]) for name, value in trained(resumed.folder).items())
    loaded = load_pretrained_model(trainer.folder, device="cpu")
    own: dict[str, Tensor] = {name: value for name, value in values(trainer).items() if ".lora_" in name}
    assert all(torch.equal(loaded.model.get_parameter(name), value) for name, value in own.items())
    with pytest.raises(ConfigError, match="merged into whole weights"):
        load_pretrained_model(trainer.folder, device="cpu", load_in_4bit=True, merge_adapter=True)
