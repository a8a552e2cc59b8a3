"""YAML configurations: every shipped file parses, every mistake is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from video_llama.config import load_config, save_config
from video_llama.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("eval_configs/*.yaml")])


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(path)
    assert config.model.arch == "video_llama"
    assert "no effect" not in caplog.text


def test_the_four_stages_carry_the_published_values() -> None:
    expected = {
        # warm-up steps, iterations per epoch, epochs, batch size, first rate, last rate, longest text
        "visionbranch_stage1_pretrain": (2500, 2500, 5, 32, 1e-4, 8e-5, 32),
        "visionbranch_stage2_finetune": (1000, 1000, 3, 4, 3e-5, 1e-5, 320),
        "audiobranch_stage1_pretrain": (5000, 5000, 5, 32, 1e-4, 8e-5, 32),
        "audiobranch_stage2_finetune": (400, 1000, 3, 4, 3e-5, 1e-5, 512),
    }
    for name, values in expected.items():
        config = load_config(ROOT / f"configs/train/{name}.yaml")
        run, audio = config.run, name.startswith("audio")
        rates = (run.init_lr, run.min_lr, config.model.max_txt_len)
        steps = (run.warmup_steps, run.iters_per_epoch, run.max_epoch, run.batch_size_train)
        assert (*steps, *rates) == values
        frozen = (config.model.frozen_llama_proj, config.model.frozen_video_Qformer, config.model.frozen_audio_Qformer)
        assert frozen == ((True, True, False) if audio else (False, False, True))
        assert config.model.equip_audio_branch == audio


def test_options_are_stronger_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {batch_size_train: 4, init_lr: 1e-4}\ndatasets: {webvid: {data_type: video}}\n")
    options = [
        "run.batch_size_train=8",
        "datasets.webvid.sample_ratio=2",
        "model.ckpt=/some/file",
        "run.valid_splits=[val]",
    ]
    config = load_config(path, options)
    assert (config.run.batch_size_train, config.run.init_lr) == (8, 1e-4)
    assert (config.datasets["webvid"].sample_ratio, config.model.ckpt) == (2.0, "/some/file")
    assert config.run.valid_splits == ["val"]


def test_all_mistakes_are_named_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: {llama_modle: x, dtype: fp8}\nrunn: {task: y}\nrun: {batch_size_train: four}\n"
        "datasets: {webvid: {vis_procesor: {}, vis_processor: {train: {nfrms: 8}}, sample_ratio: much}}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["run.max_epoch=1.5"])
    message = str(caught.value)
    assert message.startswith(str(path))
    for mistake in (
        "unknown key model.llama_modle (did you mean 'llama_model'?)",
        "model.dtype must be one of auto, float32, bfloat16, float16, but is 'fp8'",
        "unknown key runn (did you mean 'run'?)",
        "run.batch_size_train must be an integer, but is 'four'",
        "run.max_epoch must be an integer, but is 1.5",
        "unknown key datasets.webvid.vis_processor.train.nfrms (did you mean 'n_frms'?)",
        "datasets.webvid.sample_ratio must be a number or null, but is 'much'",
    ):
        assert mistake in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no settings"),
        ("- a\n", "must hold sections"),
        ("model: {ckpt: 'a\n", "not valid YAML.*line 1"),
        ("model:\n  arch: a\n  arch: b\n", "duplicate key arch.*line 3"),
        ("model: 3\n", "model must be a section"),
        ("datasets: {webvid: 3}\n", "datasets.webvid must be a section"),
        ("model: {ckpt: {a: 1}}\n", "model.ckpt is a value, it has no key 'a'"),
        ("run: {train_splits: train}\n", "must be a list"),
        ("model: {ckpt: '${oc.env:NOT_SET_ANYWHERE}'}\n", "NOT_SET_ANYWHERE"),
    ],
)
def test_a_broken_file_says_what_is_wrong_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_absent_file_and_a_malformed_option_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    for option in ("run.seed", "=3"):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            load_config(write(tmp_path, "run: {seed: 1}\n"), [option])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("run.seed=???", r"seed"),
        ("run.output_dir=${nowhere}/run", r"nowhere"),
        ("model.attn_implementation=flash", r"must be one of eager, sdpa, flash_attention_2.*but is 'flash'"),
    ],
)
def test_an_option_that_stands_for_nothing_is_an_error_of_one_line(tmp_path: Path, option: str, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {max_epoch: 1}\n")
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(path, [option])
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_environment_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", "/weights")
    assert load_config(write(tmp_path, "model: {ckpt: '${oc.env:WEIGHTS}/a.pth'}\n")).model.ckpt == "/weights/a.pth"


def test_keys_without_effect_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(write(tmp_path, "run: {dist_url: 'env://'}\nmodel: {vit_precision: fp16}\n"))
    assert "run.dist_url has no effect" in caplog.text
    assert "model.vit_precision has no effect" in caplog.text


@pytest.mark.parametrize(
    ("option", "key", "instead"),
    [
        ("run.train_splits=[validation]", "run.train_splits", "build_info"),
        ("run.valid_splits=[val]", "run.valid_splits", "valid_build_info"),
        ("run.test_splits=[test]", "run.test_splits", "valid_build_info"),
        ("datasets.llava_instruct.tokenizer_name=other", "datasets.llava_instruct.tokenizer_name", "model.llama_model"),
        ("datasets.webvid_instruct:b.tokenizer_name=x", "datasets.webvid_instruct:b.tokenizer_name", "llama_model"),
    ],
)
def test_splits_and_tokenizers_of_the_originals_files_warn_if_they_ask_for_something_else(
    option: str, key: str, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = ROOT / "configs/train/visionbranch_stage2_finetune.yaml"
    load_config(shipped, ["run.valid_splits=[]"])
    assert caplog.text == ""
    load_config(shipped, [option])
    [message] = caplog.messages
    assert f"{key} has no effect: " in message
    assert instead in message


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(SHIPPED[0], ["run.seed=7"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_importing_the_package_or_reading_help_loads_no_torch() -> None:
    imports = "import sys, json, video_llama, video_llama.cli.options, video_llama.errors"
    code = f"{imports}; print(json.dumps(list(sys.modules)))"
    modules = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert not {"torch", "transformers", "decord", "av"} & set(modules)


# The mistakes of the configurations that came with the original


ORIGINAL = """
model:
  arch: video_llama
  model_type: pretrain_vicuna or pretrain_llama_v2
  llama_model: "ckpt/first/" or "ckpt/second/"  or 'ckpt/third'
  imagebind_ckpt_path: "ckpt/imagebind_path/"
  end_sym: "###" or "</s>" # either
  imagebind_ckpt_path: "ckpt/imagebind_path/"
datasets:
  cc_sbu_align:
    data_type: images
      build_info:
        storage: path/cc_sbu_align/

      vis_processor:
        train:
          name: "blip2_image_train"
  webvid:
    data_type: video
run:
  init_lr: 1e-4
"""


def test_the_mistakes_of_the_originals_files_are_repaired_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL)
    config = load_config(path)
    assert config.model.llama_model == "ckpt/first/"
    assert config.model.model_type == "pretrain_vicuna"
    assert config.model.end_sym == "###"
    assert config.model.imagebind_ckpt_path == "ckpt/imagebind_path/"
    assert config.datasets["cc_sbu_align"].build_info.storage == "path/cc_sbu_align/"
    assert config.datasets["cc_sbu_align"].vis_processor.train.name == "blip2_image_train"
    assert config.datasets["webvid"].data_type == "video"
    assert config.run.init_lr == 1e-4
    said = caplog.text
    assert 'line 5 offers several values; the first counts: llama_model: "ckpt/first/"' in said
    assert 'line 7 offers several values; the first counts: end_sym: "###"' in said
    assert "line 6: the key 'imagebind_ckpt_path' is there twice, with the same value" in said
    assert "line 12 is indented below a key that has a value" in said
    assert "model.model_type offers several values" in said


def test_a_key_with_two_different_values_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("model:\n  ckpt: a\n  ckpt: b\n")
    with pytest.raises(ConfigError, match=r"two\.yaml: .*duplicate key ckpt.*line 3"):
        load_config(path)


def test_text_with_or_in_it_is_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text.yaml"
    path.write_text("model:\n  ckpt: this or that\n  prompt_template: 'one\n    or: two'\n")
    model = load_config(path).model
    assert (model.ckpt, model.prompt_template) == ("this or that", "one or: two")
    assert caplog.text == ""


@pytest.mark.parametrize(
    "text",
    [
        "model: {ckpt: a, end_sym: x, ckpt: a}\n",
        "model:\n  ckpt: a\n    b\n  ckpt: a\n    b\n",
    ],
    ids=["one line", "several lines"],
)
def test_a_repeated_key_is_not_dropped_with_what_stands_beside_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="duplicate key ckpt"):
        load_config(path)


def test_references_that_stand_for_more_than_memory_holds_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    path = tmp_path / "train.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="its references"):
        load_config(path)
    # A few are fine, also one to what it is in.
    path.write_text("common: &common {seed: 3}\nrun: *common\n")
    with pytest.raises(ConfigError, match="unknown key common"):
        load_config(path)


@pytest.mark.parametrize("content", ["false", "3", "null", "[]", "[a]"])
def test_a_file_of_one_value_has_no_sections(content: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"sections|no settings"):
        load_config(path)
